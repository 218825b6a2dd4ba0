"""The tables of both papers, with what is measured here in the place of each of their tasks and methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PaperTable:
    """A published table, and its counterpart here.

    title:   of the published table
    model:   the paper's
    columns: the paper's columns with our tasks for each, of which the first that a model was measured on counts; none
             where nothing here stands for it
    rows:    the paper's methods with our names, None where there is no such method here
    numbers: by metric of the paper, one row of numbers for each method, in the order of ``columns``
    metrics: by metric of the paper, ours
    differs: what is not the same
    """

    title: str
    model: str
    columns: Mapping[str, Sequence[str]]
    rows: Mapping[str, str | None]
    numbers: Mapping[str, Mapping[str, Sequence[float]]]
    metrics: Mapping[str, str]
    differs: str


def _by_line(text: str) -> dict[str, tuple[float, ...]]:
    """``method: numbers`` a line."""
    pairs = (line.split(":") for line in text.strip().splitlines())
    return {name.strip(): tuple(map(float, numbers.split())) for name, numbers in pairs}


def _ruler(name: str) -> tuple[str, ...]:
    return f"{name}, 1024 tokens", f"{name}, 256 tokens"


_FLASHTRACE_ROWS = {
    "Perturbation": "leave_one_chunk_out",
    "REAGENT": "reagent",
    "CLP": "context_length_probing",
    "IFR": "ifr",
    "AttnLRP": "attnlrp",
    "FlashTrace": "flashtrace",
}
_AREAS = {"RISE": "RISE", "MAS": "MAS"}
_STEPS = ("morehopqa", "two steps", "variables, 4 hops")

_TABLE_1 = PaperTable(
    "FlashTrace, Table 1: needles, variables and HotpotQA at 1,024 tokens",
    "Qwen-3 8B",
    {
        **{f"mq q{n}": (*_ruler(f"mq q{n}"), *(("needles, 3 questions",) if n == 2 else ())) for n in (2, 4, 8)},
        **{f"mv v{n}": (*_ruler(f"mv v{n}"), *(("needles",) if n == 2 else ())) for n in (2, 4, 8)},
        "vt h2 c3": (*_ruler("vt h2 c3"), "variables, 2 hops"),
        "vt h4 c1": (*_ruler("vt h4 c1"), "variables, 4 hops"),
        "vt h6 c1": _ruler("vt h6 c1"),
        "vt h10 c1": _ruler("vt h10 c1"),
        "HotpotQA": ("hotpotqa",),
    },
    _FLASHTRACE_ROWS,
    {
        "Recovery": _by_line("""
            Perturbation: .391 .090 .010 .255 .161 .080 .060 .027 .051 .011 .329
            REAGENT: .244 .085 .005 .180 .156 .074 .045 .023 .050 .014 .222
            CLP: .399 .086 .008 .207 .146 .073 .130 .038 .063 .020 .335
            IFR: .471 .328 .012 .575 .452 .179 .136 .253 .202 .155 .268
            AttnLRP: .215 .204 .076 .254 .243 .159 .212 .229 .202 .173 .189
            FlashTrace: .483 .413 .075 .556 .516 .204 .698 .755 .659 .514 .384
        """),
        "RISE": _by_line("""
            Perturbation: .095 .239 .499 .134 .186 .351 .384 .354 .458 .466 .133
            REAGENT: .117 .260 .487 .188 .211 .369 .438 .397 .486 .495 .145
            CLP: .098 .253 .510 .156 .217 .393 .374 .328 .423 .451 .101
            IFR: .075 .115 .371 .069 .073 .205 .161 .102 .125 .153 .074
            AttnLRP: .196 .263 .377 .140 .193 .285 .319 .324 .338 .357 .155
            FlashTrace: .068 .113 .352 .069 .070 .183 .132 .110 .122 .143 .033
        """),
        "MAS": _by_line("""
            Perturbation: .144 .327 .709 .187 .244 .458 .551 .517 .684 .701 .220
            REAGENT: .197 .357 .694 .276 .291 .494 .668 .603 .745 .741 .235
            CLP: .166 .320 .657 .216 .280 .511 .490 .420 .565 .597 .190
            IFR: .140 .177 .460 .134 .142 .275 .231 .148 .173 .201 .166
            AttnLRP: .326 .451 .602 .229 .325 .475 .521 .548 .572 .592 .249
            FlashTrace: .163 .194 .427 .157 .160 .248 .187 .166 .179 .198 .128
        """),
    },
    {"Recovery": "recovery", **_AREAS},
    "The models are far smaller, the prompts of about 256 tokens unless told, and the haystack is other text. The "
    "reasoner's columns are its own tasks of the same form in 128 tokens (3 chains throughout). Perturbation replaces "
    "8 tokens at once instead of a sentence; ReAGent draws its replacements from the model itself.",
)

_TABLE_2 = PaperTable(
    "FlashTrace, Table 2: MATH and MoreHopQA",
    "Qwen-3 8B",
    {"MATH": ("math",), "MoreHopQA": _STEPS},
    _FLASHTRACE_ROWS,
    {
        "RISE": _by_line("""
            Perturbation: .380 .249
            REAGENT: .388 .265
            IFR: .354 .146
            AttnLRP: .368 .286
            CLP: .362 .249
            FlashTrace: .348 .128
        """),
        "MAS": _by_line("""
            Perturbation: .520 .347
            REAGENT: .536 .368
            IFR: .490 .228
            AttnLRP: .524 .458
            CLP: .491 .348
            FlashTrace: .446 .205
        """),
    },
    _AREAS,
    "In the place of MoreHopQA stand questions of two written steps, and the reasoner's variables of four hops.",
)

_TABLE_3 = PaperTable(
    "FlashTrace, Table 3: against the exhaustive rollout, MoreHopQA",
    "Qwen-3 8B",
    {"MoreHopQA": _STEPS},
    {"Exhaustive rollout": "exhaustive_rollout", "FlashTrace": "flashtrace"},
    {
        "Seconds": {"Exhaustive rollout": (11.2,), "FlashTrace": (0.72,)},
        "RISE": {"Exhaustive rollout": (0.116,), "FlashTrace": (0.128,)},
        "MAS": {"Exhaustive rollout": (0.193,), "FlashTrace": (0.205,)},
    },
    {"Seconds": "seconds", **_AREAS},
    "The same tasks as for Table 2. Seconds of one call, on a shared machine; their ratio grows with the reasoning.",
)

_TABLE_4 = PaperTable(
    "FlashTrace, Table 4: code, Aider",
    "Qwen-3 8B",
    {"Aider": ("aider",)},
    {"IFR (last line)": None, "IFR (token)": "ifr", "FlashTrace": "flashtrace"},
    {
        "RISE": {"IFR (last line)": (0.710,), "IFR (token)": (0.707,), "FlashTrace": (0.013,)},
        "MAS": {"IFR (last line)": (0.782,), "IFR (token)": (0.773,), "FlashTrace": (0.173,)},
    },
    _AREAS,
    "Needs the exercises as a file (task aider) and a model that writes code.",
)

_TABLE_5 = PaperTable(
    "FlashTrace, Table 5: another model",
    "LLaMA-3.1 8B",
    {
        "RULER (average)": ("mv v2, 256 tokens", "mq q2, 256 tokens", "needles"),
        "MATH": ("math",),
    },
    {"IFR": "ifr", "AttnLRP": "attnlrp", "FlashTrace": "flashtrace"},
    {
        "RISE": {"IFR": (0.206, 0.435), "AttnLRP": (0.398, 0.473), "FlashTrace": (0.171, 0.391)},
        "MAS": {"IFR": (0.298, 0.603), "AttnLRP": (0.683, 0.686), "FlashTrace": (0.231, 0.488)},
    },
    _AREAS,
    "One task in the place of RULER's average: two values of a key, or the reasoner's needles.",
)

_TABLE_7 = PaperTable(
    "FlashTrace, Table 7: number of hops, MoreHopQA",
    "Qwen-3 8B",
    {"MoreHopQA": _STEPS},
    {
        "0 hops": "flashtrace:hops=0",
        "1 hop": "flashtrace",
        "2 hops": "flashtrace:hops=2",
        "3 hops": "flashtrace:hops=3",
    },
    {
        "RISE": {"0 hops": (0.127,), "1 hop": (0.128,), "2 hops": (0.130,), "3 hops": (0.133,)},
        "MAS": {"0 hops": (0.209,), "1 hop": (0.205,), "2 hops": (0.206,), "3 hops": (0.209,)},
    },
    _AREAS,
    "The same tasks as for Table 2.",
)

_DIRECT = ("direct answer, 1 hop",)
_HETA_TASKS = {
    "LongRA": ("longra", "needle", *_DIRECT),
    "TellMeWhy": ("tellmewhy", "needle, several keys"),
    "WikiBio": ("wikibio",),
}
_MEAN_OF_ALL = {"mean of the data sets": ("longra", "tellmewhy", "wikibio", "needle", *_DIRECT)}
_VARIANTS = {
    "HETA (full)": "heta",
    "Transition only": "heta:curvature=null:mask=null",
    "Hessian only": "heta:gate=null:mask=null",
    "KL only": "heta:gate=null:curvature=null",
    "No transition gating": "heta:gate=null",
    "Uniform transition": "heta:gate=uniform",
}

_HETA_3 = PaperTable(
    "HETA, Table 3: Soft-NC and Soft-NS",
    "GPT-J 6B",
    _HETA_TASKS,
    {
        "ContextCite": "context_cite",
        "Integrated Gradients": "integrated_gradients",
        "Attention Rollout": "attention_rollout",
        "ReAgent": "reagent",
        "HETA": "heta",
    },
    {
        "Soft-NC": _by_line("""
            ContextCite: 1.42 1.46 .49
            Integrated Gradients: 1.87 1.54 1.38
            Attention Rollout: .41 .25 1.91
            ReAgent: 1.68 1.45 1.22
            HETA: 10.3 9.2 3.80
        """),
        "Soft-NS": _by_line("""
            ContextCite: .03 -.22 -.08
            Integrated Gradients: .45 .04 .77
            Attention Rollout: -.01 -.09 .46
            ReAgent: .37 .36 .39
            HETA: 2.31 2.04 2.20
        """),
    },
    {"Soft-NC": "Soft-NC", "Soft-NS": "Soft-NS"},
    "Other tasks stand for the data sets where these are not given as files. The paper's scale is not that of the "
    "definition (which cannot exceed about 1 for Soft-NS, nor fall below 0): compare the order only. Peering, "
    "TDD-backward, fAML, Progressive Inference and SEA-CoT are left out.",
)

_HETA_5 = PaperTable(
    "HETA, Table 5: its parts",
    "GPT-J 6B",
    _MEAN_OF_ALL,
    _VARIANTS,
    {
        "Soft-NC": dict(zip(_VARIANTS, ((9.78,), (3.12,), (2.89,), (2.23,), (4.31,), (3.89,)), strict=True)),
        "Soft-NS": dict(zip(_VARIANTS, ((2.31,), (1.52,), (1.45,), (1.21,), (1.84,), (1.76,)), strict=True)),
        "DSA": dict(zip(_VARIANTS, ((4.70,), (2.21,), (2.97,), (2.74,), (1.68,), (1.54,)), strict=True)),
    },
    {"Soft-NC": "Soft-NC", "Soft-NS": "Soft-NS", "DSA": "DSA"},
    "DSA lies in -1 to 1 by its definition, which the paper's numbers exceed.",
)

_HETA_7 = PaperTable(
    "HETA, Table 7: the weights of its terms",
    "GPT-J 6B",
    _MEAN_OF_ALL,
    {
        "beta 0": "heta:curvature=null",
        "beta .2": "heta:beta=0.2:gamma=0.8",
        "beta .5": "heta",
        "beta .8": "heta:beta=0.8:gamma=0.2",
        "beta 1": "heta:mask=null",
    },
    {
        "Faithfulness": {
            "beta 0": (0.179,),
            "beta .2": (0.143,),
            "beta .5": (0.108,),
            "beta .8": (0.124,),
            "beta 1": (0.254,),
        },
        "F1": {"beta 0": (0.82,), "beta .2": (0.84,), "beta .5": (0.89,), "beta .8": (0.81,), "beta 1": (0.68,)},
    },
    {"Faithfulness": "RISE of the answer", "F1": "F1"},
    "The paper does not define its faithfulness (lower is better); ours is RISE of the answer. F1 is of the top "
    "tenth. Sensitivity and robustness are in docs/heta.md where measured.",
)

_HETA_8 = PaperTable(
    "HETA, Table 8: its parts against annotations",
    "GPT-J 6B",
    _MEAN_OF_ALL,
    _VARIANTS,
    {"F1": dict(zip(_VARIANTS, ((0.89,), (0.76,), (0.68,), (0.82,), (0.79,), (0.74,)), strict=True))},
    {"F1": "F1"},
    "F1 alone; sensitivity and robustness need noise and rephrasings, see metrics.md.",
)

_HETA_9 = PaperTable(
    "HETA, Tables 9, 10 and 12: cheaper Hessians",
    "GPT-J 6B",
    _MEAN_OF_ALL,
    {"Full": "heta", "LR (rank 64)": "heta:curvature=low_rank", "GS": "heta:curvature=gradient_squared"},
    {
        "AOPC": {"Full": (0.61,), "LR (rank 64)": (0.59,), "GS": (0.52,)},
        "F1": {"Full": (0.89,), "LR (rank 64)": (0.86,), "GS": (0.81,)},
        "Seconds": {"Full": (0.455,), "LR (rank 64)": (0.330,), "GS": (0.240,)},
    },
    {"AOPC": "AOPC of the answer", "F1": "F1", "Seconds": "seconds"},
    "AOPC is in nats here, not normalised. The paper's seconds are a thousandth of those of 1,000 examples. Windows "
    "and sampled layers (Tables 10 and 12) are for texts longer than those measured here: not measured.",
)

_HETA_13 = PaperTable(
    "HETA, Table 13: interventions",
    "GPT-J 6B",
    _MEAN_OF_ALL,
    {
        "HETA (full)": "heta",
        "HETA, no gate": "heta:gate=null",
        "Attention Rollout": "attention_rollout",
        "Token gradients": "gradient_norm",
    },
    {
        "Patch-Corr": {
            "HETA (full)": (0.78,),
            "HETA, no gate": (0.53,),
            "Attention Rollout": (0.49,),
            "Token gradients": (0.41,),
        },
        "Intervention@5": {
            "HETA (full)": (0.143,),
            "HETA, no gate": (0.089,),
            "Attention Rollout": (0.081,),
            "Token gradients": (0.067,),
        },
        "Misattribution": {
            "HETA (full)": (0.12,),
            "HETA, no gate": (0.27,),
            "Attention Rollout": (0.30,),
            "Token gradients": (0.35,),
        },
    },
    {"Patch-Corr": "Patch-Corr", "Intervention@5": "Intervention@5", "Misattribution": "misattribution"},
    "The paper does not say which run its patches come from: here the prompt with every token replaced. Causal "
    "tracing is left out.",
)

TABLES = (
    _TABLE_1,
    _TABLE_2,
    _TABLE_3,
    _TABLE_4,
    _TABLE_5,
    _TABLE_7,
    _HETA_3,
    _HETA_5,
    _HETA_7,
    _HETA_8,
    _HETA_9,
    _HETA_13,
)
"""The tables in the order of the papers."""

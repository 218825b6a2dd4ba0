"""What a suite runs: tasks, methods and measurements by name. The reasoner reads its own tasks, other models text."""

from __future__ import annotations

from dataclasses import dataclass

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.drawing import ONE_OF_TWO, REASONER_TASKS
from flashtrace_plugin.evaluation.run.measures import DELETIONS

_PAPERS = "flashtrace"
"""The setting of the paper, which differences are taken to."""


@dataclass(frozen=True)
class Suite:
    """A run by its parts.

    about:     what it is for
    methods:   names as ``scorer_of`` takes them
    reasoner:  tasks of the bundled reasoner;  text: those of every other model
    groups:    of measurements
    samples:   of each task for the reasoner;  text_samples: for other models
    steps:     groups of deletion
    answers:   which samples of text tasks are used, see ``drawing.ANSWERS``; the reasoner's are right unless "wrong"
    reference: the method that differences are taken to
    """

    about: str
    methods: tuple[str, ...]
    reasoner: tuple[str, ...]
    text: tuple[str, ...]
    groups: tuple[str, ...] = ("evidence", "curves", "flow")
    samples: int = 10
    text_samples: int = 6
    steps: int = DELETIONS
    answers: str = "right"
    reference: str = _PAPERS


_THINKING = tuple(task for task in REASONER_TASKS if not task.startswith("direct"))
_ENGLISH = ("needle", "needle, several keys", "needle, several values", "two codes", "two steps")
_RULER = (
    *(f"{name}, 256 tokens" for name in ("mq q2", "mq q4", "mq q8", "mv v2", "mv v4", "mv v8")),
    *(f"vt {name}, 256 tokens" for name in ("h2 c3", "h4 c1", "h6 c1", "h10 c1")),
)
_HOPS = tuple(f"flashtrace:hops={hops}" for hops in (0, 2, 3, 4))
_PREDICTING = "flashtrace:positions=predicting:hops=4"
_HETA = "heta:curvature=gradient_squared"
_CHEAP = ("random", "recency", "attention", "attention_rollout", "gradient_x_input", "gradient_norm")
_DEAR = (
    "integrated_gradients",
    "leave_one_out",
    "leave_one_out_of_answer",
    "leave_one_chunk_out",
    "attribot",
    "occlusion",
    "context_length_probing",
    "reagent",
    "context_cite",
)

SUITES: dict[str, Suite] = {
    "quick": Suite(
        "a first look, in under two minutes",
        ("random", "attention", "leave_one_out", _PAPERS, _PREDICTING, "lrp", "recommended"),
        ("variables, 2 hops", "needles", "one of 2 answers, 2 hops"),
        ("needle", "two codes"),
        ("evidence", "curves", "patching", "flow"),
        samples=4,
        text_samples=1,
    ),
    "paper": Suite(
        "FlashTrace's Tables 1, 2, 3, 4, 5, 7 and Figures 1, 4, 5, 7 in form",
        (
            *_CHEAP,
            *_DEAR,
            "ifr",
            "attnlrp",
            _PAPERS,
            *_HOPS,
            "flashtrace:recursion=prompt",
            *(f"flashtrace:positions=predicting:hops={hops}" for hops in (0, 1, 4)),
            "exhaustive_rollout",
            "recursive:hops=4",
            "lrp",
            "alti",
            _HETA,
            "recommended",
            "answer_key",
        ),
        (*REASONER_TASKS, *ONE_OF_TWO),
        (*_ENGLISH, *_RULER, "haystack", "family relations"),
        samples=100,
        text_samples=50,
        steps=20,
    ),
    "heta": Suite(
        "HETA's Tables 3, 5, 7, 8 and 13 in form: its terms, weights and gates beside gradients and attention",
        (
            "heta",
            "heta:gate=per_head",
            "heta:gate=uniform",
            "heta:gate=null",
            "heta:mask=null",
            "heta:curvature=null",
            "heta:curvature=null:mask=null",
            "heta:gate=null:mask=null",
            "heta:gate=null:curvature=null",
            *(f"heta:beta={beta}:gamma={round(1 - beta, 1)}" for beta in (0.2, 0.8)),
            _HETA,
            "heta:curvature=low_rank",
            "attention_rollout",
            "gradient_norm",
            "integrated_gradients",
            "reagent",
            "context_cite",
            _PAPERS,
            "recommended",
            "random",
        ),
        ("direct answer, 1 hop", "direct answer, 2 hops"),
        ("needle", "needle, several keys"),
        ("evidence", "curves", "soft", "patching"),
        samples=20,
        text_samples=6,
        reference="heta",
    ),
    "choice": Suite(
        "quality beside cost, for choosing a method",
        (
            "random",
            "attention",
            "gradient_x_input",
            "leave_one_out",
            "attribot",
            _PAPERS,
            "flashtrace:recursion=prompt",
            _PREDICTING,
            "lrp",
            "lrp:rule=attn:reading=layers:mass=positive:hops=1",
            "alti",
            _HETA,
            "recommended",
        ),
        (*_THINKING, *ONE_OF_TWO),
        _ENGLISH,
        samples=6,
        text_samples=6,
        answers="forced",
    ),
    "lengths": Suite(
        "quality against the length of the reasoning, which is put into the model's mouth: does one hop suffice?",
        ("random", "ifr", "attnlrp", *(f"flashtrace:hops={hops}" for hops in (0, 1, 2, 4, 8)), "lrp", "recommended"),
        ("variables, 2 hops", "variables, 4 hops", "variables, 4 hops, 2 questions"),
        ("5 steps", "20 steps", "50 steps", "100 steps"),
        samples=20,
        text_samples=4,
        answers="forced",
        reference="flashtrace:hops=1",
    ),
    "wrong": Suite(
        "answers that are wrong, against the evidence of the right ones: the paper's open question 1",
        ("random", "leave_one_out", "ifr", _PAPERS, _PREDICTING, "lrp", "recommended"),
        ("direct answer, 2 hops", "variables, 4 hops, 2 questions"),
        ("needle, several keys", "needle, several values"),
        answers="wrong",
    ),
}
"""The suites by name."""


def suite_of(name: str) -> Suite:
    """Raises InputError for an unknown suite."""
    if name not in SUITES:
        told = "; ".join(f"{key}, {suite.about}" for key, suite in SUITES.items())
        raise InputError(f"suite is {name!r}; known ones are: {told}")
    return SUITES[name]

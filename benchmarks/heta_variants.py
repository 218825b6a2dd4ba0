"""HETA's variants from terms that are computed once, and the table of what they reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashtrace_plugin import HETA, Span
from flashtrace_plugin.evaluation.metrics import bootstrap

GATES = ("flow", "per_head", "uniform", None)
CURVATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "low rank": {"curvature": "low_rank", "rank": 64},
    "last 2 layers": {"last_layers": 2},
    "last 6 layers": {"last_layers": 6},
    "gradient squared": {"curvature": "gradient_squared"},
}
METRICS = ("recovery", "RISE", "MAS", "DSA", "DSA less default's", "MAS less default's", "inside")


@dataclass(frozen=True)
class Case:
    """A prompt with its answer, and what the answer should be explained by; ``segment`` is where the gold lies."""

    input_ids: Tensor
    prompt_length: int
    target: Span
    reasoning: Span | None
    gold: Sequence[int]
    distractors: Sequence[int]
    segment: Sequence[int] = ()

    @property
    def spans(self) -> dict[str, Any]:
        return {"prompt_length": self.prompt_length, "target": self.target, "reasoning": self.reasoning}


@dataclass(frozen=True)
class Found:
    """All terms of one case: gates M, curvatures S and informations I by name, over all that precedes the target.

    prompt_length: how many of these positions are the prompt; scores are those of the prompt
    """

    M: Mapping[str, Tensor]
    S: Mapping[str, Tensor]
    I: Mapping[str, Tensor]  # noqa: E741  the paper's letter
    prompt_length: int | None = None

    def scores(
        self,
        gate: str = "flow",
        curvature: str = "full",
        mask: str = "zero",
        *,
        beta: float = 0.5,
        gamma: float | None = None,
        rescale: bool = False,
    ) -> Tensor:
        S, info = self.S[curvature], self.I[mask]
        if rescale:
            S, info = S / S.max().clamp_min(TINY), info / info.max().clamp_min(TINY)
        return (self.M[gate] * (beta * S + (1 - beta if gamma is None else gamma) * info))[: self.prompt_length]

    def save(self, path: Path) -> None:
        """Without the length of the prompt, which the case knows."""
        save_file({f"{part}/{name}": x for part in "MSI" for name, x in getattr(self, part).items()}, path)

    @classmethod
    def load(cls, path: Path) -> Found:
        kept: dict[str, dict[str, Tensor]] = {part: {} for part in "MSI"}
        for key, x in load_file(path).items():
            part, _, name = key.partition("/")
            kept[part][name] = x
        return cls(**kept)


NOTHING = Found({}, {}, {})
TINY = torch.finfo(torch.float32).tiny


def terms(
    model: Any, case: Case, curvatures: Sequence[str], masks: Sequence[str], *, seed: int = 0, known: Found = NOTHING
) -> Found:
    """All terms: those that are ``known``, and the others computed."""

    def run(name: str, **options: Any) -> Tensor:
        heta = HETA(model, **({"gate": None, "curvature": None, "mask": None, "progress": False} | options), seed=seed)
        return heta.attribute_ids(case.input_ids, **case.spans).components[name]

    def curvature(name: str) -> Tensor:
        return run("curvature", **({"curvature": "full"} | CURVATURES[name]))

    return Found(
        dict(known.M) | {str(kind): run("gate", gate=kind) for kind in GATES if str(kind) not in known.M},
        dict(known.S) | {name: curvature(name) for name in curvatures if name not in known.S},
        dict(known.I) | {kind: run("information", mask=kind) for kind in masks if kind not in known.I},
        case.prompt_length,
    )


def variants(found: Found, seed: int) -> dict[str, Tensor]:
    """Scores by the name of their row."""
    rows = {"default: gate flow, full, zero mask, raw, beta 0.5": found.scores()}
    rows |= {f"gate {str(gate).lower()}": found.scores(str(gate)) for gate in GATES[1:]}
    rows |= {f"curvature {name}": found.scores(curvature=name) for name in found.S if name != "full"}
    rows |= {f"mask {mask}": found.scores(mask=mask) for mask in found.I if mask != "zero"}
    rows |= {f"beta {beta}": found.scores(beta=beta) for beta in (0.0, 0.2, 0.8, 1.0)}
    rows |= {f"rescaled, beta {beta}": found.scores(beta=beta, rescale=True) for beta in (0.2, 0.5, 0.8)}
    rows["rescaled, gate per_head"] = found.scores("per_head", rescale=True)
    if "low rank" in found.S:
        rows["rescaled, low rank"] = found.scores(curvature="low rank", rescale=True)
    alone = {"transition only": found.M["flow"], "Hessian only": found.S["full"], "KL only": found.I["zero"]}
    rows |= {name: term[: found.prompt_length] for name, term in alone.items()}
    rows["random"] = torch.rand(len(rows["KL only"]), generator=torch.Generator().manual_seed(seed))
    return rows


def table(values: pd.DataFrame) -> str:
    """Means with 95 % bootstrap intervals over samples, rows in the order they ran; those of fewer samples say so."""
    metrics = [metric for metric in METRICS if metric in values]
    lines = ["| variant | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    most = values["variant"].value_counts().max()
    for name, group in values.groupby("variant", sort=False):
        found = [group[metric].dropna() for metric in metrics]
        label = name if len(group) == most else f"{name} (n = {len(group)})"
        lines.append(f"| {label} | " + " | ".join(map(cell, found)) + " |")
    return "\n".join(lines)


def cell(values: pd.Series) -> str:
    """Mean and interval, or a dash for what was not measured."""
    if values.empty:
        return "–"
    estimate = bootstrap(values)
    return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"

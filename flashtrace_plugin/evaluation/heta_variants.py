"""HETA's variants from terms that are computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.methods.heta import HETA

_GATES = ("flow", "per_head", "uniform", None)
CURVATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "low rank": {"curvature": "low_rank", "rank": 64},
    "last 2 layers": {"last_layers": 2},
    "last 6 layers": {"last_layers": 6},
    "gradient squared": {"curvature": "gradient_squared"},
}
"""The curvatures that are compared, with HETA's options for each; no model has use for both numbers of layers."""


@dataclass(frozen=True)
class KnownTerms:
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
        """HETA's scores of the prompt with these terms; without ``gamma`` it is 1 - ``beta``."""
        S, info = self.S[curvature], self.I[mask]
        if rescale:
            S, info = S / S.max().clamp_min(_TINY), info / info.max().clamp_min(_TINY)
        return (self.M[gate] * (beta * S + (1 - beta if gamma is None else gamma) * info))[: self.prompt_length]

    def save(self, path: Path) -> None:
        """Without the length of the prompt, which the case knows."""
        save_file({f"{part}/{name}": x for part in "MSI" for name, x in getattr(self, part).items()}, path)

    @classmethod
    def load(cls, path: Path) -> KnownTerms:
        kept: dict[str, dict[str, Tensor]] = {part: {} for part in "MSI"}
        for key, x in load_file(path).items():
            part, _, name = key.partition("/")
            kept[part][name] = x
        return cls(kept["M"], kept["S"], kept["I"])


_TINY = torch.finfo(torch.float32).tiny


def terms(
    model: Any,
    case: Case,
    curvatures: Sequence[str],
    masks: Sequence[str],
    *,
    seed: int = 0,
    known: KnownTerms | None = None,
) -> KnownTerms:
    """All terms: those that are ``known``, and the others computed.

    curvatures: names of ``CURVATURES``;  masks: as HETA's ``mask``
    """
    before = known or KnownTerms({}, {}, {})

    quiet: dict[str, Any] = {"progress": False, "max_cost": None}

    def run(name: str, **options: Any) -> Tensor:
        heta = HETA(model, **(quiet | {"gate": None, "curvature": None, "mask": None} | options), seed=seed)
        return heta.attribute_ids(case.input_ids, **case.spans).components[name]

    def curvature(name: str) -> Tensor:
        return run("curvature", **({"curvature": "full"} | CURVATURES[name]))

    return KnownTerms(
        dict(before.M) | {str(kind): run("gate", gate=kind) for kind in _GATES if str(kind) not in before.M},
        dict(before.S) | {name: curvature(name) for name in curvatures if name not in before.S},
        dict(before.I) | {kind: run("information", mask=kind) for kind in masks if kind not in before.I},
        case.prompt_length,
    )


def variants(found: KnownTerms, seed: int) -> dict[str, Tensor]:
    """Scores by the name of their row."""
    rows = {"default: gate flow, full, zero mask, raw, beta 0.5": found.scores()}
    rows |= {f"gate {str(gate).lower()}": found.scores(str(gate)) for gate in _GATES[1:]}
    rows |= {f"curvature {name}": found.scores(curvature=name) for name in found.S if name != "full"}
    rows |= {f"mask {mask}": found.scores(mask=mask) for mask in found.I if mask != "zero"}
    rows |= {f"beta {beta}": found.scores(beta=beta) for beta in (0.0, 0.2, 0.8, 1.0)}
    rows |= {f"rescaled, beta {beta}": found.scores(beta=beta, rescale=True) for beta in (0.2, 0.5, 0.8)}
    rows["rescaled, gate per_head"] = found.scores("per_head", rescale=True)
    if "low rank" in found.S:
        rows["rescaled, low rank"] = found.scores(curvature="low rank", rescale=True)
    alone = {"transition only": found.M["flow"], "Hessian only": found.S["full"], "KL only": found.I["zero"]}
    rows |= {name: term[: found.prompt_length] for name, term in alone.items()}
    generator = torch.Generator().manual_seed(seed)
    rows["random"] = torch.rand(len(rows["KL only"]), generator=generator, dtype=torch.float32)
    return rows

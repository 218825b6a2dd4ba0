"""HETA's options, and the paper's variants by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.options import Options, at_least, option

PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "LR": {"curvature": "low_rank", "rank": 64},
    "LS": {"last_layers": 6},
    "WIN": {"window": 512, "overlap": 0.5},
    "LR+WIN": {"curvature": "low_rank", "rank": 64, "window": 512, "overlap": 0.5},
    "LS+WIN": {"last_layers": 6, "window": 512, "overlap": 0.5},
    "GS": {"curvature": "gradient_squared"},
}
"""The variants of the paper's Tables 9, 10 and 12 by their names there."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "transition only": {"curvature": None, "mask": None},
    "Hessian only": {"gate": None, "mask": None},
    "KL only": {"gate": None, "curvature": None},
    "no gate": {"gate": None},
    "uniform gate": {"gate": "uniform"},
}
"""The configurations of the paper's Table 5 beside the full method."""


def _checked_weight(name: str, value: Any) -> float:
    """The weight of a term. Raises InputError unless it is a finite number >= 0."""
    if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise InputError(f"{name} must be a finite number >= 0, got {value!r}; 0 leaves the term out of the score")
    return float(value)


def _checked_overlap(name: str, value: Any) -> float:
    """Raises InputError unless the overlap is a share below 1."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise InputError(
            f"{name} must be in [0, 1), got {value}; it is the share of a window that the next one repeats"
        )
    return float(value)


@dataclass(frozen=True)
class HETAOptions(Options):
    """What HETA can be told; see docs/heta.md for what the choices do to the numbers."""

    beta: float = option(0.5, "weight of the curvature term; the paper sweeps beta + gamma = 1", check=_checked_weight)
    gamma: float = option(0.5, "weight of the information term", check=_checked_weight)
    curvature: str | None = option(
        "full",
        "one product per token and probe (Eq. 3); a randomised Hessian whose cost does not grow with the text; "
        "squared gradients; None leaves the term out",
        choices=("full", "low_rank", "gradient_squared", None),
    )
    probes: int = option(8, "random sign vectors per token", check=at_least(1))
    rank: int = option(64, "rank of the low-rank Hessian", check=at_least(1))
    last_layers: int | None = option(
        None,
        "differentiate by the hidden states that enter the last so many layers instead of the embeddings",
        check=at_least(1, optional=True),
    )
    window: int | None = option(
        None, "tokens per window (Algorithm 1); None: the whole text is one window", check=at_least(1, optional=True)
    )
    overlap: float = option(0.5, "share of a window that the next one repeats", check=_checked_overlap)
    gate: str | None = option(
        "flow",
        "attention flow weighted by value norms; one rollout per head index; 1/n; None, 1",
        choices=("flow", "per_head", "uniform", None),
    )
    mask: str | None = option(
        "zero",
        "what a masked token becomes: the zero vector, the mean of the vocabulary, the embedding of the pad token or "
        "of mask_token; None leaves the information term out, and without both terms the score is the gate alone",
        choices=("zero", "mean", "pad", "token", None),
    )
    mask_token: int | str | None = option(None, "token of mask='token', as an id or as a text that is one token")
    rescale: str | None = option(
        None,
        "each term divided by its maximum first, as their scales can differ by orders of magnitude; None, as they are",
        choices=("max", None),
    )
    seed: int = option(0, "of the random vectors, the same on every device", check=at_least(0))
    memory_budget: int = option(
        2 << 30, "bytes of working memory to aim for when vectors and masked texts are batched", check=at_least(1)
    )
    progress: bool = option(True, "a bar for runs that take longer than a few seconds", noted=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta == self.gamma == 0:
            raise InputError(
                "beta and gamma are both 0, so every score is 0; for the gate alone use curvature=None, mask=None"
            )

"""HETA's options: what they may be, and the paper's variants by name."""

from __future__ import annotations

from typing import Any

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.base import one_of

GATES = ("flow", "per_head", "uniform")
CURVATURES = ("full", "low_rank", "gradient_squared")
MASKS = ("zero", "mean", "pad", "token")
RESCALES = ("max",)

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


def checked_weight(name: str, value: float) -> float:
    """The weight of a term. Raises InputError unless it is a finite number >= 0."""
    if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise InputError(f"{name} must be a finite number >= 0, got {value!r}; 0 leaves the term out of the score")
    return float(value)


def checked_choice(name: str, value: str | None, known: tuple[str, ...]) -> str | None:
    """None, or one of the known ones. Raises InputError for another."""
    return None if value is None else one_of(name, value, known)


def at_least(name: str, value: int, bound: int) -> int:
    """Raises InputError unless ``value`` is a whole number >= ``bound``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < bound:
        raise InputError(f"{name} must be a whole number >= {bound}, got {value!r}")
    return value


def checked_overlap(value: float) -> float:
    """Raises InputError unless the overlap is a share below 1."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise InputError(
            f"overlap must be in [0, 1), got {value}; it is the share of a window that the next one repeats"
        )
    return float(value)

"""The usual metrics of one attribution in one call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.evaluation.metrics.deletion import CurveOptions, DeletionCurve, checked_exponent, deletion_curve
from flashtrace_plugin.evaluation.metrics.evidence import recovery

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one attribution; ``recovery`` is None without gold positions, ``mas`` belongs to ``mas_exponent``."""

    recovery: float | None
    rise: float
    mas: float
    mas_exponent: float
    curve: DeletionCurve


def evaluate(
    model: object,
    attribution: Attribution,
    *,
    gold: Iterable[int] | None = None,
    fraction: float = 0.1,
    exponent: float = 1.0,
    **options: Unpack[CurveOptions],
) -> Evaluation:
    """Recovery, RISE and MAS of an attribution, from one deletion curve.

    model: the Hugging Face model that was attributed; other arguments as in :func:`recovery`, :func:`mas` and
    :func:`deletion_curve`
    """
    checked_exponent(exponent)
    found = None if gold is None else recovery(attribution, gold, fraction=fraction)
    ids = torch.tensor(attribution.token_ids)
    curve = deletion_curve(model, ids, prompt_length=len(attribution.prompt), scores=attribution, **options)
    return Evaluation(found, curve.rise, curve.mas(exponent), exponent, curve)

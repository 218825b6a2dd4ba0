"""Scores over the prompt as every metric takes them, and the ranking they define."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, Union

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError, SpanError
from flashtrace_plugin.evaluation.metrics.hosts import scores_of_host

Scores = Union[Attribution, Tensor, Sequence[float], Any]
"""An attribution, one number for each token of the prompt, or a result of Inseq or Captum."""


def as_scores(scores: Scores, prompt_length: int | None = None, input_ids: Tensor | None = None) -> Tensor:
    """The scores as float64 on the CPU. result: [prompt_length]

    Raises InputError for another shape or length, for numbers that are not finite, and for an Attribution of another
    sequence than ``input_ids`` [N].
    """
    if isinstance(scores, Attribution) and input_ids is not None and scores.token_ids != tuple(input_ids.tolist()):
        raise InputError("the attribution belongs to another sequence; pass the input_ids it was computed for")
    values = _numbers(scores).detach().double().cpu()
    if values.dim() != 1 or not len(values):
        raise InputError(f"scores must be [prompt_length], one for each prompt token, got {list(values.shape)}")
    if prompt_length is not None and len(values) != prompt_length:
        raise InputError(f"there are {len(values)} scores for {prompt_length} prompt tokens; give one for each")
    bad = (~values.isfinite()).nonzero()[:, 0]
    if len(bad):
        raise InputError(
            f"the score of prompt token {int(bad[0])} is {float(values[bad[0]])}; scores must be finite, "
            "was the attribution run in half precision?"
        )
    return values


def _numbers(scores: Scores) -> Tensor:
    if isinstance(scores, Attribution):
        return scores.scores
    found = scores_of_host(scores)
    if found is not None:
        return found
    try:
        return torch.as_tensor(scores)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"scores are a {type(scores).__name__}; give an Attribution, a result of Inseq or Captum, or one number "
            "for each prompt token"
        ) from error


def as_masses(scores: Scores, use: str) -> Tensor:
    """The same for metrics that read scores as mass, which has no sign. Raises InputError for a negative score."""
    values = as_scores(scores)
    if bool((values < 0).any()):
        raise InputError(
            f"{use} reads scores as mass, but that of prompt token {int(values.argmin())} is "
            f"{float(values.min()):.3g}; pass scores >= 0, for example scores.abs() or scores.clamp(min=0)"
        )
    return values


def as_positions(name: str, positions: Iterable[int], prompt_length: int) -> set[int]:
    """Distinct prompt positions. Raises SpanError if there are none or one is outside the prompt."""
    found = {int(p) for p in positions}
    if not found:
        raise SpanError(f"{name} is empty; name at least one position of the prompt, 0..{prompt_length - 1}")
    bad = sorted(p for p in found if not 0 <= p < prompt_length)
    if bad:
        raise SpanError(f"{name} position {bad[0]} is outside the prompt, whose positions are 0..{prompt_length - 1}")
    return found


def ranking(scores: Scores) -> Tensor:
    """Prompt positions, highest score first; equal scores in the order of the text. result: [prompt_length]"""
    return as_scores(scores).argsort(descending=True, stable=True)


def top_count(fraction: float, prompt_length: int) -> int:
    """ceil(fraction * prompt_length) with the fraction taken as it is written: a tenth of 70 is 7, not 8."""
    if not 0 < fraction <= 1:
        raise InputError(f"fraction must be above 0 and at most 1, got {fraction}; the paper's is 0.1")
    return math.ceil(Fraction(str(fraction)) * prompt_length)

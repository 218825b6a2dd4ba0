"""Finding evidence as a detection problem: how well scores tell evidence from the rest, and what bounds recovery."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flashtrace_plugin.errors import SpanError
from flashtrace_plugin.evaluation.metrics.scores import Scores, as_positions, as_scores, top_count


def auroc(scores: Scores, gold: Iterable[int], *, against: Iterable[int] | None = None) -> float:
    """Chance that a gold position scores above another one, ties counting half; higher is better, 1/2 is chance::

        ( sum of the gold positions' ranks - n (n + 1) / 2 ) / ( n m ),   n gold positions, m others

    gold:    positions of the evidence in the prompt, or a Span
    against: the positions they are compared with; by default all others of the prompt

    The area under the receiver operating characteristic in the form of Mann and Whitney (1947); only the ranking
    matters, and unlike recovery it has no budget. Raises SpanError for no gold, gold outside the prompt, nothing to
    compare with, and positions on both sides.
    """
    values = as_scores(scores)
    wanted = as_positions("gold", gold, len(values))
    everything = set(range(len(values)))
    other = as_positions("against", everything - wanted if against is None else against, len(values))
    check_disjoint(wanted, other, "gold", "against")
    n, m = len(wanted), len(other)
    ranks = middle_ranks(values[sorted(wanted) + sorted(other)])
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def recovery_ceiling(prompt_length: int, gold: Iterable[int], *, fraction: float = 0.1) -> float:
    """The best recovery that any scores can have: below 1 where the evidence is longer than the top, in (0, 1].

    Arguments and errors as in :func:`recovery`.
    """
    wanted = as_positions("gold", gold, prompt_length)
    return min(1.0, top_count(fraction, prompt_length) / len(wanted))


def check_disjoint(first: set[int], second: set[int], first_name: str, second_name: str) -> None:
    """Raises SpanError where the two sets of positions share one."""
    if first & second:
        raise SpanError(
            f"position {min(first & second)} is in both {first_name} and {second_name}; leave it out of one"
        )


def middle_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, lowest first; equal values share the middle of theirs. values, result: [n], float64"""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / torch.tensor(2.0, dtype=torch.float64))[group]

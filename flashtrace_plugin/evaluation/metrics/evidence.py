"""Metrics against annotated evidence: they look at the scores only, never at the model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from flashtrace_plugin.errors import SpanError
from flashtrace_plugin.evaluation.metrics.scores import Scores, as_masses, as_positions, as_scores, ranking, top_count


def recovery(scores: Scores, gold: Iterable[int], *, fraction: float = 0.1) -> float:
    """Share of the gold positions among the top scores, in [0, 1]; higher is better (FlashTrace, Eq. 32)::

        | gold ∩ top ceil(fraction * prompt_length) | / | gold |

    gold: positions of the evidence in the prompt, or a Span; repeats count once

    Only the ranking matters; equal scores rank in the order of the text. With more gold positions than places at
    the top the best possible value is below 1. Raises InputError for unusable scores or fractions, SpanError for no
    gold or gold outside the prompt.
    """
    values = as_scores(scores)
    wanted = as_positions("gold", gold, len(values))
    return len(wanted & _top(values, fraction)) / len(wanted)


def f1(scores: Scores, gold: Iterable[int], *, fraction: float = 0.1) -> float:
    """Agreement of the top scores with annotated positions, in [0, 1]; higher is better (HETA, F1 alignment)::

        2 | top ∩ gold | / ( | top | + | gold | )

    Arguments and errors as in :func:`recovery`; unlike it, a large top costs precision.
    """
    values = as_scores(scores)
    wanted, top = as_positions("gold", gold, len(values)), _top(values, fraction)
    return 2 * len(wanted & top) / (len(wanted) + len(top))


def dsa(
    scores: Scores,
    evidence: Iterable[int],
    distractor: Iterable[int],
    *,
    evidence_segment: Iterable[int] | None = None,
) -> float:
    """Dependent sentence attribution, in [-1, 1]; higher is better (HETA)::

        ( mass on evidence - mass on distractor ) / mass on evidence_segment ∪ distractor

    evidence:         prompt positions of the annotated tokens
    distractor:       all positions of the segment that holds no evidence
    evidence_segment: all positions of the segment that holds the evidence; by default the evidence itself

    0 where neither segment has any mass. Raises InputError for negative scores, SpanError for positions that are
    outside the prompt, in both segments, or evidence outside its segment.
    """
    mass = as_masses(scores, "DSA")
    wanted = as_positions("evidence", evidence, len(mass))
    other = as_positions("distractor", distractor, len(mass))
    segment = wanted if evidence_segment is None else as_positions("evidence_segment", evidence_segment, len(mass))
    _check_segments(wanted, other, segment)
    total = _sum(mass, other | segment)
    return (_sum(mass, wanted) - _sum(mass, other)) / total if total > 0 else 0.0


def _check_segments(evidence: set[int], distractor: set[int], segment: set[int]) -> None:
    if evidence - segment:
        raise SpanError(f"evidence position {min(evidence - segment)} is outside evidence_segment; widen the segment")
    if distractor & segment:
        raise SpanError(f"position {min(distractor & segment)} is both evidence and distractor; they must not overlap")


def _top(values: Tensor, fraction: float) -> set[int]:
    return set(ranking(values)[: top_count(fraction, len(values))].tolist())


def _sum(mass: Tensor, positions: set[int]) -> float:
    return float(mass[sorted(positions)].sum())

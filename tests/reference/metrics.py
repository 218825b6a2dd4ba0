"""Recovery rate, RISE, MAS and DSA as plain loops over Python lists and numpy arrays.

`scores` are over the input tokens, positions 0 .. len(scores) - 1 of `ids`. `log_prob(ids)` is the log-probability of
the whole generation (reasoning and output) given the input part of `ids`, a list of ints. Ties rank by position, the
earlier token first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np

STEPS = 20

LogProb = Callable[[list[int]], float]


def ranking(scores: Sequence[float]) -> list[int]:
    """Input positions, most important first."""
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))


def recovery_rate(scores: Sequence[float], gold: Iterable[int], fraction: float = 0.1) -> float:
    """|gold in the top ceil(10 % |I|)| / |gold|  (FlashTrace Eq. 32). Higher is better."""
    gold = set(gold)
    places = math.ceil(round(fraction * len(scores), 9))  # 0.1 * 70 is 7.000000000000001
    top = ranking(scores)[:places]
    return len(gold.intersection(top)) / len(gold)


def groups(scores: Sequence[float], steps: int = STEPS) -> list[list[int]]:
    """The ranking cut into `steps` groups that differ by one token at most, the larger ones first.

    Fewer tokens than steps: one token a group.
    """
    order, steps = ranking(scores), min(steps, len(scores))
    small, larger = divmod(len(order), steps)
    result, start = [], 0
    for step in range(steps):
        stop = start + small + (1 if step < larger else 0)
        result.append(order[start:stop])
        start = stop
    return result


def deletion_values(
    log_prob: LogProb, ids: Sequence[int], scores: Sequence[float], pad: int, steps: int = STEPS
) -> np.ndarray:
    """log P(generation) before any deletion and after each group was replaced by `pad`; [steps + 1]."""
    perturbed = [int(token) for token in ids]
    values = [float(log_prob(list(perturbed)))]
    for group in groups(scores, steps):
        for position in group:
            perturbed[position] = pad
        values.append(float(log_prob(list(perturbed))))
    return np.array(values)


def normalised_curve(values: np.ndarray) -> np.ndarray:
    """(value - last) / |first - last|, clipped to [0, 1], made non-increasing; ones where first equals last."""
    first, last = values[0], values[-1]
    if first == last:
        return np.ones(len(values))
    curve, lowest = [], 1.0
    for value in values:
        lowest = min(lowest, max(0.0, min(1.0, (value - last) / abs(first - last))))
        curve.append(lowest)
    return np.array(curve)


def density(scores: Sequence[float], steps: int = STEPS) -> np.ndarray:
    """1 - cumulative share of the score mass removed; a straight line where there is no mass; [steps + 1]."""
    parts = groups(scores, steps)
    total = sum(float(score) for score in scores)
    if total <= 0:
        return np.linspace(1.0, 0.0, len(parts) + 1)
    left = [1.0]
    for group in parts:
        left.append(left[-1] - sum(float(scores[i]) for i in group) / total)
    return np.array(left)


def area(curve: np.ndarray) -> float:
    """Trapezoid rule on [0, 1] with equal steps."""
    return sum((a + b) / 2 for a, b in pairwise(curve)) / (len(curve) - 1)


def rise_from(values: np.ndarray) -> float:
    return float(area(normalised_curve(values)))


def mas_from(values: np.ndarray, densities: np.ndarray) -> float:
    """Area of curve + |curve - density|, clipped to [0, 1], then stretched to it; 0.5 where that is constant."""
    curve = normalised_curve(values)
    penalised = np.clip(curve + np.abs(curve - densities), 0.0, 1.0)
    low, high = penalised.min(), penalised.max()
    if high == low:
        return 0.5
    return float(area((penalised - low) / (high - low)))


def rise(log_prob: LogProb, ids: Sequence[int], scores: Sequence[float], pad: int, steps: int = STEPS) -> float:
    """Area under the deletion curve (FlashTrace Eq. 33). Lower is better."""
    return rise_from(deletion_values(log_prob, ids, scores, pad, steps))


def mas(log_prob: LogProb, ids: Sequence[int], scores: Sequence[float], pad: int, steps: int = STEPS) -> float:
    """Deletion with the magnitude penalty (FlashTrace Eq. 34). Lower is better."""
    return mas_from(deletion_values(log_prob, ids, scores, pad, steps), density(scores, steps))


def dsa(
    scores: Sequence[float], evidence: Iterable[int], distractor: Iterable[int], evidence_segment: Iterable[int]
) -> float:
    """Mass on the evidence tokens minus mass on the distractor segment, of the mass on both segments; in [-1, 1].

    evidence          annotated tokens, a part of `evidence_segment`
    distractor        every token of the other segment
    """
    evidence, distractor = set(evidence), set(distractor)
    total = sum(float(scores[i]) for i in distractor | set(evidence_segment))
    if total == 0:
        return 0.0
    return (sum(float(scores[i]) for i in evidence) - sum(float(scores[i]) for i in distractor)) / total

"""Checks of the metric reference on curves that can be integrated by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference import metrics

PAD = 0


def additive(weights):
    """log P falls by weights[i] when input token i is deleted."""
    return lambda ids: -sum(w for w, token in zip(weights, ids, strict=False) if token == PAD)


def test_recovery_rate_by_hand():
    scores = [0.0] * 15
    scores[3], scores[7] = 2.0, 1.0
    assert metrics.recovery_rate(scores, [3, 7]) == 1  # ceil(1.5) = 2 places
    assert metrics.recovery_rate(scores, [3, 8]) == 0.5
    assert metrics.recovery_rate([1.0] * 10, [0]) == 1 and metrics.recovery_rate([1.0] * 10, [9]) == 0


def test_groups_differ_by_one_token_at_most():
    sizes = [len(group) for group in metrics.groups([float(i) for i in range(47)])]
    assert sizes == [3] * 7 + [2] * 13
    assert metrics.groups([1.0, 3.0, 2.0]) == [[1], [2], [0]]


def test_only_the_input_is_deleted_most_important_first():
    seen = []
    metrics.deletion_values(lambda ids: seen.append(ids) or 0.0, [5, 6, 7, 8], [0.1, 0.9, 0.5], PAD)
    assert seen == [[5, 6, 7, 8], [5, 0, 7, 8], [5, 0, 0, 8], [0, 0, 0, 8]]


def test_perfect_single_token():
    """One token decides: the curve falls to 0 at once, the density as well, and the area is half a step."""
    weights, ids = [0.0] * 19 + [3.0], list(range(1, 21))
    assert metrics.rise(additive(weights), ids, weights, PAD) == pytest.approx(0.5 / 20)
    assert metrics.mas(additive(weights), ids, weights, PAD) == pytest.approx(0.5 / 20)


def test_right_ranking_with_wrong_magnitudes_is_penalised_by_mas_alone():
    weights, ids = [0.0] * 19 + [3.0], list(range(1, 21))
    flat = [1.0] * 19 + [1.0001]
    assert metrics.rise(additive(weights), ids, flat, PAD) == pytest.approx(0.5 / 20)
    assert metrics.mas(additive(weights), ids, flat, PAD) == pytest.approx(0.5, abs=1e-3)


def test_uniform_effect_and_uniform_scores():
    assert metrics.rise(additive([1.0] * 40), range(1, 41), [1.0] * 40, PAD) == pytest.approx(0.5)
    assert metrics.mas(additive([1.0] * 40), range(1, 41), [1.0] * 40, PAD) == pytest.approx(0.5)


def test_two_tokens_by_hand():
    # values 0, -1, -4 -> curve 1, .75, 0; density 1, .5, 0; penalty 0, .25, 0; penalised 1, 1, 0
    values, densities = np.array([0.0, -1.0, -4.0]), metrics.density([1.0, 1.0])
    assert metrics.rise_from(values) == pytest.approx((1.75 / 2 + 0.75 / 2) / 2)
    assert metrics.mas_from(values, densities) == pytest.approx((1 + 0.5) / 2)


def test_curve_does_not_rise_again():
    assert metrics.normalised_curve(np.array([0.0, -8.0, -2.0, -4.0])).tolist() == [1, 0, 0, 0]


def test_degenerate_curves():
    assert metrics.rise_from(np.zeros(21)) == 1 and metrics.mas_from(np.zeros(21), np.ones(21)) == 0.5
    assert metrics.density([0.0] * 20).tolist() == pytest.approx(np.linspace(1, 0, 21).tolist())


def test_dsa_by_hand():
    scores = [1.0, 1.0, 4.0, 2.0, 100.0]  # first segment 0-1, second 2-3, question 4
    assert metrics.dsa(scores, evidence=[2], distractor=[0, 1], evidence_segment=[2, 3]) == (4 - 2) / 8

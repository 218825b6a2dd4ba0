"""Recovery, RISE and MAS against formulas written again from the papers, in plain lists and loops, to 1e-6."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrace_plugin import Span
from flashtrace_plugin.evaluation.metrics import deletion_curve, recovery
from flashtrace_plugin.evaluation.metrics.deletion import DeletionCurve, deletion_groups
from tests.tiny import PAD, random_ids, tiny

scored = st.lists(st.floats(0, 1, width=32), min_size=20, max_size=60)


def recovered(scores, gold):
    """FlashTrace, Eq. 32: the share of the gold tokens among the best tenth."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    best = order[: math.ceil(len(scores) / 10)]
    return sum(1 for i in set(gold) if i in best) / len(set(gold))


def areas(values, scores, groups):
    """FlashTrace, Eq. 33 and 34 in the form of the authors' evaluation: both areas, by the trapezoid rule."""
    first, last, n = values[0], values[-1], len(values) - 1
    curve = []
    for value in values:
        kept = 1.0 if first == last else min(1.0, max(0.0, (value - last) / abs(first - last)))
        curve.append(min([kept, *curve]))
    total, density = sum(scores), [1.0]
    for k, group in enumerate(groups, start=1):
        density.append(density[-1] - sum(scores[i] for i in group) / total if total else 1 - k / n)
    worse = [min(1.0, max(0.0, c + abs(c - d))) for c, d in zip(curve, density)]
    low, high = min(worse), max(worse)
    worse = [(w - low) / (high - low) for w in worse] if high > low else [0.5] * (n + 1)
    return tuple(sum((a + b) / 2 for a, b in pairwise(y)) / n for y in (curve, worse))


@given(scored, st.data())
def test_recovery(scores, data):
    gold = data.draw(st.lists(st.integers(0, len(scores) - 1), min_size=1))
    assert recovery(scores, gold) == pytest.approx(recovered(scores, gold), abs=1e-6)


@settings(max_examples=200)
@given(scored, st.data())
def test_rise_and_mas_of_any_curve(scores, data):
    values = data.draw(st.lists(st.floats(-100, 0, width=32), min_size=21, max_size=21))
    groups = deletion_groups(torch.tensor(scores, dtype=torch.float64), 20)
    curve = DeletionCurve(torch.tensor(values, dtype=torch.float64), groups, torch.tensor(scores).double(), PAD)
    rise, mas = areas(values, torch.tensor(scores).double().tolist(), groups)
    assert curve.rise == pytest.approx(rise, abs=1e-6) and curve.mas() == pytest.approx(mas, abs=1e-6)


def test_a_whole_evaluation():
    """The likelihood, too, from the model itself, one deletion after another."""
    model, ids, prompt = tiny("llama"), random_ids(40, seed=2), 30
    scores = torch.rand(prompt, generator=torch.Generator().manual_seed(3)).double().tolist()
    order = sorted(range(prompt), key=lambda i: (-scores[i], i))
    sizes = [2] * 10 + [1] * 10  # 30 tokens in 20 groups
    row, values, groups = ids.clone(), [log_p(model, ids, prompt)], []
    for size in sizes:
        group, order = order[:size], order[size:]
        row[group] = PAD
        values.append(log_p(model, row, prompt))
        groups.append(group)
    found = deletion_curve(model, ids, prompt_length=prompt, scores=scores, generation=Span(prompt, 40))
    rise, mas = areas(values, scores, groups)
    assert [sorted(g) for g in found.groups] == [sorted(g) for g in groups]
    assert found.rise == pytest.approx(rise, abs=1e-5) and found.mas() == pytest.approx(mas, abs=1e-5)


@torch.no_grad()
def log_p(model, ids, prompt):
    logits = model(ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
    return float(logits.gather(-1, ids[prompt:, None]).double().sum())

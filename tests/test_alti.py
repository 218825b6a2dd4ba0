"""Span-wise rollout against a dense one in float64, and what attention parks on."""

from __future__ import annotations

import pytest
import torch

from flashtrace_plugin import ALTI, Span
from flashtrace_plugin.core.flow import rollout
from tests.reference import dense
from tests.tiny import random_ids, tiny

IDS = random_ids(40, seed=4)
SPANS = {"prompt_length": 14, "target": Span(31, 36), "reasoning": Span(17, 29)}


def dense_rollout(layers, rho, out=()):
    rho = rho.double() / rho.sum()
    for layer in reversed(layers):
        t = rho @ layer.resid_mid
        taken = dense.proximity(dense.contributions(layer, rho), t).sum(0)
        taken = taken + dense.proximity(rho[:, None] * layer.resid_pre, t)
        taken[list(out)] = 0
        rho = taken / taken.sum()
    return rho


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi", "granite", "gpt_oss"])
def test_it_is_the_dense_rollout_hop_by_hop(family):
    model = tiny(family, seed=3)
    layers = dense.read_dense(model, IDS)
    found = ALTI(model, hops=1, parked="keep").attribute_ids(IDS, **SPANS)
    first = dense_rollout(layers, torch.zeros(40).index_fill(0, torch.arange(30, 35), 1.0))
    through = torch.zeros(40).double()
    through[16:28] = first[17:29]
    second = dense_rollout(layers, through)
    for ours, expected in zip(found.hop_scores, (first, second), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)
        assert float(ours.sum()) == pytest.approx(1, abs=1e-5)
    assert 0 < found.closure_error < 1e-5


def test_what_attention_parks_on_passes_nothing_on(monkeypatch):
    monkeypatch.setattr(rollout, "PARKED", 1.5)  # random models have no strong sinks
    model = tiny("llama", seed=3)
    found = ALTI(model, hops=0).attribute_ids(IDS, **SPANS)
    parked = found.settings["parked_positions"]
    layers = dense.read_dense(model, IDS)
    mass = sum(layer.pattern.mean(0)[:35, :35].sum(0) for layer in layers)
    assert parked == (mass > 1.5 * mass.sum() / 35).nonzero()[:, 0].tolist() and parked
    expected = dense_rollout(layers, torch.zeros(40).index_fill(0, torch.arange(30, 35), 1.0), parked)
    torch.testing.assert_close(found.hop_scores[0].double(), expected, rtol=1e-4, atol=1e-6)
    assert not found.hop_scores[:, parked].any()

"""Interventions at the target's edges, by other routes; mass by hop; pi-Soft; reuse of prefixes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashtrace_plugin import FlashTrace, InputError, Span, SpanError
from flashtrace_plugin.evaluation.metrics import likelihood as module
from flashtrace_plugin.evaluation.metrics import log_likelihood, mass_by_hop, patch_effects, patching
from flashtrace_plugin.evaluation.metrics.likelihood import token_log_likelihood
from flashtrace_plugin.evaluation.metrics.soft import _retaining, soft_faithfulness
from tests.tiny import PAD, random_ids, tiny

PROMPT, LENGTH, TARGET = 9, 16, Span(13, 16)


def effects_of(model, ids=None, **options):
    ids = random_ids(LENGTH, seed=5) if ids is None else ids
    return patch_effects(model, ids, prompt_length=PROMPT, target=TARGET, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_one_layer_an_edge_is_all_that_a_token_does(family):
    """There the target reads a token through this edge alone, so patching it is replacing the token."""
    model, ids = tiny(family, num_hidden_layers=1, n_layer=1), random_ids(LENGTH, seed=5)
    rows = ids.repeat(PROMPT + 1, 1)
    places = torch.arange(PROMPT)
    rows[places + 1, places] = PAD
    found = log_likelihood(model, rows, generation=TARGET)
    torch.testing.assert_close(effects_of(model, ids), found[0] - found[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gptj"])
def test_edges_are_cut_by_a_mask_that_only_the_target_sees(family):
    """The same with hooks: at the target's rows, keys and values come from the other run, token by token."""
    model, ids = tiny(family), random_ids(LENGTH, seed=5)
    start = TARGET.start - 1
    own = list_states(model, ids[:start])
    other = list_states(model, torch.cat([torch.full((PROMPT,), PAD), ids[PROMPT:start]]))
    plain = tail(model, ids, own)
    expected = []
    for i in range(PROMPT):
        mixed = [(k.clone(), v.clone()) for k, v in own]
        for (k, v), (a, b) in zip(mixed, other, strict=True):
            k[0, :, i], v[0, :, i] = a[0, :, i], b[0, :, i]
        expected.append(plain - tail(model, ids, mixed))
    torch.testing.assert_close(effects_of(model, ids, batch_size=4), torch.stack(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def list_states(model, ids):
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    model(input_ids=ids[None], past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def tail(model, ids, states):
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    for number, (k, v) in enumerate(states):
        cache.update(k.clone(), v.clone(), number)
    logits = model(input_ids=ids[None, TARGET.start - 1 : -1], past_key_values=cache).logits[0].log_softmax(-1)
    return logits.gather(-1, ids[TARGET.slice, None]).sum().double()


def test_a_prompt_that_is_the_reference_already_has_no_effect():
    ids = random_ids(LENGTH, seed=5)
    ids[:PROMPT] = 7
    found = effects_of(tiny("llama"), ids, replacement=7)
    torch.testing.assert_close(found, torch.zeros(PROMPT, dtype=torch.float64), rtol=0, atol=1e-5)


def test_patching_by_hand():
    effects = torch.tensor([0.4, 0.0, 0.2, -0.1])
    found = patching([4.0, 1.0, 3.0, 0.5], effects, k=2, missed_of=3)
    assert found.correlation == 1 and found.top_effect == pytest.approx(0.3) and found.missed == pytest.approx(1 / 3)
    assert patching([1.0] * 4, effects).correlation is None, "equal scores rank nothing"
    with pytest.raises(InputError, match="3 scores for 4"):
        patching([1.0] * 3, effects)


def test_a_target_inside_the_prompt_is_refused():
    with pytest.raises(SpanError, match="target 3:5 must follow the prompt of 9 tokens"):
        patch_effects(tiny("llama"), random_ids(LENGTH, seed=5), prompt_length=PROMPT, target=Span(3, 5))


def test_mass_by_hop_adds_up():
    found = FlashTrace(tiny("llama"), hops=2).attribute_ids(
        random_ids(LENGTH, seed=5), prompt_length=PROMPT, target=TARGET, reasoning=Span(10, 12)
    )
    masses = mass_by_hop(found)
    assert len(masses) == 3 and all(sum(hop.values()) == pytest.approx(1) for hop in masses)
    assert [hop["reasoning"] for hop in masses] == pytest.approx(found.reasoning_mass.tolist(), abs=1e-6)
    assert masses[1]["target"] == 0 and masses[0]["rest"] > 0


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.floats(0.05, 0.95))
def test_equal_retention(scores, share):
    unit = torch.tensor(scores, dtype=torch.float64)
    kept = _retaining(unit, share)
    assert float(kept.mean()) == pytest.approx(share, abs=1e-6) and 0 <= float(kept.min()) <= float(kept.max()) <= 1
    order = unit.argsort()
    assert bool((kept[order].diff() >= -1e-9).all()), "larger scores keep no less"


def test_pi_soft_makes_the_mean_of_scores_irrelevant():
    model, ids = tiny("llama"), random_ids(LENGTH, seed=5)
    scores = torch.rand(PROMPT, generator=torch.Generator().manual_seed(1))
    scores[0], scores[1] = 0, 1
    small = torch.where(scores == 1, 1.0, scores * 1e-3)
    options = {"prompt_length": PROMPT, "samples": 4, "retention": 0.05}
    both = [soft_faithfulness(model, ids, scores=s, **options) for s in (scores, scores * 3)]
    assert both[0] == both[1]
    assert soft_faithfulness(model, ids, scores=small, **options).nc != both[0].nc
    with pytest.raises(InputError, match="retention must be above 0 and below 1, got 1"):
        soft_faithfulness(model, ids, scores=scores, prompt_length=PROMPT, retention=1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gptj"])
def test_rows_that_share_a_beginning_give_the_same_numbers(family, monkeypatch):
    model, ids = tiny(family), random_ids(LENGTH, seed=5)
    rows = ids.repeat(PROMPT + 1, 1)
    rows[torch.arange(PROMPT) + 1, torch.arange(PROMPT)] = PAD
    generation = Span(PROMPT, LENGTH)
    reused = []
    real = module.prefix_cache
    monkeypatch.setattr(module, "prefix_cache", lambda states: reused.append(1) or real(states))
    found = token_log_likelihood(model, rows, generation=generation, batch_size=3)
    assert reused
    monkeypatch.setattr(module, "_after_prefix", lambda *args: None)
    expected = token_log_likelihood(model, rows, generation=generation, batch_size=3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

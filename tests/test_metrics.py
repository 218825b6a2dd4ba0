"""Metrics against slow references and hand-made curves, their invariances, and what they refuse."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrace_plugin import FlashTrace, InputError, Span, SpanError, UnsupportedModelError
from flashtrace_plugin.evaluation.metrics import (
    DeletionCurve,
    bootstrap,
    deletion_curve,
    dsa,
    evaluate,
    f1,
    log_likelihood,
    mas,
    ranking,
    recovery,
    rise,
    robustness,
    sensitivity,
    soft_faithfulness,
)
from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from flashtrace_plugin.evaluation.metrics.scores import top_count
from tests.reference import metrics as reference
from tests.tiny import EOS, PAD, VOCAB_SIZE, random_ids, tiny

PROMPT, LENGTH = 30, 42
GENERATION = Span(PROMPT, LENGTH)
FAMILIES = ["llama", "gpt2", "gemma2", "gptj", "mistral"]

levels = st.lists(st.integers(0, 12), min_size=1, max_size=80)
floats = st.floats(0, 1, width=32)


@cache
def sequence(family: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A tiny model with a random prompt and what it says greedily, so that deletion makes it less likely."""
    model = tiny(family)
    ids = random_ids(PROMPT, seed=5)
    with torch.no_grad():
        for _ in range(LENGTH - PROMPT):
            ids = torch.cat(
                [ids, model(ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, -1:].argmax(-1)]
            )
    return model, ids


def scores_for(seed: int, ties: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(PROMPT, generator=generator)
    return (values * 4).round() if ties else values


def log_prob(model, ids, generation=GENERATION):
    """log P of the generation by a plain loop, one full forward pass per call."""

    def of(perturbed: list[int]) -> float:
        row = torch.tensor(perturbed)
        with torch.no_grad():
            logits = model(row[None], attention_mask=torch.ones(1, len(row))).logits[0].double()
        return sum(float(logits[t - 1].log_softmax(-1)[row[t]]) for t in generation)

    return of


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_deletion_agrees_with_the_reference(family, ties):
    model, ids = sequence(family)
    scores = scores_for(1, ties)
    found = deletion_curve(model, ids, prompt_length=PROMPT, scores=scores)
    values = reference.deletion_values(log_prob(model, ids), ids.tolist(), scores.tolist(), PAD)
    assert found.falls
    np.testing.assert_allclose(found.values, values, atol=1e-4)
    assert [list(group) for group in found.groups] == reference.groups(scores.tolist())
    assert found.rise == pytest.approx(reference.rise_from(values), abs=1e-5)
    assert found.mas() == pytest.approx(reference.mas_from(values, reference.density(scores.tolist())), abs=1e-5)


def test_one_function_per_metric_gives_the_numbers_of_the_curve():
    model, ids = sequence("llama")
    given = {
        "prompt_length": PROMPT,
        "scores": scores_for(2),
        "steps": 7,
        "replacement": 9,
        "generation": Span(31, 40),
    }
    curve = deletion_curve(model, ids, **given)
    assert rise(model, ids, **given) == curve.rise
    assert mas(model, ids, exponent=2.0, **given) == curve.mas(2.0) != curve.mas()
    values = reference.deletion_values(log_prob(model, ids, Span(31, 40)), ids.tolist(), scores_for(2).tolist(), 9, 7)
    np.testing.assert_allclose(curve.values, values, atol=1e-4)


def test_exponent_is_a_power_of_the_scores():
    model, ids = sequence("llama")
    scores = scores_for(3)
    plain = deletion_curve(model, ids, prompt_length=PROMPT, scores=scores)
    squared = deletion_curve(model, ids, prompt_length=PROMPT, scores=scores.double() ** 2)
    assert plain.mas(2) == pytest.approx(squared.mas(), abs=1e-9)
    assert plain.rise == squared.rise


@pytest.mark.parametrize("batch_size", [1, 4, 21, 100])
def test_batches_do_not_change_the_values(batch_size):
    model, ids = sequence("qwen3")
    whole = deletion_curve(model, ids, prompt_length=PROMPT, scores=scores_for(4))
    parts = deletion_curve(model, ids[None], prompt_length=PROMPT, scores=scores_for(4), batch_size=batch_size)
    torch.testing.assert_close(parts.values, whole.values, atol=1e-4, rtol=0)


def test_fewer_tokens_than_steps_are_deleted_one_by_one():
    model, ids = sequence("gpt2")
    curve = deletion_curve(model, ids, prompt_length=3, scores=[0.2, 0.9, 0.2])
    assert curve.groups == ((1,), (0,), (2,)) and len(curve.values) == 4


def test_likelihood_leaves_the_dtype_behind():
    """The float32 log-softmax of a bfloat16 model's logits, not its bfloat16 log-softmax."""
    model = tiny("llama", dtype=torch.bfloat16)
    _, ids = sequence("llama")
    found = log_likelihood(model, ids[None], generation=GENERATION)
    assert float(found) == pytest.approx(log_prob(model, ids)(ids.tolist()), abs=1e-4)
    assert found.dtype == torch.float64


def curve_of(values, scores) -> DeletionCurve:
    groups = tuple((i,) for i in reference.ranking(scores))
    return DeletionCurve(torch.tensor(values, dtype=torch.float64), groups, torch.tensor(scores).double(), PAD)


def test_two_tokens_by_hand():
    # values 0, -1, -4 -> curve 1, .75, 0; density 1, .5, 0; penalised 1, 1, 0; the fall is 0, 1, 4
    curve = curve_of([0.0, -1.0, -4.0], [1.0, 1.0])
    assert curve.curve.tolist() == [1, 0.75, 0]
    assert curve.rise == pytest.approx(0.625) and curve.mas() == pytest.approx(0.75)
    assert curve.aopc == pytest.approx(5 / 3)


def test_curves_that_do_not_fall():
    flat, rising = curve_of([-3.0, -3.0, -3.0], [2.0, 1.0]), curve_of([-3.0, -2.0, -1.0], [2.0, 1.0])
    assert not flat.falls and flat.rise == 1
    assert not rising.falls and rising.rise == 0


def test_scores_without_mass_have_a_straight_density():
    assert curve_of([0.0, -1.0, -4.0], [0.0, 0.0]).density().tolist() == [1, 0.5, 0]


@given(st.lists(st.floats(-50, 0, width=16), min_size=3, max_size=21), st.data())
def test_areas_agree_with_the_reference_and_stay_in_bounds(values, data):
    n = len(values) - 1
    scores = data.draw(st.lists(floats, min_size=n, max_size=n))
    curve = curve_of(values, scores)
    assert curve.rise == pytest.approx(reference.rise_from(np.array(values)), abs=1e-9)
    assert curve.mas() == pytest.approx(reference.mas_from(np.array(values), density_of(scores)), abs=1e-6)
    assert 0 <= curve.rise <= 1 and 0 <= curve.mas() <= 1 and 0 <= curve.mas(3) <= 1


def density_of(scores):
    return reference.density(scores, steps=len(scores))


@given(levels, st.data())
def test_recovery_agrees_with_the_reference_and_ignores_monotone_maps(scores, data):
    gold = data.draw(st.sets(st.integers(0, len(scores) - 1), min_size=1))
    fraction = data.draw(st.sampled_from([0.05, 0.1, 0.25, 0.5, 1.0]))
    found = recovery(scores, gold, fraction=fraction)
    assert found == reference.recovery_rate(scores, gold, fraction)
    assert 0 <= found <= 1
    assert found == recovery([3 * math.exp(s / 4) - 7 for s in scores], gold, fraction=fraction)
    assert recovery(scores, gold, fraction=1) == 1


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=PROMPT, max_size=PROMPT))
def test_rise_ignores_monotone_maps(scores):
    model, ids = sequence("llama")
    first = deletion_curve(model, ids, prompt_length=PROMPT, scores=scores)
    second = deletion_curve(model, ids, prompt_length=PROMPT, scores=[s**3 - 100 for s in scores])
    assert first.groups == second.groups and first.rise == second.rise


@given(levels)
def test_ties_rank_in_the_order_of_the_text(scores):
    assert ranking(scores).tolist() == reference.ranking(scores)


def test_a_tenth_is_exact():
    """0.1 * 70 is above 7 in floating point, and its ceiling 8."""
    assert [top_count(0.1, n) for n in range(1, 400)] == [-(-n // 10) for n in range(1, 400)]


def test_recovery_of_spans_and_repeats():
    scores = torch.zeros(70)
    scores[[3, 4, 50]] = torch.tensor([3.0, 2.0, 1.0])
    assert recovery(scores, Span(3, 5)) == 1 and recovery(scores, [3, 3, 69]) == 0.5
    assert f1(scores, Span(3, 5)) == pytest.approx(2 * 2 / (7 + 2))


@given(st.lists(floats, min_size=6, max_size=30))
def test_dsa_agrees_with_the_reference_and_stays_in_bounds(scores):
    evidence, other, segment = [0, 1], range(3, len(scores)), [0, 1, 2]
    found = dsa(scores, evidence, other, evidence_segment=segment)
    assert found == pytest.approx(reference.dsa(scores, evidence, other, segment), abs=1e-9)
    assert -1 <= found <= 1
    assert dsa(scores, evidence, other) == pytest.approx(reference.dsa(scores, evidence, other, evidence), abs=1e-9)


def test_evaluate_takes_an_attribution():
    model, ids = sequence("llama")
    attribution = FlashTrace(model).attribute_ids(ids, prompt_length=PROMPT, target=Span(38, LENGTH))
    found = evaluate(model, attribution, gold=[1, 2], exponent=2.0)
    assert found.recovery == recovery(attribution, [1, 2])
    assert found.rise == rise(model, ids, prompt_length=PROMPT, scores=attribution)
    assert found.mas == mas(model, ids, prompt_length=PROMPT, scores=attribution, exponent=2.0)
    assert found.mas_exponent == 2 and evaluate(model, attribution).recovery is None
    with pytest.raises(InputError, match="another sequence"):
        rise(model, ids.flip(0), prompt_length=PROMPT, scores=attribution)


# Soft metrics


def soft_reference(model, ids, scores, samples, seed):
    """Written from the formula: embeddings multiplied in float64 numpy, distances by a loop over positions."""
    table = model.get_input_embeddings().weight.detach().double().numpy()
    low, high = float(scores.min()), float(scores.max())
    keep = (scores.double().numpy() - low) / (high - low)

    def distributions(mask):
        embedded = table[ids.numpy()].copy()
        embedded[:PROMPT] *= mask
        with torch.no_grad():
            logits = model(inputs_embeds=torch.tensor(embedded[None]).float()).logits[0].double()
        return [logits[t - 1].softmax(-1).numpy() for t in range(PROMPT, LENGTH)]

    def distance(mask):
        pairs = zip(original, distributions(mask), strict=True)
        return np.mean([np.sqrt(((np.sqrt(p) - np.sqrt(q)) ** 2).sum() / 2) for p, q in pairs])

    original = distributions(1.0)
    zero, kept, dropped = distance(0.0), [], []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        uniform = torch.rand(PROMPT, table.shape[1], generator=generator).numpy()
        torch.rand(PROMPT, generator=generator)
        kept.append(distance(uniform < keep[:, None].astype(np.float32)))
        dropped.append(distance(uniform >= keep[:, None].astype(np.float32)))
    return np.mean(dropped) / zero, max(0.0, zero - np.mean(kept)) / zero


def test_soft_metrics_agree_with_the_formula():
    model, ids = sequence("llama")
    found = soft_faithfulness(model, ids, prompt_length=PROMPT, scores=scores_for(6), samples=3, seed=8)
    nc, ns = soft_reference(model, ids, scores_for(6), 3, 8)
    assert found.nc == pytest.approx(nc, abs=1e-4) and found.ns == pytest.approx(ns, abs=1e-4)
    assert found.relative_nc == found.nc / found.random_nc
    assert found == soft_faithfulness(model, ids, prompt_length=PROMPT, scores=scores_for(6), samples=3, seed=8)


def test_soft_metrics_of_certain_scores():
    """Scores of exactly 0 and 1 leave nothing to chance: keeping and dropping change places with the scores."""
    model, ids = sequence("gpt2")
    scores = (scores_for(7) > 0.5).float()
    first = soft_faithfulness(model, ids, prompt_length=PROMPT, scores=scores, samples=2)
    second = soft_faithfulness(model, ids, prompt_length=PROMPT, scores=1 - scores, samples=1)
    assert first.ns == pytest.approx(max(0.0, 1 - second.nc), abs=1e-6)


def test_soft_metrics_refuse_a_generation_that_ignores_the_prompt():
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(InputError, match="does not depend on the prompt"):
        soft_faithfulness(
            model, random_ids(12), prompt_length=8, scores=torch.arange(8), generation=Span(9, 12), samples=1
        )


# Stability


def test_sensitivity_is_the_spread_of_the_scores():
    model, ids = sequence("llama")
    embedding = model.get_input_embeddings()

    def norms():
        return embedding(ids[None])[0, :PROMPT].norm(dim=-1)

    found = sensitivity(norms, model, delta=0.3, samples=4, seed=2)
    rows = []
    for sample in range(4):
        generator = torch.Generator().manual_seed(2 + sample)
        noise = torch.stack([torch.randn(32, generator=generator) for _ in range(PROMPT)])
        rows.append((embedding.weight[ids[:PROMPT]] + 0.3 * noise).norm(dim=-1).detach().numpy())
    assert found == pytest.approx(np.std(rows, axis=0, ddof=1).mean(), rel=1e-5)
    assert not embedding._forward_hooks


def test_sensitivity_of_an_attribution():
    model, ids = sequence("llama")
    method = FlashTrace(model)

    def attribute():
        return method.attribute_ids(ids, prompt_length=PROMPT, target=Span(38, LENGTH))

    assert sensitivity(attribute, model, delta=0.0, samples=2) == 0
    assert sensitivity(attribute, model, delta=0.1, samples=2) > 0
    with pytest.raises(ZeroDivisionError):
        sensitivity(lambda: [1 / 0], model, delta=0.1)
    assert not model.get_input_embeddings()._forward_hooks


def test_robustness_is_a_rank_correlation():
    assert robustness([1, 2, 3], [10, 20, 40]) == pytest.approx(1)
    assert robustness([1, 2, 3, 9], [5, 3, 1], alignment=[(0, 0), (1, 1), (2, 2)]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5 over sqrt(4.5 * 5)
    assert robustness([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(22.5))


# Uncertainty


def test_bootstrap():
    values = np.random.default_rng(1).normal(2.0, 1.0, 50)
    found = bootstrap(values, resamples=2000)
    assert found.mean == pytest.approx(values.mean()) and found.n == 50
    standard_error = values.std(ddof=1) / math.sqrt(50)
    assert found.high - found.low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    assert found == bootstrap(values, resamples=2000) != bootstrap(values, resamples=2000, seed=1)
    wide = bootstrap(values, resamples=2000, confidence=0.99)
    assert wide.low < found.low < found.mean < found.high < wide.high
    assert str(bootstrap([0.5, 0.5])) == "0.500 [0.500, 0.500], n = 2"


def test_bootstrap_of_one_sample_has_no_interval():
    found = bootstrap([0.25])
    assert found.mean == 0.25 and found.n == 1 and math.isnan(found.low) and math.isnan(found.high)


# Refusals

CURVE_ERRORS = [
    ({"scores": torch.rand(5)}, InputError, "5 scores for 30 prompt tokens"),
    ({"scores": torch.rand(2, 15)}, InputError, r"\[2, 15\]"),
    ({"scores": torch.full((PROMPT,), float("nan"))}, InputError, "prompt token 0 is nan"),
    ({"prompt_length": 0}, SpanError, "0 of 42 tokens"),
    ({"prompt_length": LENGTH}, SpanError, "42 of 42 tokens"),
    ({"generation": Span(10, 35)}, SpanError, "10:35 is outside 30:42"),
    ({"generation": Span(35, 43)}, SpanError, "35:43 is outside 30:42"),
    ({"steps": 0}, InputError, "at least 1, got 0"),
    ({"replacement": VOCAB_SIZE}, InputError, "512 is outside the vocabulary 0..511"),
    ({"batch_size": 0}, InputError, "at least 1, got 0"),
    ({"input_ids": torch.tensor([5, 600])}, InputError, "600 is outside the vocabulary"),
    ({"input_ids": torch.rand(LENGTH)}, InputError, "integers"),
]


@pytest.mark.parametrize("change, error, message", CURVE_ERRORS)
def test_deletion_refuses(change, error, message):
    model, ids = sequence("llama")
    arguments = {"input_ids": ids, "prompt_length": PROMPT, "scores": scores_for(0)} | change
    with pytest.raises(error, match=message):
        deletion_curve(model, **arguments)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: recovery([1.0, 2.0], []), SpanError, "gold is empty"),
        (lambda: recovery([1.0, 2.0], [2]), SpanError, r"gold position 2 is outside the prompt.*0\.\.1"),
        (lambda: recovery([1.0, 2.0], [-1]), SpanError, "gold position -1"),
        (lambda: recovery([], [0]), InputError, "prompt_length"),
        (lambda: recovery([1.0, math.inf], [0]), InputError, "prompt token 1 is inf"),
        (lambda: recovery([1.0], [0], fraction=0), InputError, "above 0 and at most 1, got 0"),
        (lambda: f1([1.0], [0], fraction=1.5), InputError, "got 1.5"),
        (lambda: dsa([1.0, -2.0], [0], [1]), InputError, "prompt token 1 is -2"),
        (lambda: dsa([1.0, 2.0], [0], [0, 1]), SpanError, "position 0 is both"),
        (lambda: dsa([1.0, 2.0, 3.0], [0], [1], evidence_segment=[2]), SpanError, "outside evidence_segment"),
        (lambda: curve_of([0, -1.0, -2.0], [1.0, -1.0]).mas(2), InputError, "scores >= 0"),
        (lambda: curve_of([0, -1.0, -2.0], [1.0, 1.0]).mas(0), InputError, "above 0, got 0"),
        (lambda: bootstrap([]), InputError, "at least one"),
        (lambda: bootstrap([1.0, math.nan]), InputError, "1 of 2 values"),
        (lambda: bootstrap([1.0], confidence=1.0), InputError, "below 1, got 1.0"),
        (lambda: bootstrap([1.0], resamples=0), InputError, "got 0"),
        (lambda: robustness([1.0, 2.0], [1.0]), InputError, "alignment="),
        (lambda: robustness([1.0, 1.0], [1.0, 2.0]), InputError, "first prompt are all 1"),
        (lambda: robustness([1.0, 2.0], [1.0, 2.0], alignment=[(0, 0), (1, 2)]), SpanError, "position 2"),
        (lambda: robustness([1.0], [1.0]), InputError, "at least 2"),
        (lambda: sensitivity(list, tiny("llama"), delta=0.1, samples=1), InputError, "at least 2"),
        (lambda: sensitivity(list, tiny("llama"), delta=-1.0), InputError, "got -1.0"),
        (
            lambda: rise(torch.nn.Linear(2, 2), torch.ones(3), prompt_length=1, scores=[1]),
            UnsupportedModelError,
            "Linear",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_likelihood_refuses_what_cannot_be_predicted_or_is_not_finite():
    model, ids = sequence("llama")
    with pytest.raises(SpanError, match="must lie in 1:42"):
        log_likelihood(model, ids[None], generation=Span(0, 3))
    broken = tiny("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="log P of the generation is nan for variant 0 of 1"):
        log_likelihood(broken, ids[None], generation=Span(3, 5))


def test_replacement_token():
    model = tiny("gpt2")
    assert replacement_token(model) == PAD and replacement_token(model, 7) == 7
    model.config.pad_token_id = None
    assert replacement_token(model) == EOS
    model.config.eos_token_id = [8, 9]
    assert replacement_token(model) == 8
    model.config.eos_token_id = None
    with pytest.raises(InputError, match="replacement="):
        replacement_token(model)


def test_the_model_is_left_as_it_was_found():
    model = tiny("gpt2", resid_pdrop=0.5).train()
    model.transformer.h[1].eval()
    before = [m.training for m in model.modules()]
    weight = model.get_input_embeddings().weight
    weight.grad = torch.ones_like(weight)
    _, ids = sequence("gpt2")
    found = deletion_curve(model, ids, prompt_length=PROMPT, scores=scores_for(0))
    soft_faithfulness(model, ids, prompt_length=PROMPT, scores=scores_for(0), samples=1)
    again = deletion_curve(model, ids, prompt_length=PROMPT, scores=scores_for(0))
    assert torch.equal(found.values, again.values), "dropout was on"
    assert [m.training for m in model.modules()] == before and torch.is_grad_enabled()
    assert torch.equal(weight.grad, torch.ones_like(weight)) and weight.requires_grad

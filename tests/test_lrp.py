"""LRP: the numbers of the dense reference, its options, its proof, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from flashtrace_plugin import LRP, InputError, Span
from tests.reference import relevance as reference
from tests.tiny import random_ids, tiny, tiny_tokenizer

FAMILIES = [
    *("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma2", "gemma3_text"),
    *("mixtral", "granite", "cohere", "phi", "olmo2", "gpt_oss", "mistral"),
]
IDS = random_ids(40, seed=4)
PROMPT, REASONING, TARGET = 14, Span(17, 29), Span(31, 36)
SPANS = {"prompt_length": PROMPT, "target": TARGET, "reasoning": REASONING}


def theirs(model, hops=2, **options):
    spans = (TARGET.start, TARGET.stop), (REASONING.start, REASONING.stop)
    defaults = {"rule": "cp", "objective": "logit", "mass": "absolute"}
    return reference.recursive(model, IDS, PROMPT, *spans, hops, **(defaults | options))


def close(ours, expected, rtol=1e-4):
    torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("rule", ["cp", "attn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recursed_relevance_is_the_dense_references(family, rule):
    model = tiny(family, seed=3)
    found = LRP(model, rule=rule, hops=2).attribute_ids(IDS, **SPANS)
    expected = theirs(model, rule=rule)
    for name in ("scores", "hop_scores", "reasoning_mass"):
        close(getattr(found, name), expected[name])
    assert found.closure_error < 2e-5


@pytest.mark.parametrize("objective", ["centered", "log_probability"])
@pytest.mark.parametrize(("reading", "mass"), [("embeddings", "positive"), ("layers", "positive")])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_objectives_and_readings_are_the_references(family, objective, reading, mass):
    model = tiny(family, seed=3)
    options = {"objective": objective, "reading": reading, "mass": mass}
    close(LRP(model, hops=2, **options).attribute_ids(IDS, **SPANS).hop_scores, theirs(model, **options)["hop_scores"])


def test_what_is_recomputed_is_what_was_kept():
    model = tiny("qwen3", seed=3)
    kept = LRP(model, hops=3, rule="attn", reading="layers").attribute_ids(IDS, **SPANS)
    again = LRP(model, hops=3, rule="attn", reading="layers", memory_budget=0).attribute_ids(IDS, **SPANS)
    torch.testing.assert_close(again.hop_scores, kept.hop_scores, rtol=1e-5, atol=1e-7)


def test_signs_are_kept_and_add_up_to_the_objective():
    model = tiny("qwen2", seed=3)
    found = LRP(model).attribute_ids(IDS, **SPANS)
    signed, facts = found.components["relevance"], found.settings
    assert signed.shape == (40,) and bool((signed < 0).any())
    with torch.no_grad():
        logits = model(IDS[None]).logits[0]
    value = sum(float(logits[j - 1, IDS[j]]) for j in TARGET)
    assert facts["objective_value"] == pytest.approx(value, rel=1e-4)
    total = float(signed.sum()) + facts["bias_share"] + facts["position_share"]
    assert total == pytest.approx(value, rel=1e-3)
    assert facts["bias_share"] != 0 and facts["conservation_gap"] < 1e-5
    close(found.hop_scores[0], signed.double().abs() / signed.double().abs().sum())


def test_learned_positions_have_a_share_of_their_own():
    found = LRP(tiny("gpt2", seed=3)).attribute_ids(IDS, **SPANS)
    assert abs(found.settings["position_share"]) > 1e-3


def test_why_this_and_not_that():
    model = tiny("llama", seed=3)
    foil = int(IDS[TARGET.start]) % 400 + 5
    found = LRP(model, objective="contrast", against=foil, hops=1).attribute_ids(IDS, **SPANS)
    weights = torch.zeros(40, dtype=torch.float64).index_fill(0, torch.tensor([TARGET.start]), 1.0)
    expected = reference.relevance(model, IDS, weights, rule="cp", objective="contrast", foil=foil)
    close(found.components["relevance"], expected.embedding)
    swapped = LRP(model, objective="contrast", against=foil, hops=0).attribute_ids(IDS, **SPANS)
    assert torch.equal(swapped.hop_scores[0], found.hop_scores[0])


def test_a_text_is_contrasted_where_it_first_differs():
    tokenizer = tiny_tokenizer()
    model = tiny("llama", seed=3)
    prompt, generation = "Where is the key?", " <think>a</think> In the garden"
    method = LRP(model, tokenizer, objective="contrast", against="In the kitchen")
    found = method.attribute(prompt, generation, target="In the garden")
    own = list(found.token_ids[found.target.slice])
    before = " " * tokenizer.decode(own).startswith(" ")
    other = tokenizer(before + "In the kitchen", add_special_tokens=False)["input_ids"]
    first = next(i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b)
    assert first > 0
    alone = LRP(model, objective="contrast", against=other[first]).attribute_ids(
        torch.tensor(found.token_ids),
        prompt_length=found.prompt.stop,
        target=Span(found.target.start + first, found.target.start + first + 1),
        reasoning=found.reasoning,
    )
    close(found.components["relevance"], alone.components["relevance"].double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "contrast"}, "objective='contrast' and against=... go together"),
        ({"against": 3}, "objective='contrast' and against=... go together"),
        ({"rule": "lrp"}, "rule must be one of 'cp', 'attn'"),
        ({"reading": "logits"}, "reading must be one of"),
        ({"memory_budget": -1}, "memory_budget must be a whole number >= 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        LRP(tiny("llama"), **options)


@pytest.mark.parametrize(
    ("against", "message"),
    [(512, "outside the vocabulary 0..511"), (-7, "outside the vocabulary"), (int(IDS[31]), "nothing to contrast")],
)
def test_foils_that_cannot_be(against, message):
    with pytest.raises(InputError, match=message):
        LRP(tiny("llama"), objective="contrast", against=against).attribute_ids(IDS, **SPANS)


def test_the_model_is_left_as_it_was():
    model = tiny("llama").train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    before = dict(model.named_parameters())
    with torch.inference_mode():
        LRP(model, rule="attn").attribute_ids(IDS, **SPANS)
    assert model.training and all(p.requires_grad and p.grad is None for p in before.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype):
    exact = LRP(tiny("llama", seed=3), hops=1).attribute_ids(IDS, **SPANS)
    half = LRP(tiny("llama", seed=3, dtype=dtype), hops=1).attribute_ids(IDS, **SPANS)
    assert half.scores.dtype == torch.float32
    assert float((half.scores - exact.scores).abs().sum() / exact.scores.sum()) < 0.2

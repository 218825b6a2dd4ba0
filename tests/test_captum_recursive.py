"""Recursion for Captum's methods: the numbers by hand, what is taken and refused, and a model left alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("captum")

from captum.attr import (
    DeepLift,
    FeatureAblation,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    NoiseTunnel,
    Occlusion,
    Saliency,
    ShapleyValueSampling,
)

from flashtrace_captum import (
    IFR,
    CaptumInputError,
    FlashTrace,
    LLMTraceAttribution,
    RecursiveTokens,
    TokenIdsInput,
    recursive,
)
from flashtrace_plugin import InputError, Recursive, RecursiveAttribution, Span, UnsupportedModelError
from tests.tiny import PAD, random_ids, tiny, tiny_tokenizer

PROMPT, REASONING, TARGET, LENGTH = 9, slice(9, 17), slice(18, 21), 23
WHERE = {"target": TARGET, "reasoning": REASONING}
SPANS = {"prompt_length": PROMPT, "target": Span(18, 21), "reasoning": Span(9, 17)}
EVERY = torch.arange(1, LENGTH)


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3")


@pytest.fixture(scope="module")
def ids():
    return random_ids(LENGTH, seed=3)[None]


def log_p(model, **inputs):
    return model(**inputs).logits[0, -1].log_softmax(-1)


def gradients(model, ids):
    """Embedding and gradient of log P of every token by those before it: two lists of [i, d]."""
    found = []
    for i in range(1, LENGTH):
        embedded = model.get_input_embeddings()(ids[:, :i]).detach().requires_grad_()
        found.append(
            (embedded[0], torch.autograd.grad(log_p(model, inputs_embeds=embedded)[ids[0, i]], embedded)[0][0])
        )
    return found


def ablated(model, ids, i):
    """The fall of log P of token i when each token before it is replaced by padding, [i]."""
    rows = ids[:, :i].repeat(i + 1, 1)
    rows[torch.arange(i) + 1, torch.arange(i)] = PAD
    found = model(input_ids=rows).logits[:, -1].log_softmax(-1)[:, ids[0, i]]
    return found[0] - found[1:]


def matrix(rows):
    """Rows [1], [2], … as [N, N], with none for the first token."""
    return torch.stack([torch.zeros(LENGTH)] + [torch.nn.functional.pad(r, (0, LENGTH - len(r))) for r in rows])


def by_hand(name, model, ids):
    if name in ("Occlusion", "FeatureAblation"):
        with torch.no_grad():
            return matrix([ablated(model, ids, i) for i in range(1, LENGTH)])
    if name == "Saliency":
        return matrix([g.abs().sum(-1) for _, g in gradients(model, ids)])
    return matrix([(x * g).sum(-1).detach() for x, g in gradients(model, ids)])


@pytest.mark.parametrize("kind", [Saliency, InputXGradient, FeatureAblation, Occlusion])
@pytest.mark.parametrize("hops", [2, "auto", float("inf")])
def test_a_method_is_its_matrix_by_hand_through_the_recursion(model, ids, kind, hops):
    expected = Recursive(by_hand(kind.__name__, model, ids), hops=hops).attribute_ids(ids, **SPANS)
    made = recursive(kind(model), hops=hops)
    assert isinstance(made, RecursiveTokens) and made.get_name() == "Recursive Tokens"
    got = made.attribute(ids, **WHERE)
    torch.testing.assert_close(got[0, : TARGET.start], expected.totals[: TARGET.start], rtol=1e-3, atol=1e-5)
    assert bool((got[0, TARGET.start :] == 0).all())


def test_the_positive_part_and_what_is_followed(model, ids):
    hand = by_hand("InputXGradient", model, ids)
    options = {"mass": "positive", "recursion": "generation", "hops": 3}
    expected = Recursive(hand, **options).attribute_ids(ids, **SPANS)
    got = recursive(InputXGradient(model), **options).attribute(ids, **WHERE)
    torch.testing.assert_close(got[0, : TARGET.start], expected.totals[: TARGET.start], rtol=1e-3, atol=1e-5)


def test_a_layer_and_its_embeddings_say_the_same(model, ids):
    layer = LayerIntegratedGradients(model, model.get_input_embeddings())
    options = {"n_steps": 5, "baselines": PAD}
    a = recursive(IntegratedGradients(model)).rows(ids[0], EVERY, **options)
    torch.testing.assert_close(recursive(layer).rows(ids[0], EVERY, **options), a)
    torch.testing.assert_close(recursive(layer).rows(ids[0], EVERY, n_steps=5), a)
    assert layer.forward_func is model, "the method is left as it was"


def test_rows_of_shapley_values_add_up(model, ids):
    found = recursive(ShapleyValueSampling(model)).rows(ids[0], torch.tensor([12]), n_samples=2)[0]
    with torch.no_grad():
        whole, none = (log_p(model, input_ids=x)[ids[0, 12]] for x in (ids[:, :12], torch.full((1, 12), PAD)))
    torch.testing.assert_close(found.sum(), whole - none, rtol=1e-4, atol=1e-4)


def test_gradient_shap_takes_a_token_as_its_baseline(model, ids):
    got = recursive(GradientShap(model)).attribute(ids, **WHERE, baselines=PAD, n_samples=2)
    assert bool((got[0, :PROMPT] > 0).all())


def test_a_method_of_this_package_token_by_token_is_the_exhaustive_recursion(model, ids):
    expected = RecursiveAttribution(model, hops=2, positions="predicting").attribute_ids(ids, **SPANS)
    for base in (IFR(model, positions="predicting"), FlashTrace(model, positions="predicting")):
        got = recursive(base, hops=2).attribute(ids, **WHERE)
        torch.testing.assert_close(got[0, :PROMPT], expected.scores, rtol=1e-4, atol=1e-6)


def test_a_callable_of_ones_own(model, ids):
    def nearness(input_ids, position, power=1):
        return torch.arange(1.0, position + 1) ** power

    hand = matrix([torch.arange(1.0, i + 1) ** 2 for i in range(1, LENGTH)])
    got = recursive(nearness, model=model, hops=2).attribute(ids, **WHERE, power=2)
    expected = Recursive(hand, hops=2).attribute_ids(ids, **SPANS)
    torch.testing.assert_close(got[0, :PROMPT], expected.scores)
    with pytest.raises(UnsupportedModelError, match="expected a Hugging Face causal language model, got NoneType"):
        recursive(nearness)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda ids, i: torch.ones(i + 1), r"the base gave \[10\] for the token at position 9"),
        (lambda ids, i: [1.0] * i, "the base gave list for the token at position 9"),
        (lambda ids, i: torch.full((i,), torch.nan), "scores of token 9 are not finite"),
        (lambda ids, i: torch.zeros(i), "no importance in the row of token 9"),
    ],
)
def test_bases_whose_scores_cannot_be_used(model, ids, base, message):
    with pytest.raises(InputError, match=message):
        recursive(base, model=model).attribute(ids, **WHERE)


def test_methods_that_are_refused(model):
    tokenizer = tiny_tokenizer()
    layer = LayerIntegratedGradients(model, model.get_input_embeddings())
    for wrapper in (LLMAttribution(FeatureAblation(model), tokenizer), LLMGradientAttribution(layer, tokenizer)):
        with pytest.raises(CaptumInputError, match="scores the prompt only: its token_attr has no column"):
            recursive(wrapper)
    with pytest.raises(CaptumInputError, match="DeepLift puts hooks on the modules"):
        recursive(DeepLift(model))
    with pytest.raises(CaptumInputError, match="NoiseTunnel is not known to score tokens"):
        recursive(NoiseTunnel(Saliency(model)))
    with pytest.raises(CaptumInputError, match="str is not known to score tokens"):
        recursive("saliency")
    with pytest.raises(UnsupportedModelError, match="got function"):
        recursive(Saliency(lambda x: x))
    with pytest.raises(InputError, match="hops must be"):
        recursive(Saliency(model), hops=-1)


def test_the_wrapper_for_texts(model):
    tokenizer = tiny_tokenizer()
    prompt = tokenizer("The key of the red box is in the garden. Question: where is the key?")["input_ids"]
    made = recursive(Saliency(model), tokenizer, hops="auto")
    response = "<think>\nThe box is red.\n</think>\nIt is in the garden."
    result = LLMTraceAttribution(made, tokenizer).attribute(TokenIdsInput(prompt, tokenizer), response)
    assert result.answer_text == "It is in the garden." and result.hop_attr is not None
    torch.testing.assert_close(result.seq_attr, result.attribution.scores)
    assert result.attribution.settings["base"] == "Saliency"


def test_batches_and_masks(model, ids):
    made = recursive(InputXGradient(model), hops=1)
    alone = made.attribute(ids, **WHERE)
    padded = torch.cat([torch.full((1, 2), PAD), ids], dim=1)
    mask = (torch.arange(LENGTH + 2) >= 2)[None]
    got = made.attribute(padded, target=slice(20, 23), additional_forward_args=mask, reasoning=slice(11, 19))
    torch.testing.assert_close(got[:, 2:], alone, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was(ids):
    model = tiny("qwen3").train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        recursive(InputXGradient(model), hops=1).attribute(ids, **WHERE)
        recursive(LayerIntegratedGradients(model, model.get_input_embeddings())).attribute(ids, **WHERE, n_steps=2)
    assert model.training and not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("made", [Saliency, FeatureAblation, IFR])
def test_options_that_the_base_does_not_know_name_it(model, made):
    ids = random_ids(12, seed=1)[None]
    with pytest.raises(TypeError, match=f"^{made.__name__} has no option strength of attribute; it takes"):
        recursive(made(model)).attribute(ids, target=-1, reasoning=slice(5, 9), strength=2)


def test_options_of_the_recursion_are_not_those_of_attribute(model):
    ids = random_ids(12, seed=1)[None]
    with pytest.raises(TypeError, match=r"hops cannot be changed in attribute; pass it to recursive\(FlashTrace"):
        recursive(FlashTrace(model)).attribute(ids, target=-1, reasoning=slice(5, 9), hops=2)

"""What HETA refuses, how it says so, and that it leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flashtrace_plugin import HETA, InputError, Span, SpanError, UnsupportedModelError
from flashtrace_plugin.models.derive.tails import Tails
from tests.tiny import random_ids, tiny, tiny_tokenizer

IDS = random_ids(10, vocab_size=64)
SHAPE = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 64}
SHAPE |= {"intermediate_size": 12, "num_key_value_heads": 1}


@pytest.fixture
def model():
    """Trainable, in training mode, with gradients and a kernel of its own: all of it has to survive."""
    model = tiny("llama", **SHAPE)
    model.set_attn_implementation("sdpa")
    model.train()
    model.model.norm.eval()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    return model


def state(model):
    return {
        "kernels": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.sum().item() for p in model.parameters()],
        "sum": sum(p.double().sum().item() for p in model.parameters()),
    }


def attribute(model, target=(7, 9), prompt_length=4, ids=IDS, **options):
    heta = HETA(model, **{"probes": 1, "progress": False, **options})
    return heta.attribute_ids(ids, prompt_length=prompt_length, target=Span(*target))


@pytest.mark.parametrize("options", [{}, {"last_layers": 1}, {"curvature": "low_rank", "rank": 2}])
def test_the_model_is_left_as_it_was(model, options):
    before = state(model)
    attribute(model, **options)
    assert state(model) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": -1}, ["beta", ">= 0", "-1"]),
        ({"gamma": -0.5}, ["gamma", ">= 0", "-0.5"]),
        ({"gamma": float("nan")}, ["gamma", ">= 0", "nan"]),
        ({"beta": 0, "gamma": 0}, ["both 0", "curvature=None"]),
        ({"probes": 0}, ["probes", ">= 1", "0"]),
        ({"probes": 1.5}, ["probes", "whole number", "1.5"]),
        ({"rank": 0, "curvature": "low_rank"}, ["rank", ">= 1"]),
        ({"rank": 57, "curvature": "low_rank"}, ["rank 57", "56", "smaller rank"]),
        ({"last_layers": 0}, ["last_layers", ">= 1"]),
        ({"last_layers": 3}, ["last_layers", "2 layers", "3"]),
        ({"window": 0}, ["window", ">= 1"]),
        ({"window": 1}, ["window 1", "target of 2", "at least 2"]),
        ({"window": 4, "overlap": 1.0}, ["overlap", "[0, 1)", "1.0"]),
        ({"gate": "attention"}, ["gate", "'per_head'", "attention"]),
        ({"curvature": "exact"}, ["curvature", "'low_rank'", "exact"]),
        ({"mask": "noise"}, ["mask", "'mean'", "noise"]),
        ({"mask": "token"}, ["mask='token'", "0..63", "mask_token"]),
        ({"mask": "token", "mask_token": 64}, ["0..63", "64"]),
        ({"rescale": "sum"}, ["rescale", "'max'", "sum"]),
        ({"hops": -1}, ["hops", ">= 0", "-1"]),
        ({"memory_budget": 0}, ["memory_budget", ">= 1"]),
    ],
)
def test_options(model, options, words):
    before = state(model)
    with pytest.raises(InputError) as caught:
        attribute(model, **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert state(model) == before


@pytest.mark.parametrize(
    ("target", "prompt_length"),
    [((0, 1), 4), ((3, 6), 4), ((8, 11), 4), ((0, 2), 0)],
)
def test_targets(model, target, prompt_length):
    with pytest.raises(SpanError, match=r"outside the generation|prompt has"):
        attribute(model, target, prompt_length)


def test_reasoning_that_reaches_into_the_prompt(model):
    with pytest.raises(SpanError, match="reasoning 2:5 is outside the generation 4:10"):
        HETA(model).attribute_ids(IDS, prompt_length=4, target=Span(7, 9), reasoning=Span(2, 5))


def test_an_encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        HETA(T5ForConditionalGeneration(T5Config(**shape)))


def test_an_unknown_preset(model):
    with pytest.raises(InputError, match=r"preset must be one of .*'LR\+WIN'.*got 'fast'"):
        HETA.preset(model, None, "fast")


def test_mask_tokens_as_text():
    tokenizer = tiny_tokenizer()
    model = tiny("llama", **SHAPE | {"vocab_size": 512})
    assert HETA(model, tokenizer, mask="token", mask_token="a").mask_token == tokenizer("a")["input_ids"][0]
    assert HETA(model, tokenizer, mask="pad").mask_token == tokenizer.pad_token_id
    assert HETA(model, mask="pad").mask_token == model.config.pad_token_id
    with pytest.raises(InputError, match="is 2 tokens"):
        HETA(model, tokenizer, mask="token", mask_token="zq")


class _Sigmoid(torch.autograd.Function):
    """An activation with a hand-written backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sigmoid()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.sigmoid() * (1 - x.sigmoid())


class _OnceOnly(_Sigmoid):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _Sigmoid.backward(ctx, grad)


class _Raw(_Sigmoid):
    """As fused kernels do it: the backward pass leaves no graph, so its derivative is missing without a word."""

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            return _Sigmoid.backward(ctx, grad)


class _Activation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def with_activation(model, function):
    for layer in model.model.layers:
        layer.mlp.act_fn = _Activation(function)
    return model


@pytest.mark.parametrize("function", [_OnceOnly, _Raw])
def test_a_kernel_without_a_second_derivative(model, function):
    before = state(with_activation(model, function))
    with pytest.raises(UnsupportedModelError, match=r"cannot be differentiated twice.* curvature=None"):
        attribute(model)
    assert state(model) == before
    assert attribute(model, curvature=None).scores.sum() > 0


def test_a_hand_written_kernel_with_a_second_derivative(model):
    found = attribute(with_activation(model, _Sigmoid))
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Sigmoid()
    torch.testing.assert_close(found.scores, attribute(model).scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    found = attribute(tiny("llama", **SHAPE, dtype=dtype))
    exact = attribute(tiny("llama", **SHAPE))
    assert found.scores.dtype == torch.float32 and found.closure_error < 0.05
    torch.testing.assert_close(found.components["gate"], exact.components["gate"], rtol=0.1, atol=0.01)


def test_overflow_of_the_model_in_half_precision():
    model = tiny("llama", **SHAPE, dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight.mul_(6e4)
    with pytest.raises(InputError, match=r"float16; log-softmax and sums are float32.* bfloat16") as caught:
        attribute(model, gate=None)
    assert "not finite" in str(caught.value)


def test_overflow_of_the_curvature_in_half_precision():
    """Gradients that are finite in the logits and infinite at the embeddings."""
    model = tiny("gpt2", **{k: v for k, v in SHAPE.items() if "key_value" not in k}, dtype=torch.float16)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(1e-3)
        model.transformer.wte.weight.mul_(1e-3)
        model.lm_head.weight = nn.Parameter(torch.full_like(model.lm_head.weight, 20).uniform_(-500, 500))
    with pytest.raises(InputError, match=r"curvature overflows in torch\.float16"):
        attribute(model, gate=None)


def scarce(limit: int):
    """Runs as a machine would that holds ``limit`` sequences at a time."""

    def run(self, tails, start, **options):
        if len(tails) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, tails, start, **options)

    original = Tails._run
    return run


def test_a_batch_that_does_not_fit_is_halved(model, monkeypatch):
    plenty = attribute(model)
    monkeypatch.setattr(Tails, "_run", scarce(2))
    with pytest.warns(UserWarning) as said:
        found = attribute(model)
    assert [str(w.message) for w in said] == [
        "out of memory with 7 items in a batch; going on with 3",
        "out of memory with 3 items in a batch; going on with 1",
    ]
    torch.testing.assert_close(found.hop_scores, plenty.hop_scores, rtol=1e-4, atol=1e-6)
    assert found.settings["halved"] == 2 and plenty.settings["halved"] == 0


def test_not_even_one_item_fits(model, monkeypatch):
    before = state(model)
    kept = Tails.__init__

    def build(self, *args, **kwargs):
        kept(self, *args, **kwargs)
        monkeypatch.setattr(Tails, "_run", scarce(0))

    monkeypatch.setattr(Tails, "__init__", build)
    with pytest.raises(InputError, match="even with one item in a batch; shorten the text"):
        attribute(model)
    assert state(model) == before


def test_a_cache_that_is_not_honoured(model, monkeypatch):
    monkeypatch.setattr(Tails, "_prefix", lambda self, stop: None)
    with pytest.raises(UnsupportedModelError, match="when its cache is reused"):
        attribute(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_the_callers_gradient_modes(model, mode):
    expected = attribute(model)
    with mode():
        found = attribute(model)
    assert torch.equal(found.scores, expected.scores)


def test_gated_heads_have_no_value_norm():
    gated, ids = tiny("qwen3_next"), random_ids(10)
    with pytest.raises(UnsupportedModelError, match="in qwen3_next every query gates what its heads read"):
        HETA(gated, curvature=None).attribute_ids(ids, prompt_length=6, target=Span(9, 10))
    found = HETA(gated, curvature=None, gate="uniform").attribute_ids(ids, prompt_length=6, target=Span(9, 10))
    assert found.scores.sum() > 0

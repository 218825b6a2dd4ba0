"""What LRP refuses and in which words, what it takes as it is, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext

import peft
import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from flashtrace_plugin import LRP, ClosureError, InputError, Span, UnsupportedModelError
from tests.tiny import random_ids, tiny

IDS = random_ids(24, seed=5)
SPANS = {"prompt_length": 9, "target": Span(19, 22), "reasoning": Span(11, 17)}
RULES = ["cp", "attn"]
BUDGETS = [0, 1 << 30]
"""Every block run again in the sweep, or kept."""


def attributed(model, **options):
    return LRP(model, **options).attribute_ids(IDS, **SPANS)


def relevance(model, **options):
    return attributed(model, **options).components["relevance"]


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def state(model):
    return {
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
        "values": [p.double().sum().item() for p in model.parameters()],
        "modes": _get_current_function_mode_stack(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


@pytest.fixture(params=RULES)
def rule(request):
    return request.param


@pytest.fixture(params=BUDGETS, ids=["run again", "kept"])
def budget(request):
    return request.param


# ------------------------------------------------------------------------------------------------ what has no gradient


class _NoBackward(torch.autograd.Function):
    """A kernel that gives no backward pass."""

    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.T


class _Linear(torch.autograd.Function):
    """A function of the model's own, linear in x."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


class _Squash(torch.autograd.Function):
    """One that is not linear, with its true derivative."""

    @staticmethod
    def forward(ctx, x, weight):
        y = torch.tanh(x @ weight.T) + 0.5
        ctx.save_for_backward(y, weight)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, weight = ctx.saved_tensors
        return (grad * (1 - (y - 0.5).square())) @ weight, None


class Through(nn.Module):
    """A projection by an autograd function."""

    def __init__(self, linear, function):
        super().__init__()
        self.weight, self.function = linear.weight, function

    def forward(self, x):
        return self.function.apply(x, self.weight)


class Quantised(nn.Module):
    """A projection that keeps integers, and makes its weight of them at each call.

    cut: where gradients end: at the "weight", as they should; at the "output", where a kernel runs under no_grad; at
         the "input", which is made whole numbers, too; or at memory that a kernel fills ("filled")
    """

    def __init__(self, linear, cut):
        super().__init__()
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("whole", (weight / self.scale).round().to(torch.int8))
        self.cut = cut

    @torch.no_grad()
    def dequantised(self):
        return self.whole.to(self.scale.dtype) * self.scale

    def forward(self, x):
        if self.cut == "weight":
            return nn.functional.linear(x, self.dequantised())
        if self.cut == "output":
            with torch.no_grad():
                return nn.functional.linear(x, self.dequantised())
        if self.cut == "filled":
            y = torch.empty(*x.shape[:-1], len(self.whole))
            y.numpy()[:] = x.detach().numpy() @ self.dequantised().numpy().T
            return y
        step = x.detach().abs().amax() / 127
        return nn.functional.linear((x / step).to(torch.int8).float() * step, self.dequantised())


def replaced(model, name, make):
    model.set_submodule(name, make(model.get_submodule(name)))
    return model


PARTS = ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj", "model.layers.2.mlp.up_proj"]


@pytest.mark.parametrize("part", PARTS)
def test_a_kernel_without_a_backward_pass(rule, budget, part):
    model = replaced(tiny("llama", seed=3), part, lambda m: Through(m, _NoBackward))
    with pytest.raises(UnsupportedModelError, match=r"without a backward pass.*_NoBackward.*load it unquantised"):
        attributed(model, rule=rule, memory_budget=budget)


@pytest.mark.parametrize("part", PARTS)
def test_an_autograd_function_of_the_models_own(rule, budget, part):
    model = tiny("llama", seed=3)
    expected = relevance(model, rule=rule)
    close(relevance(replaced(model, part, lambda m: Through(m, _Linear)), rule=rule, memory_budget=budget), expected)
    with pytest.raises(ClosureError, match=r"loses relevance.*functions of its own: .*_Squash"):
        attributed(replaced(model, part, lambda m: Through(m, _Squash)), rule=rule, memory_budget=budget)


@pytest.mark.parametrize("part", PARTS)
def test_quantised_weights_are_what_they_stand_for(rule, budget, part):
    model = replaced(tiny("llama", seed=3), part, lambda m: Quantised(m, "weight"))
    found = relevance(model, rule=rule, memory_budget=budget)
    weight = model.get_submodule(part).dequantised()
    plain = replaced(model, part, lambda m: nn.Linear(*weight.T.shape, bias=False))
    plain.get_submodule(part).weight.data = weight
    close(found, relevance(plain, rule=rule))


@pytest.mark.parametrize("cut", ["output", "input", "filled"])
@pytest.mark.parametrize("part", PARTS)
def test_quantised_weights_without_gradients(rule, budget, part, cut):
    model = replaced(tiny("llama", seed=3), part, lambda m: Quantised(m, cut))
    with pytest.raises(
        UnsupportedModelError, match=r"without gradients.*load it unquantised, with attn_implementation"
    ):
        attributed(model, rule=rule, memory_budget=budget)


def straight_through(x):
    step = x.detach().abs().amax() / 127
    return x + ((x / step).round() * step - x).detach()


@pytest.mark.parametrize(
    "change", [lambda x: x * (x > -1.5).to(x), straight_through, lambda x: x + torch.ones_like(x)]
)
def test_what_is_a_constant_by_the_models_word_is_taken_as_one(rule, budget, change):
    model = tiny("llama", seed=3)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: change(output))
    assert attributed(model, rule=rule, memory_budget=budget).closure_error < 2e-5


def test_proof_is_not_kept_for_a_model_that_was_changed():
    """Rule "attn" proves itself by a short pass under "cp", once per model; here all weights stay what they were."""
    model, layer = tiny("llama", seed=3), "model.layers.1"
    attributed(model, rule="attn")
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: _Power.apply(output))
    with pytest.raises(ClosureError, match="loses relevance"):
        attributed(model, rule="attn")
    handle.remove()
    attributed(model, rule="attn")


class _Power(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def test_weights_made_in_inference_mode(rule):
    with torch.inference_mode():
        model = tiny("llama", seed=3)
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=r"made in torch\.inference_mode.*load the model outside"):
        attributed(model, rule=rule)
    assert state(model) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_mode_does_not_matter(rule, budget, mode):
    model = tiny("llama", seed=3)
    expected = attributed(model, rule=rule, memory_budget=budget)
    with mode():
        before = state(model)
        found = attributed(model, rule=rule, memory_budget=budget)
        assert state(model) == before
    assert torch.equal(found.hop_scores, expected.hop_scores)


# ------------------------------------------------------------------------------------------ tokens, and half precision


def test_a_target_outside_the_vocabulary(rule):
    ids = IDS.clone()
    ids[20] = 512
    with pytest.raises(InputError, match=r"token id 512 is outside the vocabulary 0\.\.511"):
        LRP(tiny("llama"), rule=rule).attribute_ids(ids, **SPANS)


@pytest.mark.parametrize(
    ("against", "reason"),
    [
        (512, r"outside the vocabulary 0\.\.511"),
        (-1, "outside the vocabulary"),
        (int(IDS[19]), "the target itself.*nothing to contrast"),
    ],
)
def test_a_foil_that_is_none(rule, against, reason):
    model = tiny("llama")
    before = state(model)
    with pytest.raises(InputError, match=reason):
        attributed(model, rule=rule, objective="contrast", against=against)
    assert state(model) == before


def overflowing(logits):
    """Float16 whose logits, or whose gradients alone, are beyond 65504."""
    model = tiny("llama", seed=3)
    with torch.no_grad():
        if logits:
            model.lm_head.weight.mul_(1e5)
        else:  # what a norm makes large again has a large derivative
            model.model.embed_tokens.weight.mul_(1e-4)
            model.lm_head.weight.mul_(300)
    return model


@pytest.mark.parametrize("logits", [True, False])
def test_overflow_in_float16(rule, budget, logits):
    model = overflowing(logits)
    assert bool(relevance(copy.deepcopy(model), rule=rule, memory_budget=budget).isfinite().all())
    with pytest.raises(
        InputError, match=r"not finite in torch\.float16.*load the model in bfloat16 or float32"
    ) as error:
        attributed(model.half(), rule=rule, memory_budget=budget)
    assert ("logits" in str(error.value)) == logits


# ------------------------------------------------------------------------------------------- models as users have them


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_lora_is_the_merged_model(rule, budget, options):
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.3, **options
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny("llama", seed=3), config).train()
    before = state(model)
    found = attributed(model, rule=rule, memory_budget=budget, hops=2)
    assert state(model) == before
    merged = copy.deepcopy(model).eval().merge_and_unload()
    expected = attributed(merged, rule=rule, hops=2)
    close(found.components["relevance"], expected.components["relevance"], 1e-4)
    close(found.scores, expected.scores, 1e-4)
    assert (found.scores - attributed(tiny("llama", seed=3), rule=rule, hops=2).scores).abs().max() > 1e-3


def test_training_with_dropout_and_gradients(rule, budget):
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    expected = attributed(tiny("gpt2", seed=3).requires_grad_(False), rule=rule, memory_budget=budget)
    model = tiny("gpt2", seed=3, **dropout).train()
    model.transformer.h[1].eval()
    model.transformer.wte.requires_grad_(False)
    before = state(model)
    found = attributed(model, rule=rule, memory_budget=budget)
    assert torch.equal(found.hop_scores, expected.hop_scores)
    assert state(model) == before


HOOKED = ["model.layers.1", "model.layers.1.mlp", "model.layers.2.self_attn.v_proj", "lm_head", "model.norm"]


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_of_the_user_are_seen_and_kept(rule, budget, name):
    """A hook that doubles what a module gives, and one that doubles what it gets: each counts once."""
    model = tiny("llama", seed=3)
    module, calls = model.get_submodule(name), []

    def after(module, args, output):
        calls.append("after")
        return output * 2 if isinstance(output, torch.Tensor) else (output[0] * 2, *output[1:])

    def before(module, args):
        calls.append("before")
        return (args[0] * 2, *args[1:])

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    kept = state(model)
    found = attributed(model, rule=rule, memory_budget=budget)
    assert {"before", "after"} <= set(calls)
    assert state(model) == kept
    assert list(module._forward_hooks.values()) == [after]
    assert list(module._forward_pre_hooks.values()) == [before]
    for handle in handles:
        handle.remove()
    close(found.components["relevance"], relevance(_doubled(model, name), rule=rule))


class _Doubled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.inner = module

    def __getattr__(self, name):
        return getattr(super().__getattr__("inner"), name) if name != "inner" else super().__getattr__(name)

    def forward(self, x, *args, **kwargs):
        y = self.inner(x * 2, *args, **kwargs)
        return y * 2 if isinstance(y, torch.Tensor) else (y[0] * 2, *y[1:])


def _doubled(model, name):
    """The same without hooks."""
    return replaced(copy.deepcopy(model), name, _Doubled)


@pytest.mark.parametrize("training", [False, True])
def test_two_threads_give_the_same_numbers(rule, budget, training):
    model = tiny("gpt2", seed=3, resid_pdrop=0.5, num_hidden_layers=2)
    expected = attributed(model, rule=rule, memory_budget=budget)
    model.train(training)
    before, found = state(model), []
    start = threading.Barrier(3)

    def run():
        start.wait()
        for _ in range(4):
            try:
                found.append(attributed(model, rule=rule, memory_budget=budget).hop_scores)
            except Exception as error:
                found.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert not [one for one in found if not isinstance(one, torch.Tensor)]
    assert all(torch.equal(one, expected.hop_scores) for one in found)
    assert state(model) == before


# ------------------------------------------------------------------------------------------------ an end in the middle


class _Stop(BaseException):
    """As KeyboardInterrupt, which no handler of ordinary errors sees."""


@pytest.mark.parametrize("error", [ValueError, _Stop])
@pytest.mark.parametrize("call", [1, 2, 3, 5])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_an_end_in_the_middle_leaves_nothing_behind(rule, budget, error, call, mode):
    """In the linearised pass, in the plain one, or where a block is run again."""
    model = tiny("llama", seed=3).train()
    calls = 0

    def fail(module, args, output):
        nonlocal calls
        calls += 1
        if calls == call:
            raise error("in the middle")

    expected = attributed(model, rule=rule, memory_budget=budget)
    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with mode():
        before = state(model)
        try:
            attributed(model, rule=rule, memory_budget=budget)
        except error:
            assert calls == call
        assert state(model) == before
    handle.remove()
    assert torch.equal(attributed(model, rule=rule, memory_budget=budget).hop_scores, expected.hop_scores)


def test_an_end_in_the_backward_pass(rule, budget):
    model = tiny("llama", seed=3)

    def fail(grad):
        raise ValueError("in the sweep")

    def watch(module, args, output):
        if output.requires_grad:
            output.register_hook(fail)

    handle = model.model.layers[1].mlp.register_forward_hook(watch)
    before = state(model)
    with pytest.raises(ValueError, match="in the sweep"):
        attributed(model, rule=rule, memory_budget=budget)
    assert state(model) == before
    handle.remove()
    close(relevance(model, rule=rule), relevance(tiny("llama", seed=3), rule=rule), 1e-6)

"""The linearised model: rule by rule on small functions, then whole models against conservation and the reference."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashtrace_plugin.core.relevance.attention import Masks, frozen_attention, shared_attention
from flashtrace_plugin.core.relevance.rules import Rules
from flashtrace_plugin.errors import ClosureError, InputError, UnsupportedModelError
from flashtrace_plugin.models.derive.relevance import MEMORY_BUDGET, HuggingFace, linearised
from flashtrace_plugin.models.derive.sweep import saved_bytes
from tests.families import NO_LRP
from tests.reference import relevance as reference
from tests.reference.test_relevance_reference import CASES, DoublePrecision, case
from tests.tiny import FAMILIES, random_ids, tiny

N = 40
IDS = random_ids(N)
ROWS = torch.arange(25, 36)
OBJECTIVES = ["logit", "centered", "log_probability", "contrast"]


def weights(*pairs: tuple[int, float]) -> Tensor:
    w = torch.zeros(N)
    for token, weight in pairs or ((30, 1.0), (33, -0.5), (35, 2.0)):
        w[token] = weight
    return w


def relevance(model, *, rule="cp", budget=MEMORY_BUDGET, runner=HuggingFace, w=None, **options):
    with linearised(runner(model), IDS[None], ROWS, rule=rule, memory_budget=budget) as linear:
        return linear.relevance(weights() if w is None else w, **options)


def gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# ------------------------------------------------------------------------------------------------ rules one by one


def linear_part(f, *inputs: Tensor, rule="cp") -> tuple[Tensor, list[Tensor], float]:
    """The value of f, <gradient, input> of every input, and the constants' share, for the sum of its results."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    copies = [leaf.clone() for leaf in leaves]
    mode = Rules(rule)
    with mode:
        y = f(*copies)
    gradients = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
    shares = [x * (torch.zeros_like(x) if g is None else g) for x, g in zip(inputs, gradients)]
    return y.detach(), shares, mode.constants.take()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "relu": F.relu,
    "squared relu": lambda u: torch.square(F.relu(u)),
    "cube": lambda u: u**3,
    "clamp": lambda u: u.clamp(-0.5, 0.5),
    "clamp in place": lambda u: u.clone().clamp_(-0.5, 0.5),
    "gelu in Python": lambda u: 0.5 * u * (1.0 + torch.tanh(0.8 * (u + 0.0447 * torch.pow(u, 3.0)))),
    "bloom's": lambda u: u * 0.5 * (1.0 + torch.tanh(0.8 * u * (1 + 0.0447 * u * u))),
    "exact gelu in Python": lambda u: u * 0.5 * (1.0 + torch.erf(u / 2**0.5)),
    "quick gelu": lambda u: u * torch.sigmoid(1.7 * u),
    "mish in Python": lambda u: u * torch.tanh(F.softplus(u)),
    "expm1": torch.expm1,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_hands_on_all_of_its_value(name):
    u = torch.cat([normal(50), torch.zeros(1)])
    y, (share,), constants = linear_part(ACTIVATIONS[name], u)
    assert torch.allclose(y, ACTIVATIONS[name](u))
    assert torch.allclose(share, y, atol=1e-12)
    assert constants == 0


def test_a_product_gives_half_to_each_factor():
    a, b = normal(5, 4), normal(5, 4, seed=1)
    for f in (lambda a, b: a * b, torch.mul, lambda a, b: a.clone().mul_(b), lambda a, b: a @ b.T, torch.inner):
        y, (to_a, to_b), _ = linear_part(f, a, b)
        assert torch.allclose(y, f(a, b))
        assert torch.allclose(to_a.sum(), y.sum() / 2)
        assert torch.allclose(to_b.sum(), y.sum() / 2)


def test_a_gated_product_keeps_two_tensors_and_gives_half_to_each():
    u, b = normal(7, 6), normal(7, 6, seed=1)
    y, (to_u, to_b), _ = linear_part(lambda u, b: F.silu(u) * b, u, b)
    assert torch.allclose(y, F.silu(u) * b)
    assert torch.allclose(to_u, y / 2)
    assert torch.allclose(to_b, y / 2)
    u, b = u.requires_grad_() * 1, b.requires_grad_() * 1
    with Rules("cp"):
        y = F.silu(u) * b
    assert saved_bytes(y, set()) // (7 * 6 * 8) == 2


def test_scales_and_gates_are_frozen():
    x, g = normal(5, 4), normal(5, 4, seed=1)
    for f in (
        lambda x, g: x * torch.sigmoid(g),
        lambda x, g: x / (1 + g.square()),
        lambda x, g: x * torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda x, g: x * g.softmax(-1),
        lambda x, g: x / (g.norm(dim=-1, keepdim=True) + 1),
    ):
        y, (to_x, to_g), _ = linear_part(f, x, g, rule="attn")
        assert torch.allclose(to_x, y)
        assert not to_g.any()


@pytest.mark.parametrize("gain, bias", [(True, True), (True, False), (False, False)])
def test_norms(gain, bias):
    x, gain, bias = normal(5, 8), normal(8, seed=1) if gain else None, normal(8, seed=2) if bias else None
    y, (share,), constants = linear_part(lambda x: F.layer_norm(x, (8,), gain, bias, 1e-5), x)
    scale = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    weight = scale * (1 if gain is None else gain)
    assert torch.allclose(share, x * (weight - weight.mean(-1, keepdim=True)))
    assert share.sum() + constants == pytest.approx(float(y.sum()))
    y, (share,), _ = linear_part(lambda x: F.rms_norm(x, (8,), gain, 1e-5), x)
    assert torch.allclose(y, F.rms_norm(x, (8,), gain, 1e-5))
    assert torch.allclose(share, y)


def test_what_is_added_is_counted():
    x, c, W, b = normal(3, 5, 4), normal(4, seed=1), normal(6, 4, seed=2), normal(6, seed=3)
    for f in (
        lambda x: x + c,
        lambda x: 2 - x,
        lambda x: x.clone().add_(c, alpha=3),
        lambda x: torch.sub(x, c, alpha=2),
        lambda x: F.linear(x, W, b),
        lambda x: torch.addmm(b, x[0], W.T),
    ):
        y, (share,), constants = linear_part(f, x)
        assert torch.allclose(y, f(x))
        assert share.sum() + constants == pytest.approx(float(y.sum()))


def test_parameters_are_constants_whatever_their_flag():
    linear = nn.Linear(4, 4).double()
    _, (share,), _ = linear_part(linear, normal(3, 4))
    assert share.any()
    assert linear.weight.grad is None
    assert linear.weight.requires_grad


def causal(i: Tensor, j: Tensor) -> Tensor:
    return j <= i


MASKS = {
    "causal": causal,
    "window": lambda i, j: (j <= i) & (j > i - 3),
    "chunks": lambda i, j: (j <= i) & (j // 4 == i // 4),
    "prefix": lambda i, j: (j <= i) | (j < 3),
    "all": lambda i, j: j >= 0,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["bool", "float", "biased"])
@pytest.mark.parametrize("mask", MASKS)
def test_frozen_attention_is_the_transposed_pattern(mask, form, dtype):
    q, k, v = (
        normal(1, 4, 12, 8).to(dtype),
        normal(1, 2, 12, 8, seed=1).to(dtype),
        normal(1, 2, 12, 6, seed=2).to(dtype),
    )
    grad = normal(1, 4, 12, 6, seed=3).to(dtype)
    index = torch.arange(12)
    seen = MASKS[mask](index[:, None], index)[None, None]
    bias = torch.zeros(1, 4, 12, 12, dtype=dtype) if form != "biased" else normal(1, 4, 12, 12, seed=4).to(dtype)
    given = seen if form == "bool" else bias.masked_fill(~seen, torch.finfo(dtype).min)
    options = {"attn_mask": given, "is_causal": False, "enable_gqa": True}
    if mask == "causal" and form == "bool":
        options |= {"attn_mask": None, "is_causal": True}
    v = v.requires_grad_()
    out = frozen_attention(q, k, v, options, Masks())
    (ours,) = torch.autograd.grad(out, v, grad)
    scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5 + (0 if form == "bool" else bias)
    pattern = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    theirs = (pattern.mT @ grad).unflatten(1, (2, 2)).sum(2)
    assert torch.allclose(out, pattern @ v.repeat_interleave(2, 1), atol=1e-5)
    assert torch.allclose(ours, theirs, atol=1e-12 if dtype == torch.float64 else 1e-5)


def test_shared_attention_is_half_and_half():
    q, k, v = (normal(1, 2, 9, n, seed=i).requires_grad_() for i, n in enumerate((8, 8, 6)))
    out = shared_attention(q, k, v, {"is_causal": True})
    ours = torch.autograd.grad(out.square().sum(), (q, k, v))
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum(), (q, k, v))
    for mine, full, part in zip(ours, theirs, (0.25, 0.25, 0.5)):
        assert torch.allclose(mine, part * full)


# ---------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NO_LRP])
def test_every_family_conserves_relevance_kept_or_run_again(family):
    model = tiny(family)
    for rule in ("cp", "attn"):
        with linearised(HuggingFace(model), IDS[None], ROWS, rule=rule) as linear:
            kept = [linear.relevance(weights(), objective=o, foils=5, layers=True) for o in OBJECTIVES]
            assert linear.logit_gap < 1e-5
            assert all(run.y is not None for run in linear.sweep.runs)
        with linearised(HuggingFace(model), IDS[None], ROWS, rule=rule, memory_budget=0) as linear:
            again = [linear.relevance(weights(), objective=o, foils=5, layers=True) for o in OBJECTIVES]
            assert all(run.y is None for run in linear.sweep.runs)
        for one, other in zip(kept, again, strict=True):
            assert one.gap < 1e-5
            assert not one.tokens[36:].any()
            assert gap(other.tokens, one.tokens) < 1e-5
            assert gap(other.layers, one.layers) < 1e-5
            assert other.biases == pytest.approx(one.biases, abs=1e-3)


@pytest.mark.parametrize("rule", ["cp", "attn"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name, rule):
    model, ids = case(name), random_ids(20)
    w = torch.zeros(20, dtype=torch.float64)
    w[12:16], w[18] = torch.linspace(0.5, 2, 4), -1.0
    foils = random_ids(20, seed=1)
    with DoublePrecision(), linearised(HuggingFace(model), ids[None], torch.arange(11, 18), rule=rule) as linear:
        found = {o: linear.relevance(w, objective=o, foils=foils, layers=True) for o in OBJECTIVES}
    for objective, ours in found.items():
        foil = foils if objective == "contrast" else None
        theirs = reference.relevance(model, ids, w, rule=rule, objective=objective, foil=foil)
        assert ours.objective == pytest.approx(theirs.objective, abs=1e-9)
        assert gap(ours.tokens, theirs.embedding) < 1e-9
        assert gap(ours.layers, theirs.layers) < 1e-9
        assert ours.positions == pytest.approx(theirs.positions, abs=1e-9)
        assert ours.biases == pytest.approx(theirs.biases, abs=1e-9)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("rule", ["cp", "attn"])
def test_kernels_agree(family, rule):
    fused, eager = tiny(family), tiny(family, attn_implementation="eager")
    assert gap(relevance(fused, rule=rule).tokens, relevance(eager, rule=rule).tokens) < 1e-5


def test_under_cp_every_layer_holds_all_relevance():
    found = relevance(tiny("llama"), layers=True)
    assert torch.allclose(found.layers.sum(-1), torch.full((3,), found.objective), atol=1e-3)
    assert torch.allclose(found.layers[0], found.tokens, atol=1e-4)


@pytest.mark.parametrize("rule", ["cp", "attn"])
def test_no_pattern_is_kept(rule):
    model, length = tiny("llama", max_position_embeddings=1024), 512
    with linearised(HuggingFace(model), random_ids(length)[None], torch.tensor([length - 1]), rule=rule) as linear:
        linear.relevance_of(torch.ones(1, 512))
        block = linear.sweep.runs[1]
        assert saved_bytes(block.y, {p.data_ptr() for p in block.block.parameters()}) < 4 * length * length


def test_the_head_need_not_be_seen():
    class Headless(HuggingFace):
        def __init__(self, model):
            super().__init__(model)
            self.head = None

    for family in ("gemma2", "opt"):
        model = tiny(family)
        for objective in OBJECTIVES:
            one = relevance(model, objective=objective, foils=5)
            other = relevance(model, objective=objective, foils=5, runner=Headless)
            assert gap(other.tokens, one.tokens) < 1e-5
            assert other.biases == pytest.approx(one.biases, abs=1e-4)


def test_a_seed_on_all_logits():
    model = tiny("granite")
    with linearised(HuggingFace(model), IDS[None], ROWS) as linear:
        seed = torch.zeros_like(linear.logits)
        seed[4, IDS[30]], seed[9, IDS[35]] = 1.0, -2.0
        ours, theirs = linear.relevance_of(seed), linear.relevance(weights((30, 1.0), (35, -2.0)))
        with pytest.raises(InputError, match="one number per logit"):
            linear.relevance_of(seed[1:])
    assert gap(ours.tokens, theirs.tokens) < 1e-5
    assert ours.objective == pytest.approx(theirs.objective)


def test_half_precision_is_summed_in_float32():
    found = relevance(tiny("llama", dtype=torch.bfloat16))
    assert found.tokens.dtype == torch.float32
    assert found.gap < 0.05


def test_a_bridge_gives_the_same():
    pytest.importorskip("transformer_lens")
    from flashtrace_lens import bridge_for
    from flashtrace_lens.relevance import BridgeRunner

    for family in ("llama", "gpt2", "gemma2"):
        model = tiny(family, attn_implementation="eager")
        ours = relevance(bridge_for(model), runner=BridgeRunner, layers=True)
        theirs = relevance(model, layers=True)
        assert gap(ours.tokens, theirs.tokens) < 1e-5
        assert gap(ours.layers, theirs.layers) < 1e-5


# ------------------------------------------------------------------------------------- the model as it was, bad input


@pytest.mark.parametrize("budget", [0, MEMORY_BUDGET])
def test_the_model_is_left_as_it_was(budget):
    model = tiny("llama").train()
    model.model.layers[0].self_attn.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        relevance(model, budget=budget)
        assert not torch.is_grad_enabled()
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


def test_in_inference_mode():
    model = tiny("llama")
    plain = relevance(model)
    with torch.inference_mode():
        found = relevance(model)
        unusable = tiny("llama")
    assert torch.equal(found.tokens, plain.tokens)
    with pytest.raises(UnsupportedModelError, match="can have no backward pass"):
        relevance(unusable)


def test_other_threads_see_the_model_as_it_is():
    model, wrong, done = tiny("llama"), [], threading.Event()
    plain = relevance(model).tokens
    with torch.no_grad():
        logits = model(input_ids=IDS[None]).logits

    def other():
        while not done.is_set():
            seen = model(input_ids=IDS[None]).logits
            wrong.extend(["graph"] * (not seen.requires_grad) + ["logits"] * (not torch.equal(seen, logits)))

    thread = threading.Thread(target=other)
    thread.start()
    try:
        found = [relevance(model, budget=budget).tokens for budget in (0, MEMORY_BUDGET) for _ in range(5)]
    finally:
        done.set()
        thread.join()
    assert not wrong
    assert all(torch.equal(tokens, plain) for tokens in found)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        return torch.relu(u)


class _Bump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return u + torch.exp(-u * u)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad * (1 - 2 * u * torch.exp(-u * u))


class _Own(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, u):
        return self.function.apply(u)


@pytest.mark.parametrize("rule", ["cp", "attn"])
@pytest.mark.parametrize("budget", [0, MEMORY_BUDGET])
@pytest.mark.parametrize(
    "function, error, reason",
    [
        (_NoBackward, UnsupportedModelError, "without a backward pass.*_NoBackward.*load it unquantised"),
        (_Bump, ClosureError, "loses relevance.*_Bump.*bound 1e-04"),
    ],
)
def test_an_unknown_step_is_refused_with_its_name(rule, budget, function, error, reason):
    model = tiny("llama")
    model.model.layers[1].mlp.act_fn = _Own(function)
    with pytest.raises(error, match=reason):
        relevance(model, rule=rule, budget=budget)


def test_a_kernel_without_a_backward_pass():
    model = tiny("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa' or 'eager'"):
        relevance(model)


def test_gradients_that_are_not_finite():
    with pytest.raises(InputError, match=r"not finite in torch\.float16; load the model in bfloat16 or float32"):
        relevance(tiny("llama", dtype=torch.float16), w=1e6 * weights())


def test_logits_that_are_not_finite():
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="logits of LlamaForCausalLM are not finite"):
        relevance(model)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"w": torch.zeros(N)}, "there is no weight at all"),
        ({"w": torch.ones(N)}, "token 0 has none"),
        ({"objective": "contrast"}, "needs foils="),
        ({"objective": "contrast", "foils": 512}, "token id 512 is outside the vocabulary 0..511"),
        ({"objective": "contrast", "foils": int(IDS[30])}, "token 30 is contrasted with itself"),
    ],
)
def test_bad_input(options, reason):
    with pytest.raises(InputError, match=reason):
        relevance(tiny("llama"), **options)


def test_a_text_whose_length_matters_is_checked_whole():
    runner = HuggingFace(tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    assert runner.whole
    assert not HuggingFace(tiny("llama")).whole
    with linearised(runner, random_ids(200)[None], torch.tensor([150])) as linear:
        assert linear.relevance_of(torch.ones(1, 512)).gap < 1e-5
        assert linear.embeddings.shape[1] == 200


def test_nothing_remains_of_the_mode():
    relevance(tiny("llama"))
    x = normal(3).requires_grad_()
    assert torch.equal(torch.autograd.grad(torch.sigmoid(x).sum(), x)[0], torch.sigmoid(x) * (1 - torch.sigmoid(x)))

"""Layers that mix tokens without softmax: what their recurrence reads, hop by hop, and what is refused."""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import replace

import pytest
import torch
import transformers

from flashtrace_plugin import HETA, IFR, ClosureError, FlashTrace, RecursiveAttribution, Span, UnsupportedModelError
from flashtrace_plugin.core.flow.pattern import channel_flow
from flashtrace_plugin.core.hessian.curvature import rademacher
from flashtrace_plugin.models.read import layouts, recurrence
from flashtrace_plugin.models.read.capture import capture
from flashtrace_plugin.models.read.layouts import layout_for, register_layout
from flashtrace_plugin.models.read.recurrence import frozen_recurrences
from flashtrace_plugin.models.view import view_of
from tests.reference import dense, heta, recurrences
from tests.tiny import config_of, random_ids, tiny

KINDS = {
    "qwen3_next:hybrid": "gated delta rule",
    "kimi_linear": "Kimi delta attention",
    "nemotron_h": "Mamba-2",
    "falcon_h1": "Mamba-2 beside attention",
    "lfm2": "convolution",
    "jamba": "Mamba-1",
}
DOUBLE = ["qwen3_5_text:hybrid", "bamba", "lfm2", "mamba", "falcon_h1"]
"""Those without experts, which transformers does not run in double precision."""
IDS = random_ids(24)
SPANS = {"prompt_length": 10, "target": Span(19, 24), "reasoning": Span(10, 19)}


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("positions", ["token", "predicting"])
def test_token_wise_methods_are_the_dense_references(family, positions):
    model = tiny(family)
    layers = dense.read_dense(model, IDS)
    ifr = IFR(model, positions=positions).attribute_ids(IDS, **SPANS)
    theirs = dense.ifr_tokenwise(layers, 10, (19, 24), positions)
    assert gap(ifr.scores, theirs["scores"]) < 1e-5
    ours = RecursiveAttribution(model, hops=1, positions=positions).attribute_ids(IDS, **SPANS)
    theirs = dense.exhaustive(layers, 10, (19, 24), (10, 19), 1, positions)
    assert gap(ours.scores, theirs["scores"]) < 1e-5


@pytest.mark.parametrize("family", KINDS)
def test_texts_longer_than_a_chunk(family):
    """Transformers' functions work in chunks of 16 or 64 tokens."""
    model, ids = tiny(family), random_ids(100)
    ours = FlashTrace(model, hops=1).attribute_ids(ids, prompt_length=20, target=Span(90, 100), reasoning=Span(20, 90))
    theirs = dense.flashtrace(dense.read_dense(model, ids), 20, (90, 100), (20, 90), 1)
    assert gap(ours.scores, theirs["scores"]) < 1e-5
    assert ours.closure_error < 1e-5


@pytest.mark.parametrize("family", KINDS)
def test_flow_is_that_of_the_formula(family):
    """One layer alone: sum_i w_i c_ij, every channel with weights of its own."""
    model, rows = tiny(family), torch.arange(12, 24)
    with torch.no_grad():
        layer = capture(model, IDS[None], rows)[0]
    reference = dense.read_dense(model, IDS)[0]
    ours = reference.beside or reference
    heads, _, width = ours.v.shape
    w = torch.randn(len(layer.W_O), len(rows), layer.W_O.shape[1], generator=torch.Generator().manual_seed(0))
    flow = channel_flow(layer.pattern, w, 24)[-heads:, :, :width]
    c = ours.pattern.expand(*ours.pattern.shape[:3], width)[:, rows]
    expected = torch.einsum("hid,hijd->hjd", w[-heads:, :, :width].double(), c)
    assert gap(flow, expected) < 1e-5
    assert bool((ours.pattern < 0).any()), "coefficients of both signs"


@pytest.mark.parametrize("family", [f for f in KINDS if f != "lfm2"])
def test_relevance_goes_through_the_values_alone(family):
    """d <w, o> / d v of the frozen recurrence is sum_i w_i c_ij, and its other inputs get no gradient."""
    view = view_of(tiny(family))
    kinds = (recurrence.DELTA_RULE, recurrence.MAMBA2, recurrence.MAMBA)
    kind, module = next((kind, m) for m in view.modules() for kind in kinds if kind.is_of(m))
    seen = {}

    def keep(function, given):
        seen.update(given)
        return function(**given)

    x = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(1))
    with kind.intercepted(module, keep), torch.no_grad():
        module(x)
    leaves = {name: y.detach().requires_grad_() for name, y in seen.items() if torch.is_tensor(y)}
    with frozen_recurrences(view), kind.intercepted(module, lambda function, given: function(**seen | leaves)):
        out = module(x)
    gradients = dict(zip(leaves, torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True)))
    reached = {name for name, gradient in gradients.items() if gradient is not None}
    assert reached - {"z"} == {kind.values}


@pytest.mark.parametrize("family", KINDS)
def test_half_precision(family):
    found = FlashTrace(tiny(family, dtype=torch.bfloat16)).attribute_ids(IDS, **SPANS)
    assert 0 < found.closure_error < 2e-2
    assert gap(found.scores, FlashTrace(tiny(family)).attribute_ids(IDS, **SPANS).scores) < 0.3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("family", KINDS)
def test_modes_that_the_caller_may_be_in(family, mode):
    model = tiny(family)
    with mode():
        inside = FlashTrace(model).attribute_ids(IDS, **SPANS)
    assert torch.equal(inside.scores, FlashTrace(model).attribute_ids(IDS, **SPANS).scores)


@pytest.mark.parametrize("family", KINDS)
def test_the_model_is_left_as_it_was(family):
    model = tiny(family)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    FlashTrace(model).attribute_ids(IDS, **SPANS)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert all(p.grad is None for p in model.parameters())


def test_whose_kernel_computes_the_recurrence_is_noted():
    model = tiny("qwen3_next:hybrid")
    assert FlashTrace(model, hops=0).attribute_ids(IDS, **SPANS).settings["recurrences"] == "transformers"
    assert "recurrences" not in FlashTrace(tiny("llama"), hops=0).attribute_ids(IDS, **SPANS).settings


def test_another_kernel_is_read_by_the_plain_function(monkeypatch):
    """What a package computes is what the model computes; its coefficients come from transformers' own function."""
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    plain = inspect.unwrap(module.torch_chunk_gated_delta_rule)
    expected = FlashTrace(tiny("qwen3_next:hybrid")).attribute_ids(IDS, **SPANS)

    @functools.wraps(plain)
    def kernel(query, key, value, g, beta, **options):
        with torch.no_grad():  # as one without a backward pass
            return plain(query, key, value, g, beta, chunk_size=8, use_qk_l2norm_in_kernel=True)

    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", kernel)
    found = FlashTrace(tiny("qwen3_next:hybrid")).attribute_ids(IDS, **SPANS)
    assert found.closure_error < 2e-6
    assert gap(found.scores, expected.scores) < 1e-4


def test_heads_that_a_layer_lacks_have_no_share():
    shares = FlashTrace(tiny("qwen3_next:hybrid"), hops=0).attribute_ids(IDS, **SPANS).head_scores
    assert shares.shape == (1, 3, 6)
    assert bool((shares[0, 0] > 0).all()) and not shares[0, 1, 4:].any()


@pytest.mark.parametrize("family", DOUBLE)
def test_heta_without_its_gate_is_the_reference(family):
    """Its terms need only the model, run whole since a state hands on what keys and values of a prefix do not hold."""
    model, ids, target = tiny(family), IDS[:12], (9, 12)
    found = HETA(model, gate="uniform", curvature="gradient_squared").attribute_ids(
        ids, prompt_length=6, target=Span(*target)
    )
    exact = heta.exact_model(model)
    g, X = heta.embedding_objective(exact, ids, target)
    assert gap(found.components["curvature"], heta.gradient_squared(g, X)[:9]) < 1e-3
    assert gap(found.components["information"], heta.information(exact, ids, target)) < 1e-3
    with pytest.raises(UnsupportedModelError, match="every query gates what its heads read"):
        HETA(model).attribute_ids(ids, prompt_length=6, target=Span(*target))


@pytest.mark.parametrize("family", ["qwen3_5_text:hybrid", "lfm2"])
def test_second_derivatives_go_through_recurrences(family):
    model, ids, target = tiny(family), IDS[:6], (5, 6)
    found = HETA(model, gate=None, mask=None, probes=1).attribute_ids(ids, prompt_length=4, target=Span(*target))
    g, X = heta.embedding_objective(heta.exact_model(model), ids, target)
    probes = rademacher(1, 5, X.shape[1], generator=torch.Generator().manual_seed(0)).double()
    assert gap(found.components["curvature"], heta.block_curvature(heta.hessian(g, X), probes)) < 1e-2


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts._LAYOUTS))


def registered(family, **changes):
    register_layout(family.partition(":")[0], replace(layout_for(config_of(family)), **changes))
    return FlashTrace(tiny(family))


WRONG = [
    ("falcon_h1", {"beside": None}, ClosureError, "attention's parts do not add up"),
    ("falcon_h1", {"written": None}, ClosureError, "attention's parts do not add up"),
    ("mamba2", {"W_O": "mixer.in_proj"}, ClosureError, "what does not only multiply"),
    ("olmo_hybrid", {"others": layouts._QWEN_NEXT.others}, UnsupportedModelError, "layer 0 has no 'self_attn'"),
    ("mamba2", {"reader": recurrence.DELTA_RULE}, UnsupportedModelError, "forward calls no torch_chunk_gated"),
    ("mamba2", {"reader": recurrence.CONVOLUTION}, UnsupportedModelError, "with a bias|reads 64 channels"),
    ("qwen3_next:hybrid", {"others": ()}, UnsupportedModelError, "layer 0 has no 'self_attn', only linear_attn"),
    ("nemotron_h", {"others": ()}, UnsupportedModelError, "layer 1 has no 'mixer.out_proj'"),
]


@pytest.mark.parametrize(("family", "changes", "error", "message"), WRONG)
def test_wrong_layouts(table, family, changes, error, message):
    with pytest.raises(error, match=message):
        registered(family, **changes).attribute_ids(IDS, **SPANS)


def test_the_convolution_before_is_not_the_mixer(table):
    """A layout that divides out all of a state space model but its convolution closes, and is refused all the same."""
    wrong = layouts._mixer("mamba", recurrence.CONVOLUTION, **layouts._FEED_FORWARD)
    register_layout("jamba", replace(layout_for(config_of("jamba")), others=(wrong,)))
    model = tiny("jamba", mamba_conv_bias=False)
    for module in model.modules():
        if type(module).__name__ == "JambaMambaMixer":
            module.activation = None
    for _ in range(2):
        with pytest.raises(ClosureError, match="what does not only multiply"):
            FlashTrace(model).attribute_ids(IDS, **SPANS)


@pytest.mark.parametrize("change", [lambda z: z + 0.5, lambda z: z - z.mean(-1, keepdim=True)], ids=["adds", "mixes"])
def test_a_hook_that_adds_or_mixes_before_the_output_projection(change):
    """Dividing by what was read would make it a gate."""
    model = tiny("qwen3_5_text:hybrid")
    FlashTrace(model).attribute_ids(IDS, **SPANS)
    projection = model.model.layers[2].linear_attn.out_proj
    handle = projection.register_forward_pre_hook(lambda module, args: (change(args[0]),))
    with pytest.raises(ClosureError, match=r"what does not only multiply.*or a hook is there"):
        FlashTrace(model).attribute_ids(IDS, **SPANS)
    handle.remove()
    projection.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    assert FlashTrace(model).attribute_ids(IDS, **SPANS).closure_error < 2e-6


def test_a_recurrence_that_continues_from_a_state():
    q = torch.zeros(1, 3, 2, 4)
    given = {"query": q, "key": q, "value": q, "initial_state": torch.zeros(1, 2, 4, 4)}
    with pytest.raises(UnsupportedModelError, match="continues from the state of an earlier text"):
        recurrence.DELTA_RULE.told(lambda **given: q, given, q)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("minimax", "normalise the residual stream itself"),
        ("zamba2", "through an MLP, to what its Mamba layers read"),
        ("zamba", "through an MLP, to what its Mamba layers read"),
    ],
)
def test_families_that_no_layout_can_describe(family, reason):
    config = transformers.AutoConfig.for_model(family)
    with pytest.raises(UnsupportedModelError, match=f"{family!r} is not supported: .*{reason}"):
        layout_for(config)


def test_every_mixer_has_a_reference():
    """So that a family is not taken for attention alone by the reference, too."""
    for family in KINDS:
        readers = [kind for kind in vars(recurrence).values() if isinstance(kind, recurrence.RecurrenceReader)]
        mixers = [m for m in tiny(family).modules() if any(kind.is_of(m) for kind in readers)]
        assert mixers and all(map(recurrences.known, mixers))

"""Hooks, compiled parts and replaced methods of the user: obeyed as in the user's own forward pass, or refused."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm

from flashtrace_lens import bridge_for
from flashtrace_lens import flashtrace as on_bridge
from flashtrace_plugin import (
    ALTI,
    HETA,
    LRP,
    FlashTrace,
    InputError,
    RecursiveAttribution,
    Span,
    UnsupportedModelError,
)
from flashtrace_plugin.models.view import view_of
from tests.tiny import random_ids, tiny

IDS = random_ids(22, seed=4)
SPANS = {"prompt_length": 9, "target": Span(14, 17), "reasoning": Span(10, 14)}
METHODS = {
    "flashtrace": lambda model: FlashTrace(model, positions="predicting", hops=2),
    "recursive": lambda model: RecursiveAttribution(model, hops=2),
    "alti": lambda model: ALTI(model, hops=1),
    "lrp": lambda model: LRP(model, hops=2),
    "lrp attn": lambda model: LRP(model, hops=2, rule="attn", memory_budget=0),
    "heta": lambda model: HETA(model, probes=2, mask="mean"),
}


def attributed(model, method="flashtrace"):
    return METHODS[method](model).attribute_ids(IDS, **SPANS)


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


# ---------------------------------------------------------------------------------------------------------------------
# What a hook is given, and what it gives back
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_is_given_the_users_module(method):
    model = tiny("llama", seed=1)
    layer, given = model.model.layers[1], []

    def after(module, args, kwargs, output):
        module.seen = given.append(module)

    layer.register_forward_pre_hook(lambda module, args: given.append(module))
    layer.mlp.register_forward_pre_hook(lambda module, args, kwargs: given.append(module), with_kwargs=True)
    layer.self_attn.register_forward_hook(after, with_kwargs=True)
    layer.mlp.register_forward_hook(lambda module, args, output: given.append(module), always_call=True)
    close(attributed(model, method).hop_scores, attributed(tiny("llama", seed=1), method).hop_scores)
    assert {id(m) for m in given} == {id(layer), id(layer.mlp), id(layer.self_attn)}
    assert vars(layer.self_attn)["seen"] is None


def test_a_hook_that_is_always_called_is_so_after_an_error():
    model, called = tiny("llama", seed=1), []

    def fails(module, args):
        raise RuntimeError("stop")

    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fails)
    model.model.layers[1].mlp.register_forward_hook(lambda *values: called.append(values[0]), always_call=True)
    with pytest.raises(RuntimeError, match="stop"):
        attributed(model)
    assert called[0] is model.model.layers[1].mlp


def test_global_hooks_are_given_the_users_module():
    model = tiny("llama", seed=1)
    names, seen = {id(m): name for name, m in model.named_modules()}, set()

    def double(module, args, output):
        seen.add(names.get(id(module), "a stranger"))
        return output * 2 if module is model.model.layers[1].mlp else None

    handles = [
        register_module_forward_hook(double),
        register_module_forward_pre_hook(lambda module, args: seen.add(names.get(id(module), "a stranger"))),
    ]
    try:
        found = attributed(model)
    finally:
        for handle in handles:
            handle.remove()
    assert "a stranger" not in seen and "model.layers.2.self_attn" in seen
    other = tiny("llama", seed=1)
    other.model.layers[1].mlp.down_proj.weight.data *= 2
    close(found.hop_scores, attributed(other).hop_scores)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_hook_sets_on_its_module_counts_in_every_view(method):
    """Of two views, the second to run finds it on the user's module already, from the first one's run."""
    model, plain = tiny("llama", seed=1), tiny("llama", seed=1)
    plain.model.layers[1].self_attn.scaling = 0.1
    attn = model.model.layers[1].self_attn
    attn.register_forward_pre_hook(lambda module, args: setattr(module, "scaling", 0.1))
    close(attributed(model, method).hop_scores, attributed(plain, method).hop_scores)
    attn.scaling = 0.5
    views = [view_of(model) for _ in range(2)]
    with torch.no_grad():
        first, second = (view(IDS[None]).logits for view in views)
    assert torch.equal(first, second) and attn.scaling == 0.1


class _Scaled(nn.Module):
    def forward(self, weight):
        return weight * 1.5


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "prune", "parametrize", "own"])
def test_weights_that_are_made_in_each_pass(how):
    """The weight is changed after the reparametrisation, so that a value from before the call would be wrong."""
    model = tiny("llama", seed=1).train()
    linear = model.model.layers[1].self_attn.o_proj
    if how == "own":
        linear.register_forward_pre_hook(lambda module, args: setattr(module, "weight", nn.Parameter(fresh(module))))
        base = linear.weight.detach().clone()

        def fresh(module):
            return base * 0.5

    elif how == "parametrize":
        parametrize.register_parametrization(linear, "weight", _Scaled())
    else:
        make = {"weight_norm": weight_norm, "spectral_norm": spectral_norm}.get(how)
        make(linear) if make else prune.random_unstructured(linear, "weight", amount=0.3)
        part = linear.weight_g if how == "weight_norm" else linear.weight_orig
        with torch.no_grad():
            part.mul_(3)
    found, plain = attributed(model), tiny("llama", seed=1)
    with torch.no_grad():
        model.eval()(IDS[None])
        plain.model.layers[1].self_attn.o_proj.weight.copy_(linear.weight)
    close(found.hop_scores, attributed(plain).hop_scores)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled parts
# ---------------------------------------------------------------------------------------------------------------------


def not_compiled(graph, inputs):
    raise AssertionError("a compiled part was run")


COMPILED = {
    "the model": lambda model: torch.compile(model, backend=not_compiled),
    "the model in place": lambda model: model.compile(backend=not_compiled),
    "its forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend=not_compiled)),
    "a layer": lambda model: model.model.layers.__setitem__(
        1, torch.compile(model.model.layers[1], backend=not_compiled)
    ),
    "a part in place": lambda model: model.model.layers[1].mlp.compile(backend=not_compiled),
}


@pytest.mark.parametrize("method", ["flashtrace", "lrp", "heta"])
@pytest.mark.parametrize("part", COMPILED)
def test_what_is_compiled_runs_as_it_was_written(part, method):
    expected = attributed(tiny("llama", seed=1), method)
    model = tiny("llama", seed=1)
    made = COMPILED[part](model)
    assert torch.equal(attributed(model if made is None else made, method).hop_scores, expected.hop_scores)


# ---------------------------------------------------------------------------------------------------------------------
# Replaced methods
# ---------------------------------------------------------------------------------------------------------------------


def doubled(old):
    return lambda *args, **kwargs: old(*args, **kwargs) * 2


def by_default(old):
    def forward(*args, old=old, **kwargs):
        return old(*args, **kwargs) * 2

    return forward


def wrapped(old):
    @functools.wraps(old)
    def forward(*args, **kwargs):
        return old(*args, **kwargs) * 2

    return forward


def with_default(old):
    def forward(x, old=old):
        return old(x) * 2

    return forward


class Caller:
    def __init__(self, old):
        self.old = old

    def __call__(self, *args, **kwargs):
        return self.old(*args, **kwargs) * 2


def in_a_list(old):
    kept = [old]
    return lambda *args, **kwargs: kept[0](*args, **kwargs) * 2


def in_a_global(old):
    globals()["OLD"] = old
    return lambda *args, **kwargs: OLD(*args, **kwargs) * 2  # noqa: F821


@pytest.mark.parametrize("replace", [doubled, with_default, by_default, wrapped])
@pytest.mark.parametrize("method", ["flashtrace", "lrp"])
def test_a_replaced_method_runs_in_the_view(replace, method):
    """Dropout in the part shows whether its own modules, which are in training mode, were run."""
    model = tiny("llama", seed=1).train()
    mlp = model.model.layers[1].mlp
    mlp.act_fn = nn.Sequential(mlp.act_fn, nn.Dropout(0.5))
    mlp.forward = replace(mlp.forward)
    other = tiny("llama", seed=1)
    other.model.layers[1].mlp.down_proj.weight.data *= 2
    close(attributed(model, method).hop_scores, attributed(other, method).hop_scores)


@pytest.mark.parametrize("replace", [Caller, in_a_list, in_a_global])
@pytest.mark.parametrize("name", ["model.layers.1.mlp", "model.layers.2.self_attn", "model.layers.0"])
def test_a_replaced_method_that_cannot_be_followed_is_refused(replace, name):
    model = tiny("llama", seed=1)
    module = model.get_submodule(name)
    module.forward = replace(module.forward)
    with pytest.raises(UnsupportedModelError, match=rf"forward of {name} .* was replaced by .*use|change .*hook"):
        attributed(model)


# ---------------------------------------------------------------------------------------------------------------------
# The whole text
# ---------------------------------------------------------------------------------------------------------------------

SHIFT = torch.linspace(-1, 1, 32) * 2


def last_edited(module, args, output):
    hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
    hidden[:, -1] += SHIFT
    return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])


def at_the_last(module, args, output):
    """The same by hand, for a text whose length is known."""
    hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
    if hidden.shape[1] == len(IDS):
        hidden[:, len(IDS) - 1] += SHIFT
    return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])


@pytest.mark.parametrize("method", METHODS)
def test_the_last_position_of_a_hook_is_that_of_the_text(method):
    """Nothing of the target reads what comes after it, so an edit there changes no score."""
    model = tiny("llama", seed=1)
    expected = attributed(model, method)
    model.model.layers[0].register_forward_hook(last_edited)
    close(attributed(model, method).hop_scores, expected.hop_scores, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_at_the_end_is_the_one_made_by_hand(method):
    """The target is the end of the text here, so the edit matters."""
    spans = {"prompt_length": 9, "target": Span(20, 22), "reasoning": Span(10, 14)}
    plain = METHODS[method](tiny("llama", seed=1)).attribute_ids(IDS, **spans).hop_scores
    found = []
    for hook in (last_edited, at_the_last):
        model = tiny("llama", seed=1)
        model.model.layers[0].register_forward_hook(hook)
        found.append(METHODS[method](model).attribute_ids(IDS, **spans).hop_scores)
    close(*found, 1e-4)
    if method in ("flashtrace", "recursive"):  # positions that stand for tokens include the last
        assert method != "recursive" or (found[0] - plain).abs().max() > 1e-4


def patched(clean):
    """Activations of another text in the place of a layer's: the whole of them, whatever is run."""
    return lambda module, args, output: clean.clone()


@pytest.mark.parametrize("method", METHODS)
def test_activations_of_the_whole_text_can_be_patched_in(method):
    model, kept = tiny("llama", seed=1), []
    layer = model.model.layers[0]
    handle = layer.mlp.register_forward_hook(lambda module, args, output: kept.append(output.detach()))
    with torch.no_grad():
        model(random_ids(22, seed=9)[None])
    handle.remove()
    plain = attributed(model, method)
    layer.mlp.register_forward_hook(patched(kept[0]))
    found = attributed(model, method)
    assert (found.hop_scores - plain.hop_scores).abs().max() > 1e-4


def test_long_texts_are_not_cut_for_proofs_under_hooks():
    """Logits are compared on the first 128 tokens, but for a hook there is only the whole text."""
    ids = random_ids(150, seed=3)
    model = tiny("llama", seed=1, max_position_embeddings=256)
    add = torch.randn(1, 150, 32, generator=torch.Generator().manual_seed(0))
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + add)
    for method in (FlashTrace(model), LRP(model), LRP(model, rule="attn")):
        method.attribute_ids(ids, prompt_length=20, target=Span(140, 143))


def test_hooks_of_libraries_do_not_cost_the_whole_text():
    model, lengths = tiny("llama", seed=1), []
    model(IDS[None], output_hidden_states=True)  # transformers places hooks of its own, for good
    assert model.model.layers[0]._forward_hooks
    run = type(model.model).forward

    class Watched(type(model.model)):
        def forward(self, *args, **kwargs):
            lengths.append(kwargs["input_ids"].shape[1])
            return run(self, *args, **kwargs)

    model.model.__class__ = Watched
    attributed(model)
    assert max(lengths) == 16
    model.lm_head.register_forward_hook(lambda module, args, output: None)
    attributed(model)
    assert max(lengths) == 22


def test_rotary_embeddings_that_depend_on_the_length_have_the_whole_text():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    scaling = rope | {"original_max_position_embeddings": 20, "factor": 4.0}
    model = tiny("llama", seed=1, rope_parameters=scaling)
    found = attributed(model)  # 22 tokens are long, the 16 up to the target would be short
    long = tiny("llama", seed=1, rope_parameters=scaling | {"short_factor": [4.0] * 4})
    close(found.hop_scores, attributed(long).hop_scores)


def test_bridges_have_the_whole_text_too():
    bridge, lengths = bridge_for(tiny("llama", seed=1)), []
    expected = on_bridge(bridge, IDS, **SPANS).scores

    def edit(activation, hook):
        lengths.append(activation.shape[1])
        activation[:, -1] += SHIFT
        return activation

    with bridge.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", edit)]):
        found = on_bridge(bridge, IDS, **SPANS).scores
    close(found, expected)
    assert set(lengths) == {22}


def test_the_context_of_a_hook_point_is_the_users():
    bridge = bridge_for(tiny("llama", seed=1))

    def note(activation, hook):
        hook.ctx["size"] = activation.shape

    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", note)]):
        on_bridge(bridge, IDS, **SPANS)
        assert bridge.hook_dict["blocks.1.hook_resid_pre"].ctx["size"] == (1, 22, 32)


def test_a_view_of_a_bridge_computes_what_the_bridge_computes():
    bridge = bridge_for(tiny("gemma2", seed=1))
    view = view_of(bridge)
    assert not set(map(id, view.modules())) & set(map(id, bridge.modules()))
    assert view.original_model is not bridge.original_model
    with torch.no_grad():
        assert torch.equal(view(IDS[None]), bridge(IDS[None]))


@pytest.mark.parametrize("where", ["model", "embeddings"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_hook_that_changes_the_token_ids_is_refused(family, where):
    """Scores would be given to tokens that the model does not read."""
    model, ids = tiny(family), random_ids(20, seed=4)
    method, spans = FlashTrace(model), {"prompt_length": 8, "target": (15, 18)}
    method.attribute_ids(ids, **spans)

    def other(module, args, kwargs):
        args = tuple(a.flip(-1) for a in args)
        return args, {k: v.flip(-1) if k == "input_ids" else v for k, v in kwargs.items()}

    module = model if where == "model" else model.get_input_embeddings()
    handle = module.register_forward_pre_hook(other, with_kwargs=True)
    with pytest.raises(InputError, match="changes the token ids"):
        method.attribute_ids(ids, **spans)
    handle.remove()
    method.attribute_ids(ids, **spans)

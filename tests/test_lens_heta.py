"""HETA on a bridge differentiates the bridge itself: its hooks, its LoRA, its embeddings."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformer_lens")

from transformer_lens.model_bridge.sources import build_bridge_from_module

from flashtrace_lens import boot, bridge_for, names_filter
from flashtrace_plugin import HETA, FlashTrace, Span, UnsupportedModelError
from tests.tiny import random_ids, tiny

IDS = random_ids(40, seed=4)
SPANS = {"prompt_length": 14, "target": Span(33, 36)}
TERMS = {
    "curvature": {"mask": None},
    "low rank": {"curvature": "low_rank", "rank": 3, "mask": None, "window": 16},
    "squares": {"curvature": "gradient_squared", "mask": "mean"},
    "layers": {"last_layers": 2, "mask": None},
    "information": {"curvature": None, "mask": "token", "mask_token": 9},
}


def heta(model, **options):
    options = {"gate": "uniform", "probes": 2, "rescale": None, "progress": False} | options
    return HETA(model, **options).attribute_ids(IDS, **SPANS).scores


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.max()))


@pytest.fixture(scope="module", params=["qwen3", "gpt2"])
def model(request):
    return tiny(request.param, seed=3, attn_implementation="eager")


@pytest.fixture(scope="module")
def bridge(model):
    return bridge_for(model)


def lora():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    found = peft.get_peft_model(tiny("llama", seed=3, attn_implementation="eager"), settings)
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return found.eval()


@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_that_of_the_hugging_face_model(model, bridge, term):
    close(heta(bridge, **TERMS[term]), heta(model, **TERMS[term]))


@pytest.mark.parametrize("term", ["curvature", "information"])
def test_a_lora_adapter_counts(term):
    adapted = lora()
    close(heta(bridge_for(adapted), **TERMS[term]), heta(adapted, **TERMS[term]))


def test_a_bridge_that_the_user_booted_with_lora_is_not_compared_with_one_without():
    base = lora().get_base_model()
    bridge = build_bridge_from_module(base, type(base).__name__, hf_config=base.config)
    found = FlashTrace(bridge, hops=0).attribute_ids(IDS, **SPANS)
    assert found.settings["logits_checked"] is False
    assert boot.plain_model(bridge) is None


def steered(at):
    """Changes the stream at some positions: as a hook of TransformerLens, and as one of torch on a block."""

    def steer(x):
        x = x.clone()
        x[:, at] += x[:, at].flip(-1)
        return x

    return (lambda x, hook: steer(x)), (lambda module, args, output: steer(output))


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("at", [slice(None), slice(5, 6), slice(-1, None), slice(-6, None)], ids=str)
def test_hooks_reach_every_term(model, bridge, term, at):
    """Also those that count positions from either end of the text, whatever piece of it is run."""
    if term == "layers" and at == slice(-1, None):
        pytest.skip("behind all predicting positions, so it changes nothing")
    lens, plain = steered(at)
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lens)]):
        ours = heta(bridge, **TERMS[term])
    handle = layers[1].register_forward_hook(plain)
    try:
        theirs = heta(model, **TERMS[term])
    finally:
        handle.remove()
    close(ours, theirs)
    if term in ("squares", "information"):
        close(ours, reference(model, at, term))
    changes = at != slice(-1, None)
    assert torch.allclose(ours, heta(bridge, **TERMS[term]), rtol=1e-3) is not changes


def reference(model, at, term):
    """The term by hand, on the whole text: squared gradients, or the divergence for every masked token."""
    embed = model.get_input_embeddings()
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    handle = layers[1].register_forward_hook(steered(at)[1])
    try:
        X = embed(IDS)[None].detach().requires_grad_()
        rows = torch.arange(SPANS["target"].start, SPANS["target"].stop) - 1
        log_p = model(inputs_embeds=X, use_cache=False).logits[0, rows].log_softmax(-1)
        masked = []
        n = SPANS["target"].start
        vector = embed.weight.mean(0) if term == "squares" else embed.weight[9]
        for i in range(n):
            Y = X.detach().clone()
            Y[0, i] = vector
            with torch.no_grad():
                log_q = model(inputs_embeds=Y, use_cache=False).logits[0, rows].log_softmax(-1)
            masked.append((log_p.exp() * (log_p - log_q)).sum())
        information = torch.stack(masked).detach()
        g = log_p[torch.arange(len(rows)), IDS[rows + 1]].sum()
        (gradient,) = torch.autograd.grad(g, X)
    finally:
        handle.remove()
    squares = gradient[0, :n].square().sum(-1) if term == "squares" else 0.0
    return ((squares + information) / 2 / n)[: SPANS["prompt_length"]].detach()


@pytest.mark.parametrize("term", ["curvature", "information"])
def test_perturbed_embeddings_arrive(model, bridge, term):
    noise = 0.1 * torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    with bridge.hooks(fwd_hooks=[("embed.hook_out", lambda x, hook: x + noise[: x.shape[1]])]):
        ours = heta(bridge, **TERMS[term])
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out + noise[: out.shape[-2]])
    try:
        theirs = heta(model, **TERMS[term])
    finally:
        handle.remove()
    close(ours, theirs)
    assert not torch.allclose(ours, heta(bridge, **TERMS[term]), rtol=1e-3)


def test_hooks_at_the_embeddings_do_not_reach_what_masks():
    """A mask is one vector and not a text, so a hook that expects a text never sees it."""
    bridge = bridge_for(tiny("granite", seed=3))

    def last(x, hook):
        x[:, -1, 0] += 1.0
        return x

    for mask in ("mean", "pad"):
        with bridge.hooks(fwd_hooks=[("embed.hook_out", last)]):
            hooked = heta(bridge, curvature=None, mask=mask)
        close(hooked, heta(bridge, curvature=None, mask=mask))


def test_nothing_stays_on_the_bridge(bridge):
    before = {id(p): p.requires_grad for p in bridge.original_model.parameters()}
    kernel = bridge.original_model.config._attn_implementation
    heta(bridge)
    assert {id(p): p.requires_grad for p in bridge.original_model.parameters()} == before
    assert bridge.original_model.config._attn_implementation == kernel
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_a_cache_cannot_be_differentiated(bridge):
    _, cache = bridge.run_with_cache(IDS, names_filter=names_filter)
    with pytest.raises(UnsupportedModelError, match=r"ActivationCache .*cannot be differentiated; pass the bridge"):
        heta(cache)

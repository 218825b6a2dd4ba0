"""A bridge under the user's hooks: edits of the stream are components, other edits are refused by the hook's name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformer_lens")

import flashtrace_lens
from flashtrace_lens import FlashTraceResult, bridge_for, flashtrace, names_filter
from flashtrace_plugin import ClosureError, FlashTrace, InputError, Span, SpanError
from tests.tiny import random_ids, tiny, tiny_tokenizer

IDS = random_ids(40, seed=4)
SPANS = {"target": Span(31, 35), "reasoning": Span(17, 29)}
VECTOR = 3 * torch.randn(32, generator=torch.Generator().manual_seed(7))


def steer(x, hook):
    return x + VECTOR * x.abs().mean()


def scale(x, hook):
    return 1.3 * x


@pytest.fixture(scope="module", params=["llama", "gptj", "gemma2", "granite"])
def model(request):
    return tiny(request.param, seed=3, attn_implementation="eager")


@pytest.fixture(scope="module")
def bridge(model):
    return bridge_for(model)


# Edits of the stream


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"])
def test_steering_is_a_component_of_its_own(model, bridge, hook):
    before = flashtrace(bridge, IDS, hops=1, **SPANS)
    with bridge.hooks(fwd_hooks=[(hook, steer)]):
        found = flashtrace(bridge, IDS, hops=1, **SPANS)
    assert found.component_labels[:4] == ["embed", "0_attn_out", "0_mlp_out", "0_edit"]
    edits = [i for i, label in enumerate(found.component_labels) if label.endswith("_edit")]
    assert [bool(found.components[0, i] > 0) for i in edits] == [False, True, False]
    assert ("1_edit", float(found.components[0, edits[1]])) in found.top(3, unit="component", hop=0)
    torch.testing.assert_close(found.components.sum(1), torch.ones(2))
    assert before.components.shape == (2, 7)
    assert not any("edit" in label for label in before.component_labels)
    assert found.closure_error < 2e-6

    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    handle = layers[1].register_forward_hook(lambda module, args, out: _on(out))
    try:
        theirs = FlashTrace(model).attribute_ids(IDS, prompt_length=17, **SPANS)
    finally:
        handle.remove()
    torch.testing.assert_close(found.components, theirs.stream_shares, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.scores, theirs.scores, rtol=1e-4, atol=1e-6)


def _on(output):
    return (steer(output[0], None), *output[1:]) if isinstance(output, tuple) else steer(output, None)


def test_what_enters_the_first_layer_is_the_embedding(bridge):
    with bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", steer)]):
        found = flashtrace(bridge, IDS, hops=0, **SPANS)
    assert not any("edit" in label for label in found.component_labels)


@pytest.mark.parametrize("hook", ["hook_mlp_out", "attn.hook_v"])
def test_edits_of_what_a_part_writes_are_that_part(bridge, hook):
    before = flashtrace(bridge, IDS, hops=0, **SPANS)
    with bridge.hooks(fwd_hooks=[(f"blocks.1.{hook}", lambda x, hook: 3 * x)]):
        found = flashtrace(bridge, IDS, hops=0, **SPANS)
    assert found.component_labels == before.component_labels
    assert found.closure_error < 2e-6
    part = found.component_labels.index("1_mlp_out" if "mlp" in hook else "1_attn_out")
    assert found.components[0, part] > before.components[0, part]


@pytest.mark.parametrize("name", ["flashtrace", "ifr", "recursive"])
def test_a_cache_tells_of_edits_too(bridge, name):
    analysis, spans = getattr(flashtrace_lens, name), SPANS if name != "ifr" else {"target": SPANS["target"]}
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_post", steer)]):
        _, cache = bridge.run_with_cache(IDS, names_filter=names_filter)
        running = analysis(bridge, IDS, **spans)
    cached = analysis(bridge, IDS, cache=cache, **spans)
    assert cached.component_labels == running.component_labels
    torch.testing.assert_close(cached.components, running.components, rtol=1e-4, atol=1e-6)


# Hooks that count positions


@pytest.mark.parametrize("name", ["flashtrace", "recommended", "alti", "heta", "ifr"])
def test_a_hook_at_the_last_position_is_that_of_the_whole_text(bridge, name):
    """Nothing before the last position changes, however much of the text a method runs."""

    def last(x, hook):
        x = x.clone()
        x[:, -1] = x[:, -2].flip(-1)
        return x

    analysis = getattr(flashtrace_lens, name)
    options = {"probes": 1, "progress": False} if name == "heta" else {}
    spans = {"target": SPANS["target"], "prompt_length": 17}
    before = analysis(bridge, IDS, **spans, **options)
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", last)]):
        found = analysis(bridge, IDS, **spans, **options)
    torch.testing.assert_close(found.scores, before.scores, rtol=1e-3, atol=1e-6)


def test_a_hook_at_the_last_position_gives_what_the_cache_under_it_gives(bridge):
    def last(x, hook):
        x = x.clone()
        x[:, -1] += VECTOR
        return x

    with bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_post", last)]):
        _, cache = bridge.run_with_cache(IDS, names_filter=names_filter)
        for target in (-1, Span(30, 36)):
            running = flashtrace(bridge, IDS, target=target, hops=0)
            cached = flashtrace(bridge, IDS, target=target, hops=0, cache=cache)
            torch.testing.assert_close(running.scores, cached.scores, rtol=1e-4, atol=1e-6)
            assert running.component_labels == cached.component_labels
            assert ("0_edit" in running.component_labels) == (target == -1)


# Edits that cannot be divided


@pytest.mark.parametrize("hook", ["attn.hook_z", "hook_attn_out", "hook_resid_mid", "attn.hook_pattern"])
def test_edits_between_heads_and_stream_are_refused_by_name(bridge, hook):
    name = f"blocks.1.{hook}"
    if name not in bridge.hook_dict:
        pytest.skip("a parallel block has no stream between attention and MLP")
    recomputed = not hasattr(bridge.original_model, "transformer")  # GPT-J's own attention ignores other patterns
    with bridge.hooks(fwd_hooks=[(name, scale), ("blocks.1.hook_resid_post", scale), ("blocks.2.attn.hook_z", _look)]):
        if hook == "attn.hook_pattern" and recomputed:
            assert flashtrace(bridge, IDS, target=-1, hops=0).closure_error < 2e-6
            return
        message = rf"layer 1: .*hooks? at {bridge.hook_dict[name].name} changes.*remove it"
        with pytest.raises(ClosureError, match=message):
            flashtrace(bridge, IDS, target=-1, hops=0)


def _look(x, hook):
    assert x.isfinite().all()


# Caches of something else


@pytest.mark.parametrize("position", [0, 12, 39])
@pytest.mark.parametrize("options", [{}, {"remove_batch_dim": True}])
def test_a_cache_of_another_text_is_refused(bridge, position, options):
    other = IDS.clone()
    other[position] = (other[position] + 7) % 500
    _, cache = bridge.run_with_cache(other, names_filter=names_filter, **options)
    with pytest.raises(InputError, match=rf"the cache is of another text: from position {position} on"):
        flashtrace(bridge, IDS, target=(20, 24), cache=cache)
    assert flashtrace(bridge, other, target=(20, 24), cache=cache, hops=0).scores.sum() > 0


# Inputs


@pytest.mark.parametrize("several", [["a", "b"], ("a",), torch.stack([IDS, IDS]), [[1, 2], [3]], [IDS, IDS]], ids=str)
def test_several_texts_are_refused_with_the_loop(bridge, several):
    with pytest.raises(InputError, match=r"one text at a time: \[flashtrace\(bridge, one, .*in tokens\]"):
        flashtrace(bridge, several, target=-1)


def test_one_row_of_ids_may_be_a_list(bridge):
    row = IDS.tolist()
    ours = [flashtrace(bridge, one, target=-1, hops=0).scores for one in (row, [row], IDS[None])]
    assert torch.equal(ours[0], ours[1])
    assert torch.equal(ours[0], ours[2])


@pytest.mark.parametrize("positions", [[20, 21, 22], torch.tensor([20, 22, 24])])
def test_lists_of_positions_are_refused(bridge, positions):
    with pytest.raises(SpanError, match=r"target must be .*contiguous"):
        flashtrace(bridge, IDS, target=positions)


@pytest.fixture(scope="module")
def padded():
    """A bridge with a tokenizer, and a text alone and as the first row of a batch that is padded on the left."""
    bridge = bridge_for(tiny("qwen3", seed=3), tiny_tokenizer())
    texts = ["The key is here", "The key of the red box is in the garden, as it was"]
    return bridge, bridge.to_tokens(texts[0]), bridge.to_tokens(texts, padding_side="left")[:1]


def test_left_padding_is_left_out(padded):
    bridge, alone, tokens = padded
    extra = tokens.shape[1] - alone.shape[1]
    assert extra > 3
    last = alone.shape[1] - 1
    two, there = Span(last - 1, last + 1), (last - 1 + extra, last + 1 + extra)
    for target, padded_target in ((-1, -1), (last, last + extra), (two, there)):
        ours = flashtrace(bridge, tokens, target=padded_target, hops=0)
        theirs = flashtrace(bridge, alone, target=target, hops=0)
        assert torch.equal(ours.scores, theirs.scores)
        assert ours.token_labels == theirs.token_labels
    told = {"prompt_length": 3 + extra, "hops": 0}
    ours = flashtrace(bridge, tokens, target=slice(-2, None), reasoning=(3 + extra, 4 + extra), **told)
    theirs = flashtrace(bridge, alone, target=slice(-2, None), reasoning=(3, 4), prompt_length=3, hops=0)
    assert torch.equal(ours.scores, theirs.scores)


def test_padding_that_is_the_beginning_of_texts_too(padded):
    """As TransformerLens pads for GPT-2: the last of the leading ones begins the text."""
    _, alone, _ = padded
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.bos_token
    own = bridge_for(tiny("qwen3", seed=3), tokenizer)
    begin = torch.full((1, 1), tokenizer.bos_token_id)
    text = torch.cat([begin, alone], 1)
    ours = flashtrace(own, torch.cat([begin, begin, text], 1), target=-1, hops=0)
    theirs = flashtrace(own, text, target=-1, hops=0)
    assert torch.equal(ours.scores, theirs.scores)


def test_positions_on_the_padding(padded):
    bridge, _, tokens = padded
    with pytest.raises(SpanError, match=r"target .*padding"):
        flashtrace(bridge, tokens, target=(1, 3))


def test_components_are_labelled_where_no_heads_are_told(bridge):
    found = flashtrace(bridge, IDS, hops=0, **SPANS)
    headless = replace(found.attribution, head_scores=found.heads[:, :0, :0])
    assert FlashTraceResult.of(headless).component_labels == found.component_labels

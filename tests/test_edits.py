"""What hooks put into the residual stream between layers is a part of its own: neither attention's nor the MLP's."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from flashtrace_plugin import IFR, ClosureError, FlashTrace, RecursiveAttribution, Span
from flashtrace_plugin.core.flow.components import final_stream_shares
from flashtrace_plugin.methods.registry import METHODS
from flashtrace_plugin.models.read.layouts import layout_for, transformer_blocks
from tests.tiny import FAMILIES, random_ids, tiny

IDS = random_ids(24, seed=4)
PROMPT, REASONING, TARGET = 8, Span(9, 15), Span(18, 22)
VECTOR = 3 * torch.randn(32, generator=torch.Generator().manual_seed(7))


def attribute(model, method=FlashTrace, **options):
    spans = {"prompt_length": PROMPT, "target": TARGET}
    if method is not IFR:
        spans["reasoning"] = REASONING
        options = {"hops": 2} | options
    return method(model, **options).attribute_ids(IDS, **spans)


def blocks_of(model):
    return transformer_blocks(model)


def added(module, args, output):
    """A steering hook: adds a vector to what a block returns."""
    if isinstance(output, tuple):
        return (steered(output[0]), *output[1:])
    return steered(output)


def steered(x):
    return x + VECTOR * x.abs().mean()


def added_before(module, args, kwargs):
    if args:
        return (steered(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": steered(kwargs["hidden_states"])}


@contextmanager
def placed(handle):
    try:
        yield
    finally:
        handle.remove()


def l1(c, t):
    return max(0.0, float(t.abs().sum() - (t - c).abs().sum()))


def streams(model, layer):
    """Weighted streams of the target around a layer, read by plain hooks: after attention, MLP and edit, by hand."""
    seen = {}
    blocks = blocks_of(model)
    mid = blocks[layer].get_submodule(layout_for(model.config).mid)
    handles = [
        mid.register_forward_pre_hook(lambda m, a: seen.update(mid=a[0])),
        blocks[layer].register_forward_hook(lambda m, a, o: seen.update(written=o), prepend=True),
        blocks[layer + 1].register_forward_pre_hook(lambda m, a: seen.update(read=a[0])),
    ]
    with torch.no_grad():
        model(IDS[None])
    for handle in handles:
        handle.remove()
    return {name: x[0, TARGET.slice].sum(0) for name, x in seen.items()}


@pytest.mark.parametrize("side", ["after the block", "before the next"])
def test_shares_of_an_edit_by_hand(side):
    model = tiny("llama", seed=3)
    before = attribute(model)
    blocks = blocks_of(model)
    if side == "after the block":
        handle = blocks[1].register_forward_hook(added)
    else:
        handle = blocks[2].register_forward_pre_hook(added_before, with_kwargs=True)
    with placed(handle):
        found, x = attribute(model), streams(model, 1)
    t, mlp, edit = x["mid"], x["written"] - x["mid"], x["read"] - x["written"]
    shares = [l1(part, x["read"]) for part in (t, mlp, edit)]
    assert shares[2] > 0.1 * sum(shares)
    edits = found.components["edit_shares"]
    assert edits.shape == (3, 3)
    assert float(edits[0, 1]) == pytest.approx(shares[2] / sum(shares), rel=1e-4)
    assert float(found.mlp_shares[0, 1]) == pytest.approx(shares[1] / sum(shares), rel=1e-4)
    assert edits[:, 0].tolist() == edits[:, 2].tolist() == [0.0] * 3
    assert found.stream_shares.shape == (3, 10)
    torch.testing.assert_close(found.stream_shares.sum(1), torch.ones(3))
    torch.testing.assert_close(found.mlp_shares[0, 0], before.mlp_shares[0, 0])
    assert "edit_shares" not in before.components
    assert before.stream_shares.shape == (3, 7)
    assert found.closure_error < 2e-6


def test_an_edit_of_the_last_layer_is_seen():
    model = tiny("qwen3", seed=3)
    with placed(blocks_of(model)[-1].register_forward_hook(added)):
        found = attribute(model)
    assert float(found.components["edit_shares"][0, 2]) > 0.05
    assert found.components["edit_shares"][:, :2].sum() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_tells_edits_from_its_mlp(family):
    model = tiny(family, seed=1)  # with seed 0 the edit of one family cancels its stream, which is refused
    with placed(blocks_of(model)[1].register_forward_hook(added)):
        found = attribute(model)
    edits = found.components["edit_shares"]
    assert float(edits[0, 1]) > 0.02
    assert edits[:, [0, 2]].sum() == 0
    assert found.closure_error < 1e-5
    assert "edit_shares" not in attribute(model).components


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gptj", "granite", "gemma2"])
def test_rounding_is_no_edit(family, dtype):
    assert "edit_shares" not in attribute(tiny(family).to(dtype)).components


def test_an_edit_of_one_position_counts_for_that_position():
    model = tiny("llama", seed=3)

    def one(module, args, output):
        output = output.clone()
        output[:, TARGET.start + 1] += VECTOR * output.abs().mean()
        return output

    with placed(blocks_of(model)[0].register_forward_hook(one)):
        rows = IFR(model).attribute_ids(IDS, prompt_length=PROMPT, target=TARGET)
        alone = [
            IFR(model).attribute_ids(IDS, prompt_length=PROMPT, target=Span(i, i + 1)).components.get("edit_shares")
            for i in range(TARGET.start, TARGET.stop)
        ]
    assert [share is not None for share in alone] == [False, True, False, False]
    torch.testing.assert_close(rows.components["edit_shares"][0] * 4, alone[1][0])
    assert float(rows.components["edit_shares"][0, 0]) > 0.01


@pytest.mark.parametrize("method", [FlashTrace, RecursiveAttribution, IFR])
def test_every_method_that_divides_the_stream_names_edits(method):
    model = tiny("qwen3", seed=3)
    with placed(blocks_of(model)[1].register_forward_hook(added)):
        found = attribute(model, method)
    assert float(found.components["edit_shares"][0, 1]) > 0.05
    again = type(found).from_dict(found.to_dict())
    assert torch.equal(again.stream_shares, found.stream_shares)


@pytest.mark.parametrize("method", ["flashtrace", "alti", "ifr"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("put", ["another text's", "half of it"])
def test_a_stream_that_is_replaced_is_refused(method, family, put):
    """Of what is thrown away nothing may be followed, and L1 proximity cannot tell it from what is put there."""
    model = tiny(family, seed=2)
    other = random_ids(24, seed=9)
    patched = [] if put == "half of it" else [model(other[None], output_hidden_states=True).hidden_states[2].detach()]
    found, spans = METHODS[method](model), {"prompt_length": PROMPT, "target": TARGET}
    found.attribute_ids(IDS, **spans)
    hook = blocks_of(model)[1].register_forward_hook(lambda m, a, o: _put(o, patched))
    with placed(hook), pytest.raises(ClosureError, match="layer 1: a hook replaced the stream"):
        found.attribute_ids(IDS, **spans)


def _put(output, patched):
    old = output if isinstance(output, torch.Tensor) else output[0]
    new = patched[0][:, : old.shape[1]] if patched else old / 2
    return new if isinstance(output, torch.Tensor) else (new, *output[1:])


def test_shares_with_edits_by_hand():
    """Layer 1 of 2: MLP .4, edit .1, so mid .5 of which half bypasses; layer 2: MLP .5, mid .5, .8 of it bypasses."""
    args = torch.tensor([[0.5, 0.8]]), torch.tensor([[0.4, 0.5]]), torch.tensor([[0.1, 0.0]])
    expected = torch.tensor([[0.25 * 0.4, 0.25 * 0.4, 0.4 * 0.4, 0.1 * 0.4, 0.2 * 0.5, 0.5, 0.0]])
    torch.testing.assert_close(final_stream_shares(*args), expected)


def test_a_change_inside_a_block_is_no_edit_of_the_stream():
    """What the MLP reads is not the stream, so nothing says which part of it the hook replaced."""
    model = tiny("llama")
    hook = blocks_of(model)[1].post_attention_layernorm.register_forward_pre_hook(lambda m, a: (a[0] + VECTOR,))
    with placed(hook), pytest.raises(ClosureError, match=r"llama, layer 1: .*hook"):
        attribute(model)

"""What the TransformerLens adapter refuses, with the value, the bound and the way out."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformer_lens")

from flashtrace_lens import boot, bridge_for, flashtrace, names_filter
from flashtrace_lens.host import require_host
from flashtrace_plugin import ClosureError, FlashTrace, InputError, Span, SpanError, UnsupportedModelError
from tests.tiny import random_ids, tiny, tiny_tokenizer

IDS = random_ids(24, seed=4)


@pytest.fixture(scope="module")
def bridge():
    return bridge_for(tiny("llama"))


def test_processed_weights_are_refused(bridge):
    folded = bridge_for(tiny("llama"))
    folded.enable_compatibility_mode()
    with pytest.raises(UnsupportedModelError, match=r"folded norms.*no_processing=True"):
        flashtrace(folded, IDS, target=-1)


def test_weights_processed_between_calls_are_refused():
    later = bridge_for(tiny("llama"))
    method = FlashTrace(later)
    later.process_weights()
    with pytest.raises(UnsupportedModelError, match="folded norms"):
        method.attribute_ids(IDS, prompt_length=8, target=Span(20, 24))


def test_a_missing_hook_is_named_with_its_remedy(bridge):
    _, cache = bridge.run_with_cache(IDS, names_filter=lambda name: names_filter(name) and "pattern" not in name)
    message = r"lacks blocks\.0\.attn\.hook_pattern; .*names_filter=flashtrace_lens\.names_filter"
    with pytest.raises(InputError, match=message):
        flashtrace(bridge, IDS, target=-1, cache=cache)


def test_a_cache_of_other_tokens_is_refused(bridge):
    _, cache = bridge.run_with_cache(IDS[:-3], names_filter=names_filter)
    with pytest.raises(InputError, match=r"holds \[21\] positions, the sequence has 24"):
        flashtrace(bridge, IDS, target=-1, cache=cache)


def test_a_sliced_cache_is_refused(bridge):
    _, cache = bridge.run_with_cache(IDS, names_filter=names_filter, pos_slice=(0, 10))
    with pytest.raises(InputError, match="without pos_slice"):
        flashtrace(bridge, IDS, target=-1, cache=cache)


def test_a_cache_of_several_sequences_is_refused(bridge):
    _, cache = bridge.run_with_cache(torch.stack([IDS, IDS]), names_filter=names_filter)
    with pytest.raises(InputError, match="several sequences"):
        flashtrace(bridge, IDS, target=-1, cache=cache)


def test_a_cache_of_another_bridge_is_refused(bridge):
    _, cache = bridge_for(tiny("llama")).run_with_cache(IDS, names_filter=names_filter)
    with pytest.raises(InputError, match="this very bridge"):
        flashtrace(bridge, IDS, target=-1, cache=cache)


def test_anything_but_a_bridge_is_refused():
    with pytest.raises(UnsupportedModelError, match="got LlamaForCausalLM; boot one with"):
        flashtrace(tiny("llama"), IDS, target=-1)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (24, "after the last of 24"),
        ((20, 30), "after the last of 24"),
        ((9, 9), "empty"),
        ((-30, 4), "negative"),
        ("x", "without a tokenizer only positions are known"),
        (None, "without a tokenizer no answer can be found"),
        (2.5, "must be .* one position"),
        ((1, 2, 3), "must be .* one position"),
        (slice(2, 9, 2), "a slice without step"),
    ],
)
def test_positions_outside_the_text(bridge, target, message):
    told = {"prompt_length": 4} if target is None or isinstance(target, str) else {}
    with pytest.raises(SpanError, match=message):
        flashtrace(bridge, IDS, target=target, **told)


@pytest.mark.parametrize("spans", [{}, {"target": "x"}, {"target": -1, "reasoning": "x"}, {"reasoning": (4, 9)}])
def test_texts_are_looked_for_behind_the_prompt_only(bridge, spans):
    with pytest.raises(InputError, match=r"say where it begins: pass prompt_length"):
        flashtrace(bridge, IDS, **spans)


@pytest.mark.parametrize("length", [0, 24, 30, 4.0])
def test_a_prompt_length_that_leaves_nothing(bridge, length):
    with pytest.raises((SpanError, InputError), match=r"the prompt has|prompt_length must be"):
        flashtrace(bridge, IDS, target=-1, prompt_length=length)


@pytest.mark.parametrize("ids", [torch.tensor([1.0, 2.0]), torch.zeros(2, 9, dtype=torch.long), [5, -1], [5, 9999]])
def test_ids_that_are_none(bridge, ids):
    with pytest.raises(InputError, match=r"input_ids must be|outside the vocabulary|one text at a time"):
        flashtrace(bridge, ids, target=-1)


def test_units_and_hops_that_do_not_exist(bridge):
    result = flashtrace(bridge, IDS, target=-1)
    with pytest.raises(InputError, match="'token', 'head', 'component', got 'layer'"):
        result.top(3, unit="layer")
    with pytest.raises(InputError, match="hop 7 does not exist; this result has hops 0 to 1"):
        result.top(3, hop=7)


def test_a_text_without_tokenizer(bridge):
    with pytest.raises(InputError, match="no tokenizer"):
        flashtrace(bridge, "some text", target=-1)


def test_edits_between_heads_and_stream_do_not_add_up_and_hooks_are_gone(bridge):
    with (
        bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * 2)]),
        pytest.raises(ClosureError, match="layer 1"),
    ):
        flashtrace(bridge, IDS, target=-1)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())
    assert flashtrace(bridge, IDS, target=-1).closure_error < 2e-6


def test_a_bridge_that_computes_something_else_is_refused():
    wrong = bridge_for(tiny("llama"))
    other = tiny("llama", seed=1)
    boot._agreeing.discard(wrong)
    with pytest.raises(ClosureError, match=r"other logits than the LlamaForCausalLM it wraps \(relative gap"):
        boot.verify(wrong, IDS[None], reference=other)
    assert not boot.is_verified(wrong)


def test_activations_that_are_not_finite():
    model = tiny("llama")
    bridge = bridge_for(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="not finite"):
        flashtrace(bridge, IDS, target=-1)


@pytest.mark.parametrize("old", ["2.16.1", "3.5.1", "4.0.0b1"])
def test_an_old_transformer_lens(monkeypatch, old):
    monkeypatch.setattr("flashtrace_lens.host.version", lambda name: old)
    with pytest.raises(
        ImportError, match=rf"4\.3 or newer, found {old}: pip install \"flashtrace-plugin\[transformer-lens\]\""
    ):
        require_host()


def test_no_transformer_lens(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("flashtrace_lens.host.version", absent)
    with pytest.raises(ImportError, match=r"pip install \"flashtrace-plugin\[transformer-lens\]\""):
        require_host()


def test_importing_the_adapter_does_not_import_the_host():
    code = "import sys, flashtrace_lens; sys.exit('transformer_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tokenizer_is_not_changed():
    tokenizer = tiny_tokenizer()
    before = dict(tokenizer.init_kwargs)
    bridge_for(tiny("llama"), tokenizer)
    assert tokenizer.init_kwargs == before

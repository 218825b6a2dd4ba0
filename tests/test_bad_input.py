"""Bad input gets an error of our own with the value, the bound and the remedy, and the model stays as it was."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from flashtrace_plugin import (
    IFR,
    FlashTrace,
    FlashTraceError,
    InputError,
    RecursiveAttribution,
    Span,
    SpanError,
    UnsupportedModelError,
)
from tests.tiny import random_ids, tiny

IDS = random_ids(20)
SPANS = {"prompt_length": 8, "target": Span(15, 18), "reasoning": Span(9, 14)}


def state(model: nn.Module) -> dict:
    """Everything about a model that a call must not change."""
    return {
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "attention": model.config._attn_implementation,
        "training": [m.training for m in model.modules()],
        "grad": [(p.requires_grad, p.grad) for p in model.parameters()],
        "forwards": ["forward" in m.__dict__ for m in model.modules()],
        "weights": [p.data_ptr() for p in model.parameters()],
    }


@pytest.mark.parametrize("method", [FlashTrace, IFR, RecursiveAttribution])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_model_is_left_as_it_was_found(method, kernel):
    model = tiny("llama")
    model.set_attn_implementation(kernel)
    model.train()
    model.lm_head.eval()
    before = state(model)
    method(model).attribute_ids(IDS, **SPANS)
    assert state(model) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_model_is_left_as_it_was_found_after_an_interruption(error):
    model = tiny("llama").train()

    def interrupt(*_):
        raise error

    handle = model.model.layers[2].mlp.register_forward_hook(interrupt)
    before = state(model)
    with pytest.raises(error):
        FlashTrace(model).attribute_ids(IDS, **SPANS)
    assert state(model) == before
    handle.remove()
    FlashTrace(model).attribute_ids(IDS, **SPANS)


def test_dropout_is_switched_off_for_the_call():
    model = tiny("llama", attention_dropout=0.5)
    expected = FlashTrace(model).attribute_ids(IDS, **SPANS)
    assert FlashTrace(model.train()).attribute_ids(IDS, **SPANS) == expected and model.training


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS.float(), "must be integers, got torch.float32"),
        (IDS.reshape(2, 10), r"must be \[N\] or \[1, N\], got \[2, 10\]"),
        (torch.cat([IDS, torch.tensor([512])]), "token id 512 is outside the vocabulary 0..511"),
        (torch.cat([torch.tensor([-1]), IDS]), "token id -1 is outside"),
        (random_ids(129), "the sequence has 129 tokens, the model has 128 positions"),
    ],
)
def test_ids_the_model_cannot_take_are_refused(ids, message):
    with pytest.raises(InputError, match=message):
        FlashTrace(tiny("llama")).attribute_ids(ids, **SPANS)


def test_a_batch_of_one_is_one_sequence():
    method = FlashTrace(tiny("llama"))
    assert method.attribute_ids(IDS[None], **SPANS) == method.attribute_ids(IDS, **SPANS)


def test_spans_are_checked_before_the_model_runs():
    with pytest.raises(SpanError, match="outside the generation"):
        FlashTrace(tiny("llama")).attribute_ids(IDS, prompt_length=8, target=Span(4, 7))


@pytest.mark.parametrize("hops", [-1, 1.5, True, "2"])
def test_hops_must_be_a_whole_number(hops):
    for method in (FlashTrace, RecursiveAttribution):
        with pytest.raises(InputError, match=r"hops must be a whole number >= 0"):
            method(tiny("llama"), hops=hops)


def test_unknown_options_name_the_known_ones():
    with pytest.raises(InputError, match="positions must be one of 'token', 'predicting', got 'last'"):
        FlashTrace(tiny("llama"), positions="last")
    with pytest.raises(InputError, match="recursion must be one of"):
        FlashTrace(tiny("llama"), recursion="all")


def test_a_target_of_ignored_tokens_is_refused():
    with pytest.raises(InputError, match="all tokens of target 15:18 are ignored"):
        FlashTrace(tiny("llama"), ignore=IDS.tolist()).attribute_ids(IDS, **SPANS)


@pytest.mark.parametrize("target", [1.5, True, slice(1, 9, 2), (1, 2, 3), (1.0, 2.0)])
def test_what_is_not_a_span_is_refused(target):
    with pytest.raises(SpanError, match=r"target must be a Span\(start, stop\)"):
        FlashTrace(tiny("llama")).attribute_ids(IDS, prompt_length=8, target=target)


def test_a_text_needs_a_tokenizer_and_a_position_lies_in_the_generation():
    method = FlashTrace(tiny("llama"))
    with pytest.raises(SpanError, match="without a tokenizer only positions are known"):
        method.attribute_ids(IDS, prompt_length=8, target="x")
    with pytest.raises(SpanError, match="target 3:4 is outside the generation 8:"):
        method.attribute_ids(IDS, prompt_length=8, target=3)
    with pytest.raises(SpanError, match="without a tokenizer no answer can be found"):
        method.attribute_ids(IDS, prompt_length=8)


def test_python_ranges_are_spans():
    method = FlashTrace(tiny("llama"))
    expected = method.attribute_ids(IDS, **SPANS)
    assert method.attribute_ids(IDS, prompt_length=8, target=(15, 18), reasoning=slice(9, 14)) == expected
    length = len(IDS)
    counted_from_the_end = slice(15 - length, 18 - length or None)
    assert method.attribute_ids(IDS, prompt_length=8, target=counted_from_the_end, reasoning=[9, 14]) == expected


def test_a_prompt_length_is_a_whole_number():
    with pytest.raises(InputError, match=r"prompt_length must be a whole number of tokens, got 8\.0"):
        FlashTrace(tiny("llama")).attribute_ids(IDS, prompt_length=8.0, target=Span(15, 18))


@pytest.mark.parametrize("ignore", ["the", [1.5], 5])
def test_ignore_is_a_list_of_tokens(ignore):
    with pytest.raises(InputError, match="ignore must be a list of tokens"):
        FlashTrace(tiny("llama"), ignore=ignore)


def test_mpt_names_its_positions_otherwise():
    config = transformers.MptConfig(vocab_size=512, d_model=16, n_heads=2, n_layers=1, max_seq_len=16)
    with pytest.raises(InputError, match="the sequence has 20 tokens, the model has 16 positions"):
        FlashTrace(transformers.MptForCausalLM(config)).attribute_ids(IDS, **SPANS)


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        FlashTrace(transformers.T5ForConditionalGeneration(config))


def test_models_without_a_language_model_head_and_other_objects_are_refused():
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        FlashTrace(tiny("llama").model)
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        FlashTrace(nn.Linear(2, 2))


def test_an_unknown_family_names_the_known_ones():
    config = transformers.RwkvConfig(vocab_size=512, hidden_size=16, num_hidden_layers=2, context_length=64)
    with pytest.raises(UnsupportedModelError, match=r"'rwkv' is not supported; supported are .*gpt2.*llama"):
        FlashTrace(transformers.RwkvForCausalLM(config)).attribute_ids(IDS, **SPANS)


def test_activations_that_are_not_finite_are_refused():
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    before = state(model)
    with pytest.raises(InputError, match="not finite"):
        FlashTrace(model).attribute_ids(IDS, **SPANS)
    assert state(model) == before


def test_every_error_is_one_that_a_caller_can_catch():
    for error in (InputError, SpanError, UnsupportedModelError):
        assert issubclass(error, FlashTraceError) and issubclass(error, ValueError)

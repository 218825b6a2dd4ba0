"""attribute_batch: texts that share passes and hops have the numbers that they have alone, and fail alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from flashtrace_plugin import FlashTrace, RecursiveAttribution
from flashtrace_plugin.core.flow.hop import hops_together, one_hop
from flashtrace_plugin.errors import CostError, InputError, ReasoningWarning, SpanError
from flashtrace_plugin.methods import METHODS, batch
from flashtrace_plugin.models.read import capture as capturing
from flashtrace_plugin.models.read.capture import capture, capture_together, together_gap
from flashtrace_plugin.models.read.recurrence import keeps_state
from tests.tiny import FAMILIES, random_ids, tiny, tiny_tokenizer

LENGTHS = (24, 31, 28)
ROWS = [torch.arange(length - 14, length - 1) for length in LENGTHS]
PROMPT = "The key of the red box is in the garden. Question: where is the key?"
ENDS = ("It is in the garden.", "In the garden, I think.", "Garden.", "The key is in the kitchen.")
GENERATIONS = [f"<think>\nThe box is red.\n</think>\n{end}" for end in ENDS]
PROMPTS = [PROMPT] * len(ENDS)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def passes(monkeypatch):
    """How many texts each forward pass of a batch held."""
    seen, run = [], capturing._layers

    def counted(recorders):
        seen.append(len(recorders[0].texts.rows))
        return run(recorders)

    monkeypatch.setattr(capturing, "_layers", counted)
    return seen


def texts():
    return [random_ids(length, seed=length) for length in LENGTHS]


def assert_same(one, other):
    assert (one.tokens, one.target, one.reasoning, one.method) == (
        other.tokens,
        other.target,
        other.reasoning,
        other.method,
    )
    assert one.settings.keys() == other.settings.keys() and one.hops == other.hops
    for name in ("scores", "hop_scores", "reasoning_mass", "head_scores", "residual_shares", "mlp_shares"):
        a, b = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# Layers


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_padded_beside_others_have_the_hop_that_they_have_alone(family, passes):
    model = tiny(family)
    together = capture_together(model, texts(), ROWS)
    if keeps_state(model):  # a recurrence is run on one text
        assert passes == [1] * len(LENGTHS)
        return
    assert passes == [len(LENGTHS)]
    assert together_gap(model, texts()) < 1e-5
    generator = torch.Generator().manual_seed(0)
    # Of different rows in every text, some of them without weight.
    weights = [
        torch.rand(len(rows), generator=generator) * (torch.arange(len(rows)) > 4 * i) for i, rows in enumerate(ROWS)
    ]
    found = hops_together(together, weights, LENGTHS)
    for ids, rows, w, shares in zip(texts(), ROWS, weights, found, strict=True):
        alone = one_hop(capture(model, ids[None], rows), w, len(ids))
        for name in ("alpha", "head_shares", "residual_shares", "mlp_shares"):
            a, b = getattr(alone, name), getattr(shares, name)
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
        assert shares.closure_error < 1e-5


def test_what_follows_a_row_keeps_texts_apart_where_it_matters(passes):
    model = tiny("llama")
    handle = model.model.layers[1].register_forward_hook(lambda m, args, out: out)
    capture_together(model, texts(), ROWS)
    assert passes == [1, 1, 1]
    handle.remove()
    capture_together(model, texts(), ROWS)
    assert passes == [1, 1, 1, 3]
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    capture_together(tiny("llama", rope_parameters=dynamic), texts(), ROWS)
    assert passes[4:] == [1, 1, 1]


def test_a_model_whose_logits_padding_changes_runs_text_by_text(passes, monkeypatch):
    model = tiny("llama")
    forward = type(model.model).forward

    def counting(self, input_ids=None, **options):
        found = forward(self, input_ids=input_ids, **options)
        found.last_hidden_state.mul_(input_ids.shape[1])
        return found

    monkeypatch.setattr(type(model.model), "forward", counting)
    capture_together(model, texts(), ROWS)
    assert passes == [1, 1, 1]


def test_half_precision_keeps_its_numbers(tokenizer):
    method = FlashTrace(tiny("llama", dtype=torch.bfloat16), tokenizer)
    for found, generation in zip(method.attribute_batch(PROMPTS, GENERATIONS), GENERATIONS, strict=True):
        assert_same(method.attribute(PROMPT, generation), found)


# Texts


@pytest.mark.parametrize("name", [name for name in METHODS if name != "heta"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_every_method_gives_the_numbers_of_one_by_one(family, name, tokenizer):
    method = METHODS[name](tiny(family), tokenizer)
    for found, generation in zip(method.attribute_batch(PROMPTS, GENERATIONS), GENERATIONS, strict=True):
        assert_same(method.attribute(PROMPT, generation), found)


@pytest.mark.parametrize(
    "options",
    [{"hops": 0}, {"hops": "auto"}, {"hops": 3, "positions": "predicting", "ignore": ["."]}, {"recursion": "prompt"}],
)
def test_texts_whose_hops_end_at_different_times(options, tokenizer):
    method = FlashTrace(tiny("qwen3"), tokenizer, **options)
    generations = [*GENERATIONS[:2], "There is no thinking in this one, at all."]
    targets = [None, "garden", None]
    with pytest.warns() if options.get("hops") == 3 else _nothing():
        found = method.attribute_batch(PROMPTS[:3], generations, targets=targets)
        for one, generation, target in zip(found, generations, targets, strict=True):
            assert_same(method.attribute(PROMPT, generation, target=target), one)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def test_steered_and_gated_heads_and_all_hops_at_once(tokenizer):
    gated = FlashTrace(tiny("qwen3_next"), tokenizer)
    all_hops = RecursiveAttribution(tiny("qwen3"), tokenizer, hops=float("inf"))
    for method in (gated, all_hops):
        for found, generation in zip(method.attribute_batch(PROMPTS, GENERATIONS), GENERATIONS, strict=True):
            assert_same(method.attribute(PROMPT, generation), found)


def test_nearly_one_length_runs_together_longest_first(tokenizer, passes, monkeypatch):
    method = FlashTrace(tiny("llama"), tokenizer, hops=0)
    prompts = [PROMPT, PROMPT, "Where?", "Where is it?", PROMPT]
    method.attribute_batch(prompts, [" Here."] * 5)
    assert passes == [3, 2] or passes == [3, 1, 1]
    passes.clear()
    monkeypatch.setattr(batch, "_TOKENS", 60)
    method.attribute_batch(prompts, [" Here."] * 5)
    assert max(passes) == 2


# Errors


def test_one_bad_text_takes_no_other_with_it(tokenizer):
    method = FlashTrace(tiny("qwen3"), tokenizer)
    prompts = [PROMPT, PROMPT, PROMPT, None, PROMPT * 20, PROMPT]
    generations = [GENERATIONS[0], "", GENERATIONS[1], "x", GENERATIONS[0], GENERATIONS[2]]
    targets = [None, None, "kitchen", None, None, None]
    found = method.attribute_batch(prompts, generations, targets=targets, errors="return")
    assert [type(one) for one in found[1:5]] == [InputError, SpanError, InputError, InputError]
    assert "128 positions" in str(found[4])
    for i in (0, 5):
        assert_same(method.attribute(prompts[i], generations[i]), found[i])
    with pytest.raises(InputError) as caught:
        method.attribute_batch(prompts, generations, targets=targets)
    assert str(caught.value) == str(found[1])
    with pytest.raises(InputError, match="errors must be one of 'raise', 'return', got 'skip'"):
        method.attribute_batch(prompts, generations, errors="skip")


def test_a_text_that_fails_while_it_runs_fails_alone(tokenizer, monkeypatch):
    model = tiny("qwen3")
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("Z")["input_ids"][0]] = torch.nan
    method = FlashTrace(model, tokenizer)
    generations = [*GENERATIONS[:2], GENERATIONS[2].replace("red", "Z")]
    found = method.attribute_batch(PROMPTS[:3], generations, errors="return")
    assert isinstance(found[2], InputError) and "not finite" in str(found[2])
    for one, generation in zip(found[:2], generations, strict=False):
        assert_same(method.attribute(PROMPT, generation), one)


def test_costs_are_bounded_text_by_text(tokenizer):
    method = FlashTrace(tiny("qwen3"), tokenizer, hops=1, max_cost=1.2)
    with pytest.warns(ReasoningWarning):
        found = method.attribute_batch(PROMPTS[:2], [GENERATIONS[0], " No thinking here."], errors="return")
    assert isinstance(found[0], CostError)
    assert found[1].reasoning is None and found[1].hops == 1


def test_the_code_of_the_page_runs():
    page = (Path(__file__).parent.parent / "docs" / "batches.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "docs/batches.md", "exec"), names)
    assert list(names["bad"]) == [1] and len(names["found"]) == 4


def test_no_texts_are_no_results(tokenizer):
    assert FlashTrace(tiny("qwen3"), tokenizer).attribute_batch([], []) == []

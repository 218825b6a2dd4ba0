"""HETA in Inseq: a column for each generated token, one for a span, and its three terms."""

from __future__ import annotations

import warnings

import pytest
import torch

inseq = pytest.importorskip("inseq")

import flashtrace_inseq  # noqa: E402
from flashtrace_plugin import HETA, Span  # noqa: E402
from flashtrace_plugin.errors import InputError, ReasoningWarning  # noqa: E402
from tests.tiny import tiny, tiny_tokenizer  # noqa: E402

PROMPT = "The key is in the garden."
TEXT = PROMPT + "<think>\nRed.\n</think>\nThe box is red."
FAST = {"curvature": "gradient_squared"}


@pytest.fixture(scope="module")
def hf():
    return tiny("qwen3")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(hf, tokenizer):
    return inseq.load_model(hf, "heta", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return torch.tensor(tokenizer(TEXT)["input_ids"])


@pytest.fixture(scope="module")
def prompt_length(tokenizer):
    return len(tokenizer(PROMPT)["input_ids"])


@pytest.fixture(scope="module")
def out(model):
    return model.attribute(PROMPT, TEXT, show_progress=False, **FAST)


def assert_column(item, column, expected):
    """One column, part by part, NaN from its token on."""
    scores = item.target_attributions[:, column]
    before = expected.target.start
    parts = {"total": expected.totals, "hop 0": expected.hop_scores[0], **expected.components}
    assert set(parts) <= set(item._parts)
    for name, value in parts.items():
        torch.testing.assert_close(scores[:before, item._parts.index(name)], value[:before], rtol=1e-4, atol=1e-6)
    assert scores[before:].isnan().all()


def test_every_generated_token_has_a_column(hf, tokenizer, ids, prompt_length, out):
    item = out[0]
    assert item._parts == ["total", "hop 0", "gate", "curvature", "information"]
    assert item.target_attributions.shape == (len(ids), len(ids) - prompt_length, 5)
    assert [t.id for t in item.target] == ids.tolist()
    core = HETA(hf, tokenizer, **FAST)
    for column in (0, 3, len(ids) - prompt_length - 1):
        position = prompt_length + column
        expected = core.attribute_ids(ids, prompt_length=prompt_length, target=Span(position, position + 1))
        assert_column(item, column, expected)


def test_a_target_is_one_merged_column(hf, tokenizer, model):
    found = model.attribute(PROMPT, TEXT, target="box is red.", gamma=0.25, probes=2, rescale="max")
    core = HETA(hf, tokenizer, gamma=0.25, probes=2, rescale="max")
    expected = core.attribute(PROMPT, TEXT[len(PROMPT) :], target="box is red.")
    assert found[0].target[-1].token == "ĠboxĠisĠred."
    assert found[0].target_attributions.shape[1] == 1
    assert_column(found[0], 0, expected)


def test_positions_choose_columns_and_terms_are_chosen_by_name(model, out):
    few = model.attribute(PROMPT, TEXT, attr_pos_start=-3, attr_pos_end=-1, **FAST)
    torch.testing.assert_close(
        few[0].target_attributions, out[0].target_attributions[:-1, -3:-1], equal_nan=True, rtol=1e-4, atol=1e-6
    )
    for index, part in enumerate(out[0]._parts):
        chosen = out.aggregate(part=part)[0].target_attributions
        torch.testing.assert_close(chosen, out[0].target_attributions[..., index], equal_nan=True)
    with pytest.raises(InputError, match="no part 'hop 1'; there are total, hop 0, gate"):
        out.show(hop=1)


def test_presets_and_options(model):
    found = model.attribute(PROMPT, TEXT, target="red.", preset="GS", gate=None, mask=None)
    (a,) = flashtrace_inseq.attributions(found)
    assert (a.settings["curvature"], a.settings["gate"], a.settings["mask"]) == ("gradient_squared", None, None)
    assert found[0]._parts == ["total", "hop 0", "gate", "curvature"]
    assert found.info["attribution_args"] == {"target": "red.", "preset": "GS", "gate": None, "mask": None}
    with pytest.raises(InputError, match="preset must be one of 'full', 'LR'"):
        model.attribute(PROMPT, TEXT, preset="fast")
    with pytest.raises(InputError, match="beta must be a finite number >= 0, got -1"):
        model.attribute(PROMPT, TEXT, beta=-1.0)


def test_hops_follow_the_thinking_of_tokens_after_it(model, prompt_length):
    found = model.attribute(PROMPT, TEXT, hops=1, show_progress=False, **FAST)
    every = flashtrace_inseq.attributions(found)
    first_after = next(a for a in every if a.reasoning is not None)
    assert first_after.text(first_after.reasoning).strip() == "Red."
    assert all((a.reasoning is None) == (a.target.start < first_after.target.start) for a in every)
    assert "hop 1" in found[0]._parts
    chosen = model.attribute(PROMPT, TEXT, hops=1, reasoning="Red.", attr_pos_end=prompt_length + 8, **FAST)
    assert flashtrace_inseq.attributions(chosen)[0].reasoning is None


def test_hops_that_no_token_can_follow_are_said_out_loud(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.attribute(PROMPT, TEXT, hops=1, show_progress=False, **FAST)
    with pytest.warns(ReasoningWarning, match="heta: 1 hop was asked for, but no reasoning was found"):
        model.attribute(PROMPT, PROMPT + " Red.", hops=1, show_progress=False, **FAST)


def test_ignored_tokens_have_a_column_of_zeros(hf, tokenizer, model, ids, prompt_length):
    item = model.attribute(PROMPT, TEXT, ignore=["."], show_progress=False, **FAST)[0]
    left_out = [tokenizer.decode(i).strip() == "." for i in ids]
    assert item.target_attributions.shape == (len(ids), len(ids) - prompt_length, 5) and any(left_out[prompt_length:])
    for column, position in enumerate(range(prompt_length, len(ids))):
        scores = item.target_attributions[:, column]
        assert scores[position:].isnan().all() and bool((scores[:position] == 0).all()) == left_out[position]
        assert (scores[:position, 0][torch.tensor(left_out[:position])] == 0).all()
    assert len(item._attributions) == len(ids) - prompt_length - sum(left_out[prompt_length:])
    with pytest.raises(InputError, match="are ignored; ignore fewer"):
        model.attribute(PROMPT, TEXT, ignore=["."], attr_pos_start=-1, **FAST)


def test_turn_ends_have_no_column_and_positions_are_read_as_in_python(hf, ids, prompt_length):
    chat = tiny_tokenizer()
    chat.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    model = inseq.load_model(hf, "heta", tokenizer=chat)
    item = model.attribute(PROMPT, TEXT + "<|im_end|>", show_progress=False, **FAST)[0]
    assert item.target_attributions.shape[:2] == (len(ids), len(ids) - prompt_length)
    for where, span in ((-1, Span(len(ids) - 1, len(ids))), (slice(-3, None), Span(len(ids) - 3, len(ids)))):
        (a,) = flashtrace_inseq.attributions(model.attribute(PROMPT, TEXT, target=where, **FAST))
        assert a.target == span
        torch.testing.assert_close(
            a.scores, HETA(hf, chat, **FAST).attribute(PROMPT, TEXT[len(PROMPT) :], target=where).scores
        )


def test_by_name_and_as_object_give_the_same(model, hf, tokenizer, tmp_path):
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    by_name = inseq.load_model(str(tmp_path), "heta")
    results = [m.attribute(PROMPT, TEXT, target="box is red.", probes=2) for m in (by_name, model)]
    scores = [found[0].target_attributions for found in results]
    torch.testing.assert_close(*scores, equal_nan=True, rtol=1e-3, atol=1e-5)
    assert hf.config._attn_implementation == "sdpa"
    assert all(p.grad is None and p.requires_grad for p in hf.parameters())


def test_files_show_and_tables(out, model, tmp_path):
    span = model.attribute(PROMPT, TEXT, target="box is red.", **FAST)
    for found in (out, span, out.aggregate(part="gate")):
        path = tmp_path / "out.json"
        found.save(path, overwrite=True)
        loaded = inseq.FeatureAttributionOutput.load(path)
        assert loaded == found
        assert flashtrace_inseq.attributions(loaded) == flashtrace_inseq.attributions(found)
        for show in (found.show, found.show_tokens, found.show_granular):
            assert "garden" in show(display=False, return_html=True)
        assert found.get_scores_dicts()[0]["target_attributions"]


def test_another_attributed_function_is_refused(model, capsys):
    with pytest.raises(InputError, match="'heta' explains the log-probability of the target; leave attributed_fn out"):
        model.attribute(PROMPT, TEXT, attributed_fn="logit")
    with pytest.raises(ValueError, match="Step scores are not supported"):
        model.attribute(PROMPT, TEXT, step_scores=["probability"])
    inseq.explain("heta")
    explained = capsys.readouterr().out
    assert all(f"\n    {option}: " in explained for option in flashtrace_inseq.HETAAttribution.options())

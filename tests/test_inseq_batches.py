"""Several inputs in Inseq: an input that fails takes no other with it, and its place holds the reason."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

inseq = pytest.importorskip("inseq")

import flashtrace_inseq  # noqa: E402
from flashtrace_plugin import LRP, Attribution  # noqa: E402
from flashtrace_plugin.errors import InputError, SpanError  # noqa: E402
from tests.tiny import tiny, tiny_tokenizer  # noqa: E402

PROMPT = "The key of the red box is in the garden. Question: where is the key?"
GENERATION = "<think>\nThe box is red.\n</think>\nIt is in the garden."
TEXT = PROMPT + GENERATION
BAD = [PROMPT, TEXT + " No." * 60]
QUIET = {"show_progress": False}


@pytest.fixture(scope="module")
def model():
    return inseq.load_model(tiny("qwen3"), "flashtrace", tokenizer=tiny_tokenizer())


def some_fail(model, method="flashtrace", **options):
    with pytest.warns(UserWarning, match="could not explain 2 of 4 inputs"):
        return model.attribute([PROMPT] * 4, [TEXT, *BAD, TEXT[:-1]], method=method, **options, **QUIET)


@pytest.fixture(scope="module")
def out(model):
    return some_fail(model)


def shown(out, **options):
    return out.show(display=False, return_html=True, **options)


CHEAPER = {"heta": {"curvature": "low_rank", "rank": 2}}


@pytest.mark.parametrize("method", ["flashtrace", "ifr", "recursive", "heta", "lrp"])
def test_the_place_of_a_bad_input_holds_the_reason(model, method):
    options = CHEAPER.get(method, {})
    out = some_fail(model, method, **options)
    told = flashtrace_inseq.failures(out)
    assert list(told) == [1, 2] and "nothing follows the prompt" in told[1] and "128 positions" in told[2]
    alone = [model.attribute(PROMPT, text, method=method, **options, **QUIET) for text in (TEXT, TEXT[:-1])]
    for item, one in zip((out[0], out[3]), alone, strict=True):
        torch.testing.assert_close(
            item.target_attributions, one[0].target_attributions, equal_nan=True, rtol=1e-4, atol=1e-5
        )
    assert (out.info["attr_pos_start"], out.info["attr_pos_end"]) == (
        min(one.info["attr_pos_start"] for one in alone),
        max(one.info["attr_pos_end"] for one in alone),
    )
    assert len(flashtrace_inseq.attributions(out)) == sum(len(flashtrace_inseq.attributions(one)) for one in alone)


@pytest.mark.parametrize(
    "how", [{}, {"compress": True}, {"ndarray_compact": False}, {"scores_precision": "float16"}], ids=str
)
def test_files_keep_the_reasons(out, tmp_path, how):
    path = tmp_path / ("out.json" + ".gz" * ("compress" in how))
    out.save(path, **how)
    loaded = inseq.FeatureAttributionOutput.load(path, decompress="compress" in how)
    assert flashtrace_inseq.failures(loaded) == flashtrace_inseq.failures(out)
    assert loaded == out or "scores_precision" in how


def test_one_file_for_each_sequence(out, tmp_path):
    out.save(tmp_path / "out.json", split_sequences=True)
    each = [inseq.FeatureAttributionOutput.load(tmp_path / f"out_{i}.json") for i in range(4)]
    assert [bool(flashtrace_inseq.failures(one)) for one in each] == [False, True, True, False]


def test_everything_that_shows_and_aggregates_goes_past_it(model, out, capsys):
    page = shown(out, hop=1)
    assert page.count("could not be explained: nothing follows the prompt") == 1
    out[1].show()
    assert "could not be explained" in capsys.readouterr().out
    for found in (
        out.aggregate(hop=0),
        out.aggregate("spans", target_spans=[(0, 3)]),
        out.aggregate(["units", "hops"]),
    ):
        assert list(flashtrace_inseq.failures(found)) == [1, 2]
    assert out.get_scores_dicts()[1]["target_attributions"] == {}
    for call in (out.show_tokens, out.show_granular):
        call(display=False, return_html=True)
    assert "Output" in repr(out)
    assert list(flashtrace_inseq.portable(out).info["failures"]) == ["1", "2"]
    out[1].decode_tokens(model.tokenizer)


def test_one_input_or_all_of_them_raise_as_ever(model):
    with pytest.raises(InputError, match="nothing follows the prompt"):
        model.attribute(PROMPT, PROMPT, **QUIET)
    with pytest.raises(InputError, match="nothing follows the prompt"):
        model.attribute([PROMPT] * 2, BAD, **QUIET)
    with pytest.raises(SpanError, match="kitchen"):
        model.attribute([PROMPT] * 2, [TEXT] * 2, target="kitchen", **QUIET)


def test_a_target_that_is_not_there_is_a_reason_too(model):
    with pytest.warns(UserWarning, match="1 of 2 inputs"):
        out = model.attribute([PROMPT] * 2, [TEXT] * 2, target=["kitchen", "garden"], **QUIET)
    assert "kitchen" in flashtrace_inseq.failures(out)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.attribute([PROMPT] * 2, [TEXT] * 2, target="garden", **QUIET)


# Files for other programs, and step scores


def test_primitives_are_read_as_attributions(model, tmp_path):
    out = model.attribute(PROMPT, TEXT, **QUIET)
    out.save(tmp_path / "out.json", use_primitives=True)
    saved = json.loads((tmp_path / "out.json").read_text())["sequence_attributions"][0]
    assert [Attribution.from_dict(one) for one in saved["_attributions"]] == flashtrace_inseq.attributions(out)


def test_there_are_no_step_scores_to_weigh_by(model, out):
    with pytest.raises(InputError, match="has no step score 'probability'; compute step scores with method='dummy'"):
        model.attribute(PROMPT, TEXT, **QUIET).weight_attributions("probability")


# The total


def test_the_total_counts_the_prompt_and_everywhere_the_markers_too(model):
    out = model.attribute(PROMPT, TEXT, hops=1, **QUIET)
    (found,) = flashtrace_inseq.attributions(out)
    stop, reasoning, target = found.prompt.stop, found.reasoning, found.target
    total = out.aggregate()[0].target_attributions[: target.start, 0]
    torch.testing.assert_close(total[:stop], found.scores)
    assert not total[stop:].any()
    everywhere = out.aggregate(part="everywhere")[0].target_attributions[: target.start, 0]
    torch.testing.assert_close(everywhere, found.source_totals[: target.start])
    assert everywhere[reasoning.stop :].sum() > 0.1, "what follows the reasoning, </think> among it"
    without = model.attribute(PROMPT, TEXT, hops=0, **QUIET).aggregate()[0].target_attributions
    assert without[reasoning.slice].sum() > 0.1, "reasoning that is not followed is a source like any other"


def test_positions_move_the_columns_of_ifr_under_the_tokens_whose_logits_they_explain(model):
    token = model.attribute(PROMPT, TEXT, method="ifr", target=[36, 38], **QUIET)[0].target_attributions
    before = model.attribute(PROMPT, TEXT, method="ifr", target=[37, 39], positions="predicting", **QUIET)
    torch.testing.assert_close(before[0].target_attributions[:36], token[:36])
    found = model.attribute(PROMPT, TEXT, method="recursive", positions="predicting", **QUIET)
    assert found.info["attribution_args"]["positions"] == "predicting"


# Contrasts


def test_lrp_explains_what_contrast_logits_diff_asks(model):
    asked = {"attributed_fn": "contrast_logits_diff", "contrast_targets": TEXT[:-1] + "!"}
    out = model.attribute(PROMPT, TEXT, method="lrp", **asked, **QUIET)
    (found,) = flashtrace_inseq.attributions(out)
    assert len(found.target) == 1 and found.settings["objective"] == "contrast"
    # Inseq's own value of the contrast at that token.
    steps = model.attribute(
        PROMPT,
        TEXT,
        method="dummy",
        step_scores=["contrast_logits_diff"],
        contrast_targets=asked["contrast_targets"],
        **QUIET,
    )
    values = steps[0].step_scores["contrast_logits_diff"]
    value = values[found.target.start - steps[0].attr_pos_start]
    assert found.settings["objective_value"] == pytest.approx(float(value), rel=1e-4)
    assert LRP(model.model).conservation_delta(found) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lrp", {"contrast_targets": TEXT}, "nothing differs"),
        ("lrp", {"contrast_targets": [TEXT] * 2}, "contrasts one text with another"),
        ("lrp", {}, "contrast_logits_diff with nothing"),
        ("lrp", {"contrast_targets": TEXT[:-1] + "!", "target": "red"}, "first differs at token .* leave out target"),
        ("heta", {"contrast_targets": TEXT[:-1] + "!"}, "'heta' explains the log-probability of the target"),
        ("flashtrace", {"contrast_targets": TEXT[:-1] + "!"}, "'flashtrace' explains the flow"),
    ],
)
def test_contrasts_that_are_refused(model, method, options, message):
    with pytest.raises(InputError, match=message):
        model.attribute(PROMPT, TEXT, method=method, attributed_fn="contrast_logits_diff", **options, **QUIET)


def test_a_contrast_is_of_one_input(model):
    with pytest.raises(InputError, match="one contrast for 2 inputs"):
        model.attribute(
            [PROMPT] * 2,
            [TEXT] * 2,
            method="lrp",
            attributed_fn="contrast_logits_diff",
            contrast_targets=TEXT[:-1] + "!",
            **QUIET,
        )

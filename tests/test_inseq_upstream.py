"""What Inseq 0.7.1's own tests check of a method, checked of ours beside Inseq's ``attention``.

Written from what its tests of attribution, aggregators, files and commands look at, on a tiny local decoder. What a
method of this package refuses instead is in ``REFUSED``, with the words that it is refused in.
"""

from __future__ import annotations

import json

import pytest
import torch

inseq = pytest.importorskip("inseq")

from inseq.commands.attribute_context import AttributeContextArgs, AttributeContextOutput  # noqa: E402
from inseq.commands.attribute_context.attribute_context import attribute_context  # noqa: E402
from inseq.data.aggregator import (  # noqa: E402
    AggregatorPipeline,
    ContiguousSpanAggregator,
    PairAggregator,
    SequenceAttributionAggregator,
    SubwordAggregator,
)

import flashtrace_inseq  # noqa: E402, F401
from tests.tiny import tiny, tiny_tokenizer  # noqa: E402

OURS = ("flashtrace", "ifr", "recursive", "alti", "lrp", "recommended", "heta")
METHODS = ("attention", *OURS)
PROMPT = "The keys of the reddish box are"
TEXT = PROMPT + " in the garden."
OTHER = PROMPT + " in the kitchen."
QUIET = {"show_progress": False}
PARTS, ONE_NUMBER = "would mix the parts of the score", "one number for each pair of tokens"
FAST: dict[str, dict] = {"attention": {}, "ifr": {}, "heta": {"curvature": None}}
"""Options with which a method answers at once; the others explain without hops, for there is no thinking here."""
REFUSED = {
    "step scores": dict.fromkeys(METHODS, "Step scores are not supported for final step methods"),
    "a contrast of probabilities": dict.fromkeys(OURS, "attributed_fn=contrast_prob_diff"),
    "scores aggregated over their last dimension": {m: ONE_NUMBER if m == "ifr" else PARTS for m in OURS}
    | {"attention": "should be 2-dimensional"},
}
"""What a method does not take, Inseq's own included, and the words in which that is said."""

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny("qwen3").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder):
    return inseq.load_model(folder, "attention")


def attributed(model, method, text=TEXT, **options):
    return model.attribute(PROMPT, text, method=method, **FAST.get(method, {"hops": 0}), **options, **QUIET)


def as_attention(check, method, call):
    """What a call gives, or nothing where the method refuses it in its words."""
    told = REFUSED[check].get(method)
    if told is None:
        return call()
    with pytest.raises((ValueError, RuntimeError), match=told):
        call()
    return None


# Attribution


@every_method
def test_scores_are_over_the_tokens_before_each_target(model, method):
    item = attributed(model, method)[0]
    rows, columns = item.target_attributions.shape[:2]
    assert rows == len(item.target) and columns == item.attr_pos_end - item.attr_pos_start
    assert item.attr_pos_start == len(item.source) and item.source_attributions is None
    scores = item.aggregate().target_attributions
    assert scores.shape == (rows, columns) and scores[:-columns].isfinite().all() and scores[-1, -1].isnan()


@every_method
def test_the_model_writes_what_is_not_given(model, method):
    out = attributed(model, method, None, generation_args={"max_new_tokens": 3})
    assert out.info["generated_texts"][0].startswith(PROMPT) and not out.info["constrained_decoding"]


@every_method
def test_several_inputs_are_those_alone(model, method):
    options = FAST.get(method, {"hops": 0})
    out = model.attribute([PROMPT] * 2, [TEXT, OTHER], method=method, **options, **QUIET)
    for item, text in zip(out, (TEXT, OTHER), strict=True):
        alone = attributed(model, method, text)[0]
        a, b = item.aggregate().target_attributions, alone.aggregate().target_attributions
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@every_method
def test_step_scores(model, method):
    as_attention("step scores", method, lambda: attributed(model, method, step_scores=["probability"]))


@every_method
def test_a_contrast(model, method):
    asked = {"attributed_fn": "contrast_prob_diff", "contrast_targets": OTHER, "contrast_targets_alignments": None}
    as_attention("a contrast of probabilities", method, lambda: attributed(model, method, **asked))


# Aggregators


@every_method
def test_spans_and_scores_in_either_order(model, method):
    item = attributed(model, method)[0]
    spans = {"target_spans": [(0, 3), (4, 6)]}
    merged = item.aggregate(ContiguousSpanAggregator, **spans)
    assert len(merged.target) == len(item.target) - 3
    assert merged.target_attributions.shape[:2] == (len(item.target) - 3, item.target_attributions.shape[1])
    own = ["mean", "mean"] if method == "attention" else ["hops"] if item.target_attributions.ndim == 3 else []
    for steps in ([ContiguousSpanAggregator, *own], [*own, ContiguousSpanAggregator]):
        found = item.aggregate(steps, **spans).target_attributions
        assert found.shape == (len(merged.target), item.target_attributions.shape[1])


@every_method
def test_a_pipeline_of_classes(model, method):
    item = attributed(model, method)[0]
    steps = AggregatorPipeline([ContiguousSpanAggregator, SequenceAttributionAggregator])
    check = "scores aggregated over their last dimension"
    found = as_attention(check, method, lambda: item.aggregate(steps, target_spans=[(0, 3)]))
    assert found is None or found.target_attributions.ndim == 2


@every_method
def test_subwords_are_merged_to_words(model, method):
    item = attributed(model, method)[0]
    words = item.aggregate([SubwordAggregator], special_chars="Ġ", aggregate_source=False)
    assert len(words.target) < len(item.target) and len(words.target) == words.target_attributions.shape[0]
    assert "".join(t.token for t in words.target) == "".join(t.token for t in item.target)


@every_method
def test_the_difference_of_two_texts(model, method):
    one, other = (attributed(model, method, text)[0].aggregate() for text in (TEXT, TEXT[:-1] + "!"))
    difference = one.aggregate(PairAggregator, paired_attr=other)
    want = other.target_attributions - one.target_attributions
    torch.testing.assert_close(difference.target_attributions, want, equal_nan=True)


# Files


@pytest.mark.parametrize("method", OURS)  # what attention saved is not equal to what is loaded
def test_files_load_equal(model, method, tmp_path):
    out = attributed(model, method)
    out.save(tmp_path / "out.json")
    assert inseq.FeatureAttributionOutput.load(tmp_path / "out.json") == out


# Commands

CONTEXTS = {
    "in": {"input_context_text": "The box is red.", "input_current_text": "Where is the"},
    "out": {
        "input_current_text": "Where is the key?",
        "output_context_text": "The box is red.",
        "output_template": "Think:\n{context}\nAnswer:\n{current}",
        "input_template": "{current}",
        "decoder_input_output_separator": "\n",
        "contextless_output_current_text": "Answer:\n{current}",
    },
    "both": {
        "input_context_text": "The box is red.",
        "input_current_text": "Where is the",
        "output_context_text": "The key is in the",
    },
}


@every_method
@pytest.mark.parametrize("where", CONTEXTS)
def test_attribute_context(folder, method, where, tmp_path):
    args = AttributeContextArgs(
        model_name_or_path=folder,
        attribution_method=method,
        output_current_text=" key of the box",
        show_viz=False,
        save_path=str(tmp_path / "out.json"),
        **CONTEXTS[where],
    )
    found = attribute_context(args)
    scores = found.cci_scores[0]
    for context, tokens in (("input", found.input_context_tokens), ("output", found.output_context_tokens)):
        values = getattr(scores, f"{context}_context_scores")
        assert (values is None) == (tokens is None) and (values is None or len(values) == len(tokens))
    assert AttributeContextOutput.from_dict(json.loads((tmp_path / "out.json").read_text())) == found

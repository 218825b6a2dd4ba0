"""Metrics take what Inseq and Captum give back."""

from __future__ import annotations

import pytest
import torch

from flashtrace_plugin import FlashTrace, InputError, reasoner
from flashtrace_plugin.evaluation.metrics import auroc, recovery, rise
from flashtrace_plugin.evaluation.metrics.scores import as_scores
from flashtrace_plugin.evaluation.tasks import make

SAMPLE = make("needle_retrieval", 3, keys=4, values=1, length=40, thinking=False)


@pytest.fixture(scope="module")
def pair():
    return reasoner.load()


def whole(pair):
    return FlashTrace(*pair).attribute(SAMPLE.prompt, SAMPLE.generation)


def test_inseq(pair):
    inseq = pytest.importorskip("inseq")
    host = inseq.load_model(pair[0], "input_x_gradient", tokenizer=pair[1])
    text = f"{SAMPLE.prompt} {SAMPLE.generation}"
    out = host.attribute(SAMPLE.prompt, text, show_progress=False)
    scores = as_scores(out)
    own = out.aggregate().sequence_attributions[0]
    expected = own.target_attributions[: own.attr_pos_start].double().nanmean(1)
    torch.testing.assert_close(scores, expected)
    assert len(scores) == len(whole(pair).prompt)
    assert recovery(out, SAMPLE.evidence) == recovery(expected, SAMPLE.evidence)
    assert recovery(out.sequence_attributions[0], SAMPLE.evidence) == recovery(out, SAMPLE.evidence)
    ids = torch.tensor(whole(pair).token_ids)
    assert 0 <= rise(pair[0], ids, prompt_length=len(scores), scores=out) <= 1
    two = host.attribute([SAMPLE.prompt] * 2, [text] * 2, show_progress=False)
    with pytest.raises(InputError, match="holds 2 sequences"):
        as_scores(two)


def test_captum(pair):
    attr = pytest.importorskip("captum.attr")
    llm = attr.LLMAttribution(attr.FeatureAblation(pair[0]), pair[1])
    found = llm.attribute(attr.TextTokenInput(SAMPLE.prompt, pair[1]), target=f" {SAMPLE.generation}")
    scores = as_scores(found)
    assert len(scores) == len(whole(pair).prompt)
    assert auroc(found, SAMPLE.evidence) == auroc(found.seq_attr.reshape(-1), SAMPLE.evidence) > 0.5


def test_features_that_are_no_tokens_are_refused(pair):
    attr = pytest.importorskip("captum.attr")
    llm = attr.LLMAttribution(attr.FeatureAblation(pair[0]), pair[1])
    words = SAMPLE.prompt.split()
    half = len(words) // 2
    given = attr.TextTemplateInput("{} {}", [" ".join(words[:half]), " ".join(words[half:])])
    found = llm.attribute(given, target=f" {SAMPLE.generation}")
    with pytest.raises(InputError, match=f"2 scores for {len(words)} prompt tokens"):
        rise(pair[0], torch.tensor(whole(pair).token_ids), prompt_length=len(words), scores=found)


@pytest.mark.parametrize("scores", ["words", object(), {"a": 1}])
def test_what_is_no_scores(scores):
    with pytest.raises(InputError, match="give an Attribution, a result of Inseq or Captum, or one number"):
        as_scores(scores)

"""The baselines, by other routes."""

from __future__ import annotations

import pytest
import torch

from flashtrace_plugin import Span
from flashtrace_plugin.evaluation.baselines import BASELINES
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from tests.tiny import random_ids, tiny

CASE = Case(random_ids(20, seed=2), 10, Span(16, 20), Span(10, 16), evidence=(1, 4), question=(8, 9))


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3", attn_implementation="eager")


def log_prob(model, ids, span):
    logits = model(ids[None]).logits[0, span.start - 1 : span.stop - 1].log_softmax(-1)
    return logits.gather(-1, ids[span.slice, None]).sum()


@pytest.mark.parametrize("name", BASELINES)
def test_one_score_for_each_prompt_token_and_the_model_is_left_alone(name, model):
    scores = BASELINES[name].explain(model, CASE)
    assert scores.shape == (10,) and bool((scores >= 0).all()) and bool(scores.any())
    assert torch.equal(scores, BASELINES[name].explain(model, CASE)) and not scores.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attention_is_that_of_the_predicting_positions(model):
    with torch.no_grad():
        patterns = torch.stack(model(CASE.input_ids[None], output_attentions=True).attentions)[:, 0]
    expected = patterns[:, :, 15:19].sum(2).mean((0, 1))[:10]
    torch.testing.assert_close(BASELINES["attention"].explain(model, CASE), expected)


def test_leave_one_out_is_the_fall_of_the_whole_generation(model):
    with torch.no_grad():
        whole = log_prob(model, CASE.input_ids, CASE.generation)
        changed = []
        for place in range(10):
            ids = CASE.input_ids.clone()
            ids[place] = replacement_token(model)
            changed.append(whole - log_prob(model, ids, CASE.generation))
    expected = torch.stack(changed).clamp(min=0)
    torch.testing.assert_close(BASELINES["leave_one_out"].explain(model, CASE).float(), expected, rtol=1e-4, atol=1e-4)


def test_gradient_times_input_is_the_slope_along_the_embedding(model):
    found = BASELINES["gradient_x_input"].explain(model, CASE)
    embedded = model.get_input_embeddings()(CASE.input_ids[None]).detach()

    def value(place: int, step: float) -> float:
        moved = embedded.clone()
        moved[0, place] *= 1 + step
        with torch.no_grad():
            logits = model(inputs_embeds=moved).logits[0, 15:19].log_softmax(-1)
        return float(logits.gather(-1, CASE.input_ids[CASE.target.slice, None]).sum())

    slopes = [abs(value(place, 1e-2) - value(place, -1e-2)) / 2e-2 for place in range(10)]
    torch.testing.assert_close(found, torch.tensor(slopes), rtol=1e-2, atol=2e-3)


def test_the_answer_key_by_hand(model):
    assert BASELINES["answer_key"].explain(model, CASE).tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 1, 1]

"""Sinks: positions that draw mass whatever the target, measured by the prompt's own tokens as a neutral target."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from flashtrace_plugin import IFR, LRP, FlashTrace, InputError, Recommended, Span
from flashtrace_plugin.core.recursion import Hop
from flashtrace_plugin.methods import driver
from tests.tiny import random_ids, tiny

IDS = random_ids(40, seed=4)
IDS[[0, 5]] = 3  # the token that begins texts
SPANS = {"prompt_length": 14, "target": Span(31, 36), "reasoning": Span(17, 29)}
METHODS = [FlashTrace, LRP, Recommended]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(driver, "SINK", 0.2)  # random models have no strong sinks
    return tiny("llama", seed=3)


@pytest.mark.parametrize("method", METHODS)
def test_they_are_told_and_nothing_changes(model, method):
    plain = method(model, sinks="keep").attribute_ids(IDS, **SPANS)
    told = method(model, sinks="report").attribute_ids(IDS, **SPANS)
    torch.testing.assert_close(told.hop_scores, plain.hop_scores, rtol=1e-4, atol=1e-7)
    positions = told.settings["sink_positions"]
    assert positions and set(positions) <= {0, 5}
    prompt = told.hop_scores[0, :14]
    assert told.settings["sink_share"] == pytest.approx(float(prompt[positions].sum() / prompt.sum()), rel=1e-3)
    assert told.components["sinks"].nonzero()[:, 0].tolist() == positions
    assert "sink_share" not in plain.settings


@pytest.mark.parametrize("method", METHODS)
def test_left_out_they_have_no_score_in_any_hop(model, method):
    found = method(model, sinks="drop").attribute_ids(IDS, **SPANS)
    positions = found.settings["sink_positions"]
    assert positions and not found.hop_scores[:, positions].any() and not found.scores[positions].any()
    assert 0 < found.settings["sink_share"] < 1


def test_the_neutral_target_is_the_prompt_itself(model):
    """Its tokens but the first, at once, as one span of FlashTrace would be; a short prompt's are all taken."""
    told = FlashTrace(model, sinks="report").attribute_ids(IDS, **SPANS)
    whole = FlashTrace(model, hops=0).attribute_ids(IDS, prompt_length=1, target=Span(1, 14)).hop_scores[0, :14]
    special = torch.isin(IDS[:14], torch.tensor([1, 2, 3]))
    expected = (special & (whole > 0.2 * whole.sum() / 14)).nonzero()[:, 0].tolist()
    assert told.settings["sink_positions"] == expected == [0, 5]


def test_methods_that_do_not_measure_them_have_no_such_option(model):
    with pytest.raises(TypeError, match="no option sinks"):
        IFR(model, sinks="drop")
    with pytest.raises(InputError, match="sinks must be one of 'keep', 'report', 'drop'"):
        FlashTrace(model, sinks="hide")


def test_what_a_token_of_the_spread_draws_for_itself_does_not_hide_a_sink():
    """A product of readings may put nearly all mass on the one position that predicts one of the tokens asked for."""
    task = Recommended(tiny("llama", seed=3))._task(IDS[None], 30, Span(31, 36), None, ExitStack())
    stands = int(task.neutral.nonzero()[5, 0]) - 1
    alpha = torch.full((40,), 1e-4).index_put((torch.tensor([0, stands]),), torch.tensor([0.1, 0.9]))
    assert driver._sinks(Hop(alpha), task).nonzero()[:, 0].tolist() == [0]

"""Attributions as tables of pandas and figures of matplotlib."""

from __future__ import annotations

import sys

import pytest
import torch

from flashtrace_plugin import FlashTrace, InputError
from tests.tiny import tiny, tiny_tokenizer

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

PROMPT = "The key of the red box is in the garden. Where is the key?"
GENERATION = "<think>red box. key</think>In the garden."


@pytest.fixture(scope="module")
def found():
    return FlashTrace(tiny("llama"), tiny_tokenizer(), hops=2, sinks="report").attribute(PROMPT, GENERATION)


def test_a_row_for_every_position(found):
    frame = found.to_frame()
    assert list(frame.columns) == ["token", "part", "score", "total", "sink", "hop_0", "hop_1", "hop_2"]
    assert "".join(frame["token"]) == "".join(found.tokens)
    assert torch.tensor(frame["score"].dropna().tolist()).equal(found.scores)
    assert torch.tensor(frame["hop_1"].tolist()).equal(found.hop_scores[1])
    for part, span in (("prompt", found.prompt), ("reasoning", found.reasoning), ("target", found.target)):
        assert frame.index[frame["part"] == part].tolist() == list(span)
    assert frame.index[frame["sink"]].tolist() == list(found.sinks)


@pytest.mark.parametrize("kind", ["text", "hops", "heads"])
def test_every_kind_is_drawn_and_labelled(found, kind, tmp_path):
    from matplotlib import pyplot

    axes = found.plot(kind)
    assert axes.get_xlabel() and axes.get_ylabel()
    axes.figure.savefig(tmp_path / "plot.png")
    own = pyplot.subplots()[1]
    assert found.plot(kind, ax=own) is own
    pyplot.close("all")


def test_what_is_drawn(found):
    from matplotlib import pyplot

    axes = found.plot("hops")
    reached = [sum(bars.patches[k].get_width() for bars in axes.containers) for k in range(3)]
    assert reached == pytest.approx([float(mass.sum() > 0) for mass in found.hop_scores])
    assert found.plot("heads").images[0].get_array().shape == found.head_scores[0].shape
    pyplot.close("all")


def test_what_cannot_be_drawn(found, monkeypatch):
    with pytest.raises(InputError, match="kind must be one of 'text', 'hops', 'heads', got 'pie'"):
        found.plot("pie")
    for package, use in (("pandas", found.to_frame), ("matplotlib", found.plot)):
        with monkeypatch.context() as absent:
            absent.setitem(sys.modules, package, None)
            with pytest.raises(InputError, match=rf"needs {package}; pip install"):
                use()

"""Plots and records: readable sizes at any length, texts that break others, the numbers that are drawn."""

import re

import matplotlib
import pytest
import torch
from captum.attr import visualization

from flashtrace_captum import CaptumInputError, LLMTraceAttributionResult
from flashtrace_captum.labels import in_context, label, shortened

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NASTY = [
    "$$",
    "$\\frac{1}{2}$",
    "_a_",
    "$x^2$",
    "{0}",
    "<img src=x onerror=alert(1)>",
    "<think>",
    "\n\n",
    "\t",
    "&amp;",
]
LARGEST = 16 * 10  # square inches; Captum's own grow to 50,000,000 at 2,000 tokens


def made(n=20, r=12, *, rows=4, dtype=torch.float32, negative=False, words=NASTY):
    generator = torch.Generator().manual_seed(n)
    scores = torch.rand(n, generator=generator) ** 6 - (0.2 if negative else 0)
    answer = slice(r - rows, r)
    per_token = torch.full((r, n), torch.nan)
    per_token[answer] = torch.rand(rows, n, generator=generator) * scores
    return LLMTraceAttributionResult(
        input_tokens=[f"Ġ{words[i % len(words)]}" for i in range(n)],
        output_tokens=[words[(3 * i) % len(words)] for i in range(r)],
        input_texts=[f" {words[i % len(words)]}" for i in range(n)],
        output_texts=[f" {words[(3 * i) % len(words)]}" for i in range(r)],
        seq_attr=scores.to(dtype).requires_grad_(),
        token_attr=per_token.to(dtype),
        output_log_probs=-torch.rand(r, generator=generator),
        response_attr=torch.rand(r, generator=generator).to(dtype),
        hop_attr=torch.rand(3, n, generator=generator).to(dtype),
        answer=answer,
        reasoning=slice(0, answer.start),
    )


PLOTS = ["plot_seq_attr", "plot_token_attr", "plot_hop_attr", "plot_response_attr"]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


class TestPlots:
    @pytest.mark.parametrize("plot", PLOTS)
    @pytest.mark.parametrize(("n", "r", "rows"), [(1, 2, 1), (20, 12, 4), (200, 150, 40), (2000, 1000, 300)])
    def test_any_length_draws_at_a_readable_size(self, plot, n, r, rows):
        fig, ax = getattr(made(n, r, rows=rows), plot)()
        fig.canvas.draw()
        width, height = fig.get_size_inches()
        assert width <= 16
        assert width * height <= LARGEST
        assert ax in fig.axes or ax in [a for sub in fig.subfigs for a in sub.axes]

    @pytest.mark.parametrize("plot", PLOTS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_any_dtype(self, plot, dtype):
        getattr(made(60, dtype=dtype, negative=True), plot)()[0].canvas.draw()

    @pytest.mark.parametrize("plot", PLOTS)
    def test_show_returns_nothing(self, plot, monkeypatch):
        calls = []
        monkeypatch.setattr(plt, "show", lambda: calls.append(1))
        assert getattr(made(), plot)(show=True) is None
        assert calls == [1]

    def test_few_tokens_have_a_bar_each(self):
        result = made(20)
        _, ax = result.plot_seq_attr()
        assert [bar.get_height() for bar in ax.patches] == pytest.approx(result.seq_attr.tolist())
        assert [t.get_text() for t in ax.get_xticklabels()][:2] == ["$$", "$\\frac{1}{2}$"]

    def test_windows_add_up_and_the_largest_are_named(self):
        result = made(2000, 1000, negative=True)
        fig, above = result.plot_seq_attr()
        assert len(above.patches) == 100
        assert sum(bar.get_height() for bar in above.patches) == pytest.approx(
            float(result.seq_attr.detach().sum()), rel=1e-4
        )
        below = fig.subfigs[1].axes[0]
        best = int(result.seq_attr.abs().argmax())
        assert below.get_yticklabels()[-1].get_text().endswith(f"  {best}")
        assert f"[{label(result.input_texts[best])}]" in below.get_yticklabels()[-1].get_text()

    def test_windows_of_rows_add_up(self):
        result = made(20, 1000, rows=300)
        _, ax = result.plot_token_attr()
        drawn = torch.tensor(ax.images[0].get_array())
        assert drawn.shape == (30, 20)
        torch.testing.assert_close(drawn.sum(0), result.token_attr[result.answer].sum(0), rtol=1e-4, atol=1e-5)
        assert ax.get_yticklabels()[0].get_text().endswith("  700–709")

    def test_all_zero(self):
        result = made(60)
        result.seq_attr = torch.zeros(60)
        result.token_attr = torch.zeros(12, 60)
        result.plot_seq_attr()[0].canvas.draw()
        result.plot_token_attr()[0].canvas.draw()
        assert bool((result.to_visualization_record().word_attributions == 0).all())

    def test_what_is_missing_is_said(self):
        result = made()
        result.token_attr = result.hop_attr = None
        result.answer = slice(0, 3)
        for plot, other in (("token", "plot_seq_attr"), ("hop", "plot_seq_attr"), ("response", "no reasoning")):
            with pytest.raises(CaptumInputError, match=other):
                getattr(result, f"plot_{plot}_attr")()


class TestLabels:
    def test_one_line(self):
        assert label(" \n") == "\\n"
        assert label("  ") == "␣"
        assert label("\x07") == "\\x07"
        assert label(" word") == "word"

    def test_width(self):
        assert len(label("x" * 100)) <= 22
        assert shortened("abcdefghij", 5) == "ab…ij"
        assert shortened("abcde", 5) == "abcde"

    def test_context(self):
        tokens = ["The", " key", " of", " the", " box"]
        assert in_context(tokens, 2) == "The key [of] the box"
        assert in_context(tokens, 0) == "[The] key of the box"
        assert in_context(tokens, 2, width=4) == " key [of] the"
        assert len(in_context(tokens * 200, 500)) < 80


class TestVisualizationRecord:
    def test_captums_visualizer_takes_it(self):
        result = made(40)
        html = visualization.visualize_text([result.to_visualization_record()]).data
        assert "<img" not in html
        assert "&lt;think&gt;" in html
        assert "#think" not in html
        assert len(re.findall("<mark", html)) == 40

    def test_scores_fill_the_scale(self):
        values = made(40, negative=True).to_visualization_record().word_attributions
        assert float(values.abs().max()) == 1
        assert not values.requires_grad

    def test_the_response_on_the_same_scale(self):
        result = made(40)
        record = result.to_visualization_record(response=True)
        assert len(record.raw_input_ids) == len(record.word_attributions) == 40 + result.answer.start
        scores = torch.cat([result.seq_attr.detach(), result.response_attr[: result.answer.start]])
        torch.testing.assert_close(record.word_attributions, scores / scores.abs().max())

    def test_the_answer_and_its_probability(self):
        result = made()
        record = result.to_visualization_record()
        assert record.pred_prob == pytest.approx(float(result.output_probs[result.answer].prod()))
        assert "<" not in record.pred_class.replace("<br>", "")

    def test_line_breaks_stay(self):
        assert "↵<br>" in "".join(made().to_visualization_record().raw_input_ids)

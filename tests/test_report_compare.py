"""Two attributions on one page: what is compared, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.report.compare import compare
from tests.pages import Page, made, shown_tokens
from tests.test_report import data_of, numbers

WORDS = ("One", " is", " here.", " Two", " follows.", " What", " now", "?")


def compared(first, second, path, **options):
    compare(first, second, path / "two.html", **options)
    return Page((path / "two.html").read_text(encoding="utf-8")).root


def views(page):
    return [numbers(view["values"]) for view in data_of(page)["views"]]


def test_one_text_is_compared_as_a_whole(tmp_path):
    first, second = made(WORDS, seed=1), made(WORDS, seed=2, method="lrp")
    page = compared(first, second, tmp_path)
    ours, theirs, difference = views(page)
    assert ours[:8] == pytest.approx((first.scores / first.scores.sum()).numpy(), rel=1e-5)
    assert theirs[:8] == pytest.approx((second.scores / second.scores.sum()).numpy(), rel=1e-5)
    assert difference == pytest.approx(ours - theirs) and len(shown_tokens(page)) == len(first.tokens)
    assert next(page.all("h1")).text == "flashtrace and lrp"


def test_other_answers_are_compared_on_the_prompt(tmp_path):
    first, second = made(WORDS, seed=1), made(WORDS, seed=2, target=3)
    page = compared(first, second, tmp_path)
    assert "".join(t.text for t in shown_tokens(page)) == "".join(WORDS)
    assert next(page.all("h1")).text == "“a0 a1” and “a0 a1 a2”"
    assert [len(values) for values in views(page)] == [8] * 3


def test_mass_goes_by_characters_to_another_tokenizer(tmp_path):
    first, second = made(WORDS, seed=1), made(("On", "e is", " here. Two", " follows", ". What now", "?"), seed=2)
    theirs = views(compared(first, second, tmp_path))[1]
    share = (second.scores / second.scores.sum()).tolist()
    # "here." is five of the eight characters of " here. Two"
    assert theirs[:3] == pytest.approx([share[0] + share[1] / 3, 2 * share[1] / 3, 5 * share[2] / 8], rel=1e-5)
    assert float(theirs.sum()) == pytest.approx(1, rel=1e-5)


def test_units_have_the_shares_that_each_one_says(tmp_path):
    first, second = made(WORDS, seed=1), made(WORDS, seed=2)
    page = compared(first, second, tmp_path, names=("a", "b"))
    fronts = [front.text for front in page.all("section", "front")]
    for one, text in zip((first, second), fronts, strict=True):
        best = max(one.by("sentence").top(3), key=lambda unit: unit.share if "?" not in unit.unit.text else -1)
        assert f"{100 * best.share:.1f} %" in text


def test_other_prompts_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"of different prompts, 'One is here.* and 'One is gone\.'"):
        compare(made(WORDS), made(("One", " is", " gone.")), tmp_path / "two.html")
    broken = made(WORDS)
    broken.scores[0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        compare(made(WORDS), broken, tmp_path / "two.html")
    with pytest.raises(InputError, match="no tokens"):
        compare(replace(made(), tokens=()), made(), tmp_path / "two.html")
    assert not (tmp_path / "two.html").exists()

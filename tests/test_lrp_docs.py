"""The page docs/lrp.md: its code runs as it stands, in its order, and prints the numbers that stand beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "lrp.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ran():
    """The page's names, and what its code printed."""
    pytest.importorskip("captum")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    printed: list[str] = []
    names: dict[str, object] = {"print": lambda *values: printed.append(" ".join(map(str, values)))}
    for block in blocks:
        exec(compile(block, "docs/lrp.md", "exec"), names)
    return names, printed


def test_relevance_adds_up_as_the_page_says(ran):
    names, _ = ran
    assert names["total"] == pytest.approx(names["told"]["objective_value"], rel=1e-5)
    assert names["total"] == pytest.approx(17.638, abs=1e-3)
    assert names["method"].has_convergence_delta() and abs(float(names["delta"])) < 1e-3


def test_its_numbers_are_those_that_are_printed(ran):
    names, printed = ran
    assert printed[0].split() == ["84", "0.68", "+13.21"]
    assert [line.split()[0] for line in printed[1:3]] == ["9", ";"]
    assert names["why"].settings["objective_value"] == pytest.approx(14.80, abs=0.005)
    assert all(number in printed[5] for number in ("41 +1.09", "84 +11.64", "9 +0.80"))
    assert float(printed[7].split()[0]) == pytest.approx(5.50, abs=0.01)
    assert [line.split()[-1] for line in printed[8:11]] == ["14.1", "1.2", "5.7"]
    assert printed[11].split() == ["84", "0.68", "-2.19"]


def test_log_probability_leaves_little_of_a_confident_answer(ran):
    names, _ = ran
    method = names["LRP"](names["model"], names["tokenizer"], objective="log_probability")
    assert method.attribute(names["prompt"], names["answer"]).settings["objective_value"] == pytest.approx(
        0.02, abs=5e-3
    )

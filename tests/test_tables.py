"""Tables of measurements, by hand, and the page of results as its command writes it."""

from __future__ import annotations

import math
import sys

import pandas as pd
import pytest

from flashtrace_plugin.evaluation import tables
from flashtrace_plugin.evaluation.metrics import bootstrap
from tests.commands import script

VALUES = pd.DataFrame(
    {
        "task": ["a"] * 5,
        "number": [0, 1, 0, 1, 0],
        "method": ["first", "first", "second", "second", "third"],
        "x": [0.5, 0.5, 1.0, 0.0, -0.0001],
        "y": [1.0, math.nan, 2.0, 3.0, math.nan],
    }
)


def test_cells():
    assert tables.cell([0.5, 0.5]) == "0.500 [0.500, 0.500]"
    assert tables.cell([0.25]) == "0.250" and tables.cell([]) == "–" and tables.cell([math.nan]) == "–"
    assert tables.cell([-0.001], digits=2) == "0.00", "no minus before a rounded zero"
    found = bootstrap([0.1, 0.2, 0.9])
    assert tables.cell([0.1, math.nan, 0.2, 0.9]) == f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def test_means_are_in_the_order_they_ran_and_say_where_samples_are_missing():
    frame = tables.means(VALUES, ["x", "y"])
    assert list(frame.index) == ["first", "second", "third (n = 1)"] and frame.index.name == "method"
    assert frame["x"].to_list()[0] == "0.500 [0.500, 0.500]" and frame["y"].to_list()[2] == "–"


def test_differences_are_taken_on_the_same_samples():
    frame = tables.differences(VALUES, ["x", "y"], "second", sample=["task", "number"])
    assert list(frame.index) == ["first", "third"]
    assert frame.loc["first", "x"] == tables.cell([-0.5, 0.5]) and frame.loc["first", "y"] == "-1.000"
    assert frame.loc["third", "x"] == "-1.000"


def test_markdown():
    assert tables.markdown(tables.means(VALUES[:2], ["x"])) == "\n".join(
        ["| method | x |", "| --- | --- |", "| first | 0.500 [0.500, 0.500] |"]
    )


def test_without_pandas_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'flashtrace-plugin\[evaluation\]'"):
        script("flashtrace_plugin.evaluation.tables")

"""The benchmark's commands run, and what they compare is the same."""

from __future__ import annotations

import re

import pytest

from benchmarks import heta_speed


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (heta_speed.patterns, {"lengths": [24], "width": 64, "layers": 1}),
        (heta_speed.products, {"length": 12, "layers": 1, "count": 2}),
    ],
)
def test_two_ways_give_the_same_products(command, options, capsys):
    command(**options)
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| \d", line)]
    assert rows and all(float(row.split("|")[-2]) < 1e-4 for row in rows)


def test_throughput_and_a_long_text(capsys):
    heta_speed.throughput(length=24, width=64, layers=1)
    heta_speed.long(length=96, width=64, layers=1, rank=2)
    out = capsys.readouterr().out
    assert "ratio" in out and "20 products" in out and "GiB" in out

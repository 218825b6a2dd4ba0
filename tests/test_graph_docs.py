"""The page docs/graph.md: its code runs as it stands, in its order, and prints what stands beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "graph.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed():
    """What the page's code printed, line by line."""
    lines: list[str] = []
    names: dict[str, object] = {"print": lambda *values: lines.append(" ".join(map(str, values)))}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "docs/graph.md", "exec"), names)
    return lines


def test_every_printed_line_is_on_the_page(printed):
    assert len(printed) == 12
    for line in printed[:4] + printed[4:5] + printed[8:]:
        assert f"# {line}" in PAGE, line
    assert [line[-9:] for line in printed[5:8]] == ["0.51 3.23", "0.00 0.01", "0.00 0.00"]
    assert "then 0.51 3.23, 0.00 0.01, 0.00 0.00" in PAGE

"""The pages docs/sources.md and docs/served.md: their code runs as it stands, and prints what stands beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def ran(page: str) -> tuple[dict[str, object], list[str]]:
    """The page's names, and what its code printed."""
    printed: list[str] = []
    names: dict[str, object] = {"print": lambda *values: printed.append(" ".join(map(str, values)))}
    text = (DOCS / page).read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, page, "exec"), names)
    return names, printed


def test_sources():
    names, printed = ran("sources.md")
    assert names["answer"] == "<think> v41 v19 ; v19 68 ; </think> 68"
    assert printed[0] == "0.96 0.317 v19 68 ;" and printed[2] == "68"
    assert "c 100%: “v19 68 ;”" in printed[3]
    assert printed[4:6] == ["c 1.00 22.5", "a 0.00 17.5"]
    assert printed[6].startswith("message 1 wrote: 68\n") and printed[7] == "1.00"


def test_served():
    names, printed = ran("served.md")
    assert printed == ["v7 84 ;"]
    assert names["same"].scores.equal(names["found"].scores)


@pytest.mark.parametrize("page", ["sources.md", "served.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (DOCS / page).read_text(encoding="utf-8"))
    assert not [link for link in links if not (DOCS / link).exists()]

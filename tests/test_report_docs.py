"""The page docs/report.md: its code runs as it stands, in its order."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parent.parent / "docs" / "report.md").read_text(encoding="utf-8")


def test_the_code_of_the_page_writes_its_files():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "docs/report.md", "exec"), names)
    assert "Checked, it" in (names["folder"] / "report.html").read_text(encoding="utf-8")
    assert "one hop and no hop" in (names["folder"] / "two.html").read_text(encoding="utf-8")

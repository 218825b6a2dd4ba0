"""The page docs/serve.md: its code runs as it stands and prints what stands beside it, and its picture is there."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_code_of_the_page_prints_what_it_says():
    page = (DOCS / "serve.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    expected = [line.partition("# ")[2].partition(":")[0] for line in blocks[0].splitlines() if "print(" in line]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(blocks[0], "docs/serve.md", "exec"), {})
    assert printed.getvalue().splitlines() == expected == ["v20 12 ;", "? v55 think", "1", "2"]


def test_its_picture_is_there_and_small():
    for name in re.findall(r"\]\((images/[^)]+)\)", (DOCS / "serve.md").read_text(encoding="utf-8")):
        assert 1000 < (DOCS / name).stat().st_size < 200_000

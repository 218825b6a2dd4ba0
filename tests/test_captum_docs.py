"""The page docs/captum.md: its code runs as it stands, in its order, and its pictures are there."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "captum.md").read_text(encoding="utf-8")


def test_the_code_of_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) > 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/captum.md", "exec"), names)


def test_its_pictures_exist():
    pictures = re.findall(r"\]\((images/[^)]+)\)", PAGE)
    assert len(pictures) > 5
    assert all((DOCS / picture).is_file() for picture in pictures)

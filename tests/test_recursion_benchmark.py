"""The benchmark of recursion runs as a command, goes on where it was, and writes its page."""

from __future__ import annotations

import pytest

from tests.commands import run

pytest.importorskip("captum")
pytest.importorskip("inseq")


def test_the_page_of_the_benchmark(tmp_path, capsys):
    page, lines = tmp_path / "page.md", tmp_path / "lines.jsonl"
    options = f"--samples 1 --length 40 --method 'Captum InputXGradient' --lines {lines} --out {page}"
    out = run("benchmarks.recursion", options, capsys)
    text = page.read_text(encoding="utf-8")
    assert text in out and "1 right samples for each task (variables, 2 hops; " in text
    for row in ("before | ", 'hops="auto" | ', "hops=inf | "):
        assert f"| Captum InputXGradient: {row}" in text
    assert text.count('| Captum InputXGradient: hops="auto" | ') == 2 and "| leave one out | " in text
    known = lines.read_text(encoding="utf-8")
    run("benchmarks.recursion", options, capsys)
    assert lines.read_text(encoding="utf-8") == known

"""The page docs/inseq.md: its code runs as it stands, in its order, and its commands are there."""

import re
import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("inseq")

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "inseq.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "docs/inseq.md", "exec"), names)
    assert len(blocks("python")) > 7
    assert (tmp_path / "answer.json").exists()


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    from flashtrace_inseq.cli import main
    from flashtrace_plugin import reasoner

    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("flashtrace-inseq")]
    assert commands
    for words in commands:
        monkeypatch.setattr(sys, "argv", [str(reasoner.path()) if word == "MODEL" else word for word in words])
        main()
    assert "Target Saliency Heatmap" in capsys.readouterr().out

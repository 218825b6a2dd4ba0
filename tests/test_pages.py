"""The pages of results are made of folders of runs and of nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from flashtrace_plugin import InputError
from flashtrace_plugin.evaluation.drawing import ONE_OF_TWO, REASONER_TASKS
from flashtrace_plugin.evaluation.pages import __main__ as command
from flashtrace_plugin.evaluation.pages.choosing import choosing_page
from flashtrace_plugin.evaluation.pages.papers import TABLES
from flashtrace_plugin.evaluation.pages.results import NOT_MEASURED, read_runs, results_page
from flashtrace_plugin.evaluation.run.contestants import scorer_of
from flashtrace_plugin.evaluation.run.evaluate import run_suite
from flashtrace_plugin.evaluation.run.summary import differences_of, means_of
from flashtrace_plugin.evaluation.tables import cell
from flashtrace_plugin.evaluation.tasks.catalogue import TEXT_TASKS
from flashtrace_plugin.evaluation.tasks.readers import READERS
from tests.tiny import tiny

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_suite(
        "reasoner",
        "paper",
        out=tmp_path_factory.mktemp("pages") / "paper",
        methods=["flashtrace", "flashtrace:hops=0", "random", "recommended"],
        tasks=["variables, 4 hops", "needles"],
        samples=2,
        length=60,
        steps=4,
        progress=False,
    )


def test_papers_tables_are_whole():
    """As many numbers as columns, every method with a name that exists, every task known."""
    model, tasks = tiny("llama"), {*REASONER_TASKS, *ONE_OF_TWO, *TEXT_TASKS, *READERS}
    for table in TABLES:
        assert set(table.numbers) == set(table.metrics)
        for rows in table.numbers.values():
            assert set(rows) == set(table.rows)
            assert all(len(numbers) == len(table.columns) for numbers in rows.values())
        for name in table.rows.values():
            assert name is None or scorer_of(name, model)
        assert {task for named in table.columns.values() for task in named} <= tasks


def test_results_say_what_was_measured_and_what_was_not(folder, tmp_path):
    page = results_page([folder], tmp_path / "images")
    values = read_runs([folder])
    mine = values.query("method == 'flashtrace' and task == 'variables, 4 hops'")
    assert (
        f"| 1 hop, reasoner | {cell(mine['RISE'])}, n = 2 |" in page and "| 1 hop, paper (Qwen-3 8B) | 0.128 |" in page
    )
    assert f"| IFR (token), here | {NOT_MEASURED} |" in page
    assert "Targets by task: variables, 4 hops 2, needles 2." in page and "n = 4 targets of 4 samples" in page
    assert "flashtrace-plugin evaluate --suite paper --model reasoner --seed 0" in page and str(tmp_path) not in page
    images = re.findall(r"\]\((images/[^)]*)\)", page)
    assert images and all((tmp_path / image).is_file() for image in images)


def test_numbers_of_the_page_are_those_of_the_lines(folder):
    values = read_runs([folder])
    means = means_of(values, ["AUROC"]).query("method == 'random' and task == 'needles'").iloc[0]
    assert means["mean"] == pytest.approx(values.query("method == 'random' and task == 'needles'")["AUROC"].mean())
    gains = differences_of(values, "flashtrace", ["AUROC"])
    assert set(gains["method"]) == {"random", "recommended", "flashtrace:hops=0"} and set(gains["n"]) == {2}


def test_the_page_for_choosing(folder, tmp_path):
    page = choosing_page([folder], tmp_path / "images")
    assert (tmp_path / "images" / "choosing.png").is_file()
    assert re.search(r"\| recommended \| the default: .* \| [\d.]+ \| 0\.\d\d \(4\) \| not measured \|", page)
    assert (
        "| attention | what a first look costs; no explanation | not measured | not measured | not measured |" in page
    )


def test_the_command(folder, tmp_path):
    import typer

    app = typer.Typer()
    app.command()(command._pages)
    found = CliRunner().invoke(app, [str(folder), "--docs", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert {path.name for path in tmp_path.glob("*.md")} == {"results.md", "choosing.md"}


def test_folders_that_hold_no_run(folder, tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        read_runs([tmp_path])
    (tmp_path / "manifest.json").write_text(json.dumps({"model": "x"}))
    with pytest.raises(InputError, match="holds no results yet"):
        read_runs([tmp_path])


def test_time_and_memory_against_length(tmp_path):
    command = [
        sys.executable,
        "-m",
        "flashtrace_plugin.evaluation.run.scale",
        "--sizes",
        "10,100",
        "--out",
        str(tmp_path),
    ]
    for _ in range(2):  # the second time nothing is measured
        subprocess.run([*command, "--methods", "flashtrace"], check=True, capture_output=True)
        lines = [json.loads(line) for line in (tmp_path / "scale.jsonl").read_text().splitlines()]
        assert [(line["prompt"], line["target"]) for line in lines] == [(10, 100), (100, 10), (100, 100)]
    assert all(line["seconds"] > 0 and line["memory"] >= 0 for line in lines)
    assert (tmp_path / "scale-reasoner.png").is_file()

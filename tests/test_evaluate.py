"""The command that measures a suite: killed and gone on with, sharded, refused where it should be."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashtrace_plugin import InputError, Span
from flashtrace_plugin.cli import app
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.run import draws, evaluate, lines, runner
from flashtrace_plugin.evaluation.run.contestants import method_label, scorer_of
from flashtrace_plugin.evaluation.run.draws import Shard
from flashtrace_plugin.evaluation.run.evaluate import run_suite
from flashtrace_plugin.evaluation.run.runner import read_results
from flashtrace_plugin.evaluation.run.suites import SUITES
from flashtrace_plugin.evaluation.run.summary import line_files, read_run
from tests.tiny import random_ids, tiny

pd = pytest.importorskip("pandas")
SMALL = {"methods": ["random", "flashtrace"], "tasks": ["needles"], "samples": 2, "length": 40, "progress": False}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run_suite(out=tmp_path_factory.mktemp("run") / "one", **SMALL)


def timeless(folder: Path) -> pd.DataFrame:
    found = read_results(*line_files(folder)).sort_values(["case", "method"], ignore_index=True)
    return found.drop(columns=[name for name in found if name.startswith(("seconds", "cost"))])


def test_every_sample_is_a_line_and_tables_count_them(done):
    values = read_run(done)
    assert len(values) == 4 and set(values["method"]) == {"random", "flashtrace"}
    means = pd.read_csv(done / "means.csv")
    row = means.query("method == 'flashtrace' and metric == 'recovery'").iloc[0]
    assert row["n"] == 2 and row["low"] <= row["mean"] <= row["high"] and row["answers"] == "right"
    gains = pd.read_csv(done / "differences.csv")
    expected = values.pivot(index="case", columns="method", values="AUROC")
    gained = gains.query("metric == 'AUROC'").iloc[0]
    assert gained["method"] == "random" and gained["mean"] == pytest.approx(
        (expected["random"] - expected["flashtrace"]).mean()
    )
    report = (done / "report.md").read_text()
    assert "## Needles, right answers\n\nn = 2 targets of 2 samples, 2 drawn." in report
    assert "Less those of flashtrace on the same samples" in report
    assert {"curves.png", "mass.png", "quality-cost.png"} <= {path.name for path in (done / "figures").iterdir()}


@pytest.mark.parametrize("file", ["samples-1-of-1.jsonl", "lines-1-of-1.jsonl"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_run_that_was_killed_goes_on(file, share, done, tmp_path):
    for path in done.glob("*.json*"):
        whole = path.read_bytes()
        (tmp_path / path.name).write_bytes(whole[: int(share * len(whole))] if path.name == file else whole)
    run_suite(out=tmp_path, **SMALL)
    assert timeless(tmp_path).equals(timeless(done))


def test_nothing_is_computed_twice_and_more_is_added(done, tmp_path, monkeypatch):
    for path in done.glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    asked = []
    monkeypatch.setattr(evaluate, "scorer_of", lambda name, model: lambda case: asked.append(name) or _ones(case))
    run_suite(out=tmp_path, **SMALL)
    assert asked == []
    run_suite(out=tmp_path, **SMALL | {"methods": ["random", "recency"]})
    assert asked == ["recency", "recency"]


def _ones(case):
    return torch.ones(case.prompt_length)


def test_shards_share_a_folder(done, tmp_path):
    for part in (2, 1):
        run_suite(out=tmp_path, shard=Shard(part, 2), **SMALL)
    assert {path.name for path in line_files(tmp_path)} == {"lines-1-of-2.jsonl", "lines-2-of-2.jsonl"}
    assert timeless(tmp_path).equals(timeless(done))


def test_a_shard_s_samples_add_up():
    assert [sum(Shard(i, n).wanted(10) for i in range(1, n + 1)) for n in (1, 3, 4, 16)] == [10] * 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "another run, of seed 0, not 1"),
        ({"steps": 3}, "steps 10, not 3"),
        ({"suite": "nothing"}, "suite is 'nothing'; known ones are: quick, a first look"),
        ({"tasks": ["riddles"]}, "task is 'riddles'; known tasks are"),
        ({"tasks": ["math"]}, "read from a file; name it with data"),
        ({"methods": ["magic"]}, "method is 'magic'; known ones are recommended"),
        ({"methods": ["lrp:rule"]}, "'rule' in 'lrp:rule' is not option=value"),
        ({"methods": ["lrp:colour=red"]}, "'lrp:colour=red': LRP has no option colour"),
        ({"methods": ["random:x=1"]}, "'random' has no options, got x"),
        ({"shard": Shard(3, 2)}, "the shard is 3/2"),
        ({"samples": -1}, "samples must be at least 1, got -1"),
        ({"answers": "any"}, "answers is 'any'; choose of right, forced, wrong"),
        ({"answers": "forced"}, "needs no forcing"),
    ],
)
def test_other_runs_and_unknown_names_are_refused(change, message, done):
    before = (done / "lines-1-of-1.jsonl").read_bytes()
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        run_suite(out=done, **SMALL | change)
    assert (done / "lines-1-of-1.jsonl").read_bytes() == before


def test_folders_that_hold_something_else(done, tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        run_suite(out=tmp_path, **SMALL)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest.json is damaged"):
        run_suite(out=tmp_path, **SMALL)
    known = json.loads((done / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(known | {"version": "0.0.1", "weights": "0"}))
    with pytest.raises(InputError, match=r"of version '0.0.1', not '.*'; weights '0', not"):
        run_suite(out=tmp_path, **SMALL)


def test_a_full_disk_keeps_what_was_measured(tmp_path, monkeypatch):
    real, written = lines.append_line, []

    def full(path, line):
        if len(written) == 3:
            raise InputError(f"{path} cannot be written ({errno.errorcode[errno.ENOSPC]}); the lines before are kept")
        written.append(path)
        real(path, line)

    for module in (draws, runner):
        monkeypatch.setattr(module, "append_line", full)
    with pytest.raises(InputError, match="the lines before are kept"):
        run_suite(out=tmp_path, **SMALL)
    monkeypatch.undo()
    kept = len(written)
    run_suite(out=tmp_path, **SMALL)
    assert kept == 3 and len(read_run(tmp_path)) == 4


def test_tasks_take_turns(tmp_path):
    run_suite(
        out=tmp_path, **SMALL | {"tasks": ["needles", "direct answer, 1 hop"], "methods": ["random", "flashtrace"]}
    )
    cases = read_results(*line_files(tmp_path))["task"].drop_duplicates().tolist()
    each = [line["task"] for line in lines.read_lines(tmp_path / "lines-1-of-1.jsonl")][::2]
    assert cases == ["needles", "direct answer, 1 hop"] and each == cases * 2


def test_what_a_method_refuses_becomes_a_line(tmp_path, monkeypatch):
    def scorers(name, model):
        return (lambda case: torch.full((case.prompt_length,), torch.nan)) if name == "bad" else scorer_of(name, model)

    monkeypatch.setattr(evaluate, "scorer_of", scorers)
    run_suite(out=tmp_path, **SMALL | {"methods": ["flashtrace", "bad"]})
    values = read_run(tmp_path)
    assert values["error"].notna().sum() == 2
    report = (tmp_path / "report.md").read_text()
    assert "bad refused 2: InputError: the score of prompt token 0 is nan" in report and "| bad | – |" in report


def test_a_model_that_answers_nothing_right(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "case_source", lambda *a, **k: lambda number: [])
    with pytest.raises(InputError, match="no sample was usable"):
        run_suite(out=tmp_path, **SMALL)


def test_labels():
    assert method_label("leave_one_out") == "leave one out"
    assert method_label("lrp:rule=attn:hops=2") == "lrp (rule attn, hops 2)"


@pytest.mark.parametrize("name", SUITES)
def test_suites_name_what_there_is(name):
    model, suite = tiny("llama"), SUITES[name]
    assert suite.reference in suite.methods
    for method in suite.methods:
        scorer_of(method, model)
    case = Case(random_ids(12, seed=1), 8, Span(10, 12), Span(8, 10), evidence=(2,), question=(7,))
    assert len(scorer_of(suite.reference, model)(case).scores) == 8


def test_the_command(tmp_path):
    out = tmp_path / "run"
    options = ["evaluate", "--out", str(out), "--methods", "random,lrp:hops=0", "--tasks", "needles", "--samples", "1"]
    found = CliRunner().invoke(app, [*options, "--length", "40", "--no-progress", "--shard", "1/1"])
    assert found.exit_code == 0, found.output
    assert "# reasoner, suite quick" in found.output and "| lrp (hops 0) | " in (out / "report.md").read_text()
    wrong = CliRunner().invoke(app, [*options, "--shard", "one"])
    assert wrong.exit_code == 2 and "is not i/n" in wrong.output

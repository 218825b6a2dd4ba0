"""Data-set runs: one line for each row, whole or not at all, and nothing lost or done twice whatever stops a run."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashtrace_plugin import Attribution, FlashTrace, reasoner, runs
from flashtrace_plugin.cli.app import app
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation import tasks
from flashtrace_plugin.evaluation.metrics import recovery
from flashtrace_plugin.loading import write
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.runs.buckets import Cut, buckets, left
from flashtrace_plugin.runs.data_set import DataSet
from flashtrace_plugin.runs.folder import Folder
from flashtrace_plugin.runs.hand import Hand
from flashtrace_plugin.runs.lines import head_of, line_of_result
from flashtrace_plugin.runs.recipe import Recipe, fingerprint
from flashtrace_plugin.runs.rows import Failure, Row

RECIPE = Recipe("reasoner", "flashtrace", {"hops": 2, "positions": "predicting"})


def sample_rows(count: int) -> list[dict]:
    found = []
    for i in range(count):
        sample = tasks.make("variable_tracking", i, hops=1 + i % 3, chains=2, length=32 + 16 * (i % 3))
        row = {"id": f"q{i}", "prompt": sample.prompt, "generation": sample.generation}
        found.append(row | {"evidence": list(sample.evidence)})
    return found


ROWS = sample_rows(24)


@pytest.fixture(scope="module")
def method():
    return RECIPE.made()


@pytest.fixture(scope="module")
def expected(method):
    return {row["id"]: method.attribute(row["prompt"], row["generation"]) for row in ROWS}


def as_lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def same(folder, expected) -> bool:
    """Whether a folder holds these attributions, each once."""
    found = list(runs.read(folder))
    assert len(found) == len(dict(found)) and dict(found).keys() == expected.keys()
    return all(torch.allclose(one.hop_scores, expected[id].hop_scores, atol=1e-5) for id, one in found)


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


# What comes out


def test_a_row_has_the_numbers_of_one_call(method, expected, tmp_path):
    summary = runs.run(ROWS, method, tmp_path / "out", batch=5, window=9)
    assert (summary.total, summary.explained, summary.failed, summary.before) == (24, 24, 0, 0)
    assert same(tmp_path / "out", expected)


def test_a_line_reads_back_equal(expected):
    """float32 survives the shortest decimals exactly, the extremes of its range, too."""
    found = expected["q2"]
    extremes = torch.tensor([0.0, 1e-45, 3.4028235e38, 1 / 3, 16777217.0, torch.nan])
    found = replace(found, components={"extremes": extremes, "none": torch.zeros(2, 0)})
    line = line_of_result(Row(0, "0" * 16, "q2", "x"), found, {})
    assert Attribution.from_dict(json.loads(line)) == found
    assert len(line) < 0.8 * len(json.dumps(found.to_dict()))


def test_pandas_reads_the_lines_and_a_table_sums_them_up(method, expected, tmp_path):
    import pandas as pd

    rows = [*ROWS[:3], {"id": "bad", "generation": "without a prompt"}]
    runs.run(rows, method, tmp_path / "out")
    lines = pd.read_json(tmp_path / "out" / "results.jsonl", lines=True).set_index("id")
    assert torch.tensor(lines.scores["q1"]).allclose(expected["q1"].scores)
    assert lines.error["bad"] == "InputError" and pd.isna(lines.error["q0"])
    frame = runs.to_frame(tmp_path / "out")
    assert list(frame.id) == ["q0", "q1", "q2", "bad"] and list(frame.index) == [0, 1, 2, 3]
    assert frame.top_score[1] == pytest.approx(float(expected["q1"].scores.max()))
    gold = ROWS[1]["evidence"]
    assert frame.recovery[1] == pytest.approx(recovery(expected["q1"].scores, gold))
    assert "prompt" in frame.message[3]


def test_documents_and_evidence_that_are_texts(method, tmp_path):
    prompt, answer = "v1 v2 ; v2 7 ; the sun shines . ? v1 think", "<think> v1 v2 ; v2 7 ; </think> 7"
    row = {"prompt": prompt, "generation": answer, "documents": {"a": "v1 v2 ;", "b": "the sun shines ."}}
    runs.run([row | {"evidence": ["v2 7"]}], method, tmp_path / "out")
    line = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    found = method.attribute(prompt, answer)
    assert line["id"] == "0"
    assert [unit["name"] for unit in line["documents"]][:2] == ["a", "b"]
    assert line["documents"][0]["score"] == pytest.approx(float(found.scores[:3].sum()), rel=1e-5)
    assert line["evidence"]["positions"] == [3, 4]


def test_a_row_without_a_generation_is_written_first(method, tmp_path):
    prompt = ROWS[4]["prompt"]
    runs.run([{"prompt": prompt}], method, tmp_path / "out", max_new_tokens=40)
    model, tokenizer = reasoner.load()
    expected = method.attribute_text(write(model, tokenizer, prompt, 40))
    assert dict(runs.read(tmp_path / "out")) == {"0": expected}
    assert json.loads((tmp_path / "out" / "results.jsonl").read_text())["generated"] is True


def test_targets_reasoning_and_chat_messages(method, tmp_path):
    sample = tasks.make("variable_tracking", 3, hops=2, chains=2, length=48)
    asked = {"messages": sample.messages, "target": "</think>", "reasoning": [50, 52]}
    runs.run([asked | {"generation": sample.generation}], method, tmp_path / "out")
    found = dict(runs.read(tmp_path / "out"))["0"]
    assert found == method.attribute(sample.messages, sample.generation, target="</think>", reasoning=slice(50, 52))
    assert found.messages == 1 and found.text(found.target).strip() == "</think>"


def test_messages_that_end_with_the_answer_hold_the_generation(method, tmp_path):
    sample = tasks.make("variable_tracking", 3, hops=2, chains=2, length=48)
    answered = [*sample.messages, {"role": "assistant", "content": sample.generation}]
    runs.run([{"messages": answered}], method, tmp_path / "out")
    assert dict(runs.read(tmp_path / "out"))["0"] == method.attribute(sample.messages, sample.generation)


# Where rows come from


def test_all_inputs_give_the_same_rows(tmp_path):
    import datasets
    import pandas as pd

    renamed = [{"question": r["prompt"], **{k: v for k, v in r.items() if k != "prompt"}, "more": 1} for r in ROWS]
    names = {"prompt": "question"}
    lines = as_lines(tmp_path / "rows.jsonl", renamed)
    pd.DataFrame(renamed).to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict({"test": datasets.Dataset.from_list(renamed)}).save_to_disk(tmp_path / "saved")
    (tmp_path / "hub").mkdir()
    pd.DataFrame(renamed).to_parquet(tmp_path / "hub" / "train.parquet")
    wanted = [row.digest for row in DataSet(ROWS)]
    for rows, split in ((lines, None), (tmp_path / "rows.parquet", None), (tmp_path / "saved", "test")):
        assert [row.digest for row in DataSet(rows, names, split)] == wanted, rows
    hub = DataSet(str(tmp_path / "hub"), names)
    assert [row.digest for row in hub] == wanted
    assert len(DataSet(lines)) == len(DataSet(tmp_path / "rows.parquet")) == 24
    with pytest.raises(InputError, match="has the splits test; choose one of them, got 'train'"):
        list(DataSet(tmp_path / "saved", split="train"))


def test_messages_of_a_columnar_file_lose_their_empty_fields(tmp_path):
    import datasets

    mixed = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": "c"}]
    asked = {"messages": [*mixed, {"role": "user", "content": "d"}], "generation": "e"}
    datasets.Dataset.from_list([asked]).save_to_disk(tmp_path / "saved")
    assert [r.digest for r in DataSet(tmp_path / "saved")] == [r.digest for r in DataSet([asked])]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ("nowhere.jsonl", {}, "cannot read nowhere.jsonl: No such file"),
        (__file__, {}, "cannot read rows from .*test_runs.py; give JSON lines"),
        ("nowhere.parquet", {"split": "train"}, "a file has no split"),
        ([], {"names": {"answer": "x"}}, "there is no column answer; rows have id, prompt"),
    ],
)
def test_inputs_that_are_none(rows, options, message):
    with pytest.raises(InputError, match=message):
        DataSet(rows, **options)


def test_rows_are_sorted_within_a_window_and_long_ones_stand_alone():
    rows = [Row(i, "0" * 16, str(i), "x" * size) for i, size in enumerate((3, 9, 5, 40_000, 7, 1))]
    found = [[row.number for row in bucket] for bucket in buckets(rows, Cut(batch=2, window=5))]
    assert found == [[3], [1, 4], [2, 0], [5]]
    with pytest.raises(InputError, match="batch must be a whole number of rows >= 1, got 0"):
        Cut(batch=0)


# Bad rows

BAD = [
    ({"generation": "a"}, "neither prompt nor messages"),
    ({"prompt": "a", "messages": [], "generation": "b"}, "both prompt and messages"),
    ({"prompt": 3, "generation": "a"}, "prompt is 3, a int; it must be a text"),
    ({"prompt": " ", "generation": "a"}, "the prompt is empty"),
    ({"prompt": "v1 2 ; ? v1", "generation": ""}, "the generation is empty"),
    ({"prompt": "v1 2 ; ? v1", "generation": "2", "target": "nowhere"}, "nowhere"),
    ({"prompt": "v1 2 ; ? v1", "generation": "2", "target": {"a": 1}}, "target is {'a': 1}"),
    ({"prompt": "v1 2 ; ? v1", "generation": "<think> v1 2"}, "think"),
    ({"prompt": "v1 2 ; " * 5000, "generation": "2"}, "positions"),
    ({"prompt": "v1 2 ; ? v1", "generation": "\ud800"}, "half of a surrogate pair"),
    ({"prompt": "v1 2 ; ? v1", "generation": "2", "documents": {"a": "not there"}}, "document 'a' is not in"),
    ({"prompt": "v1 2 ; ? v1", "generation": "2", "evidence": [99]}, "evidence 99 is no position"),
    ({"messages": [{"role": "user"}], "generation": "2"}, "message 0 "),
    ({"prompt": "v1 2 ; ? v1", "tools": [], "generation": "2"}, "tools need messages"),
    ({"id": "q1", "prompt": "v1 2 ; ? v1", "generation": "2"}, "row 1 has the same id"),
    ({"id": True, "prompt": "v1 2 ; ? v1", "generation": "2"}, "the id is True"),
    (["no", "object"], "the row is a list, not an object"),
]


def test_a_bad_row_is_a_result_of_its_own_and_takes_no_other_with_it(method, expected, tmp_path):
    mixed = [*ROWS[:8], *(row for row, _ in BAD), *ROWS[8:]]
    summary = runs.run(mixed, method, tmp_path / "out")
    assert (summary.explained, summary.failed) == (len(ROWS), len(BAD))
    assert same(tmp_path / "out", expected)
    found = {one.number: one for one in runs.failures(tmp_path / "out")}
    for number, (row, message) in enumerate(BAD, 8):
        assert message in found[number].message, (row, found[number])
        assert found[number].error in ("InputError", "SpanError")
    assert found[8 + 14].id == "q1" and found[8 + 16].id is None
    again = runs.run(mixed, method, tmp_path / "out")
    assert (again.explained, again.failed, again.before, again.failures) == (0, 0, len(mixed), len(BAD))


def test_lines_that_are_no_json_are_told_by_their_number(method, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n{cut\n" + b"\xff\xfe\n" + good.replace(b"q0", b"q9"))
    summary = runs.run(path, method, tmp_path / "out")
    assert (summary.explained, summary.failed) == (2, 2)
    told = [str(one) for one in runs.failures(tmp_path / "out")]
    assert told[0].startswith("row 1: InputError: line 3 is not JSON") and "line 4 is not JSON" in told[1]


def test_what_is_wrong_with_the_device_is_no_rows_failure(method, tmp_path, monkeypatch):
    def broken(self, *args, **kwargs):
        raise torch.AcceleratorError("device-side assert")

    monkeypatch.setattr(Method, "attribute_batch", broken)
    with pytest.raises(RuntimeError):
        runs.run(ROWS[:2], method, tmp_path / "out")
    monkeypatch.undo()
    assert runs.run(ROWS[:2], method, tmp_path / "out").explained == 2


def test_failures_are_tried_again_when_asked(method, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Method, "attribute", full)
    monkeypatch.setattr(Method, "attribute_batch", full)
    assert runs.run(ROWS[:3], method, tmp_path / "out").failed == 3
    monkeypatch.undo()
    assert runs.run(ROWS[:4], method, tmp_path / "out").explained == 1
    summary = runs.run(ROWS[:4], method, tmp_path / "out", retry=True)
    assert (summary.explained, summary.before, summary.failures) == (3, 1, 0)
    assert len(dict(runs.read(tmp_path / "out"))) == 4 and not list(runs.failures(tmp_path / "out"))


# Going on


def test_going_on_redoes_nothing(method, expected, tmp_path, monkeypatch):
    runs.run(ROWS[:10], method, tmp_path / "out", batch=3)
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    summary = runs.run(ROWS, method, tmp_path / "out", batch=4)  # rows that were added since
    assert (summary.explained, summary.before) == (14, 10)
    assert (tmp_path / "out" / "results.jsonl").read_bytes().startswith(before)
    assert same(tmp_path / "out", expected)
    monkeypatch.setattr(Recipe, "made", lambda self: pytest.fail("nothing is left, so no model is needed"))
    assert runs.run(ROWS, RECIPE, tmp_path / "out").before == 24


@pytest.mark.parametrize("cut", [1, 40, 3000, -1])
def test_a_last_line_that_was_cut_is_done_again(method, expected, tmp_path, cut):
    runs.run(ROWS[:6], method, tmp_path / "out", batch=1)
    path = tmp_path / "out" / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
    assert len(list(runs.read(tmp_path / "out"))) == 5  # a run that is still going on can be read
    summary = runs.run(ROWS[:6], method, tmp_path / "out")
    assert (summary.explained, summary.before) == (1, 5)
    assert same(tmp_path / "out", {id: expected[id] for id in list(expected)[:6]})


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (Recipe("reasoner", "ifr"), "method is 'flashtrace' there and 'ifr' here"),
        (Recipe("reasoner", "flashtrace", {"hops": 1}), "hops is 2 there and 1 here; positions is 'predicting' there"),
        (Recipe("elsewhere", "flashtrace", RECIPE.options), "model is 'reasoner' there and 'elsewhere' here"),
    ],
)
def test_the_folder_of_another_run_is_refused_before_a_model_is_loaded(method, tmp_path, other, told):
    runs.run(ROWS[:2], RECIPE, tmp_path / "out")
    with pytest.raises(InputError, match="holds another run") as refused:
        runs.run(ROWS[:2], other, tmp_path / "out")
    assert told in str(refused.value)


def test_another_version_other_rows_and_another_model_are_refused(method, tmp_path, monkeypatch):
    out = tmp_path / "out"
    runs.run(ROWS[:4], method, out)
    with pytest.raises(InputError, match=r"row 0 of the input \(id 'q4'\) is not the one that the folder has"):
        runs.run(ROWS[4:], method, out)
    with pytest.raises(InputError, match="max_new_tokens is 512 there and 9 here"):
        runs.run(ROWS, method, out, max_new_tokens=9)
    with monkeypatch.context() as patch:
        patch.setattr("flashtrace_plugin.runs.engine.__version__", "9.9")
        with pytest.raises(InputError, match=r"version is '0\.\d+\.\d+' there and '9.9' here"):
            runs.run(ROWS, method, out)
    model, tokenizer = reasoner.load()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    other = FlashTrace(model, tokenizer, **RECIPE.options)
    assert fingerprint(other) != fingerprint(method)
    with pytest.raises(InputError, match="results of another model under the same name"):
        runs.run(ROWS, other, out)
    assert len(list(runs.read(out))) == 4


def test_folders_that_cannot_be_a_runs(method, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for out, message in (("file/out", "cannot write the folder"), ("full", "is no folder of a run: .* thesis.tex")):
        with pytest.raises(InputError, match=message):
            runs.run(ROWS[:1], Recipe("not loaded"), tmp_path / out)
    with pytest.raises(InputError, match="is no folder of a run"):
        list(runs.read(tmp_path / "full"))


def test_two_runs_do_not_write_one_folder(method, tmp_path):
    about = {"version": "1", "method": "m", "model": "n", "max_new_tokens": 1, "settings": {}}
    with Folder(tmp_path, about), pytest.raises(InputError, match="another run is writing"), Folder(tmp_path, about):
        pass


def test_a_recipe_and_its_method_note_the_same_settings(method):
    assert RECIPE.settings() == method.settings()
    with pytest.raises(InputError, match="has no option hopes; it takes hops"):
        Recipe("reasoner", "flashtrace", {"hopes": 1})


# Stops

FORK = multiprocessing.get_context("fork")
FLAGS = ["--method", "flashtrace", "--hops", "2", "--positions", "predicting", "--batch", "2"]


def size(out: Path) -> int:
    return (out / "results.jsonl").stat().st_size


def test_a_killed_run_goes_on_with_nothing_lost_and_nothing_done_twice(method, expected, tmp_path):
    out, draw = tmp_path / "out", random.Random(0)
    before = b""
    for _ in range(4):
        child = FORK.Process(target=runs.run, args=(ROWS, method, out), kwargs={"batch": 2})
        child.start()
        while child.is_alive() and (not (out / "results.jsonl").exists() or size(out) <= len(before)):
            time.sleep(0.001)
        time.sleep(draw.random() * 0.1)
        child.kill()
        child.join()
        now = (out / "results.jsonl").read_bytes()
        assert child.exitcode == -signal.SIGKILL and now.startswith(before)
        before = now[: now.rfind(b"\n") + 1]
    summary = runs.run(ROWS, method, out)
    assert summary.before == before.count(b"\n") < summary.total == 24
    assert (out / "results.jsonl").read_bytes().startswith(before)
    assert same(out, expected)


def test_control_c_is_told_and_the_exit_code_is_130(expected, tmp_path):
    rows, out = as_lines(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    command = [sys.executable, "-m", "flashtrace_plugin", "run", str(rows), "--out", str(out), *FLAGS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not ((out / "results.jsonl").exists() and size(out)):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130, told
    assert told.strip() == f"Stopped. What was found is in {out}; the same command goes on from there."
    assert 0 < runs.run(rows, RECIPE, out).before < 24
    assert same(out, expected)


def test_a_full_disk_loses_nothing_and_says_so(method, expected, tmp_path):
    out = tmp_path / "out"
    runs.run(ROWS[:2], method, out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size(out) + 100, hard))
        with pytest.raises(InputError, match=r"2 results are saved\. Make room and start the same run again"):
            runs.run(ROWS, method, out, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert all(head_of(line) for line in (out / "results.jsonl").read_bytes().splitlines())
    assert runs.run(ROWS, method, out).before == 2
    assert same(out, expected)


# The command line and the page


def test_the_command_gives_the_numbers_of_python_and_an_exit_code(expected, tmp_path):
    rows = as_lines(tmp_path / "rows.jsonl", [*ROWS[:5], {"prompt": "x"}, {"id": "<b>", "generation": "x"}])
    out = tmp_path / "out"
    told = call("run", rows, "--out", out, *FLAGS, "--reports", "--max-new-tokens", 4)
    assert told.exit_code == 3, told.output
    assert "row 6 (id '<b>'): InputError: the row has neither prompt nor messages" in told.stderr
    assert "explained" in told.stdout and out.joinpath("index.html").as_uri() in told.stdout
    assert "row/s" not in told.stderr  # quiet where nobody watches
    found = dict(runs.read(out))
    assert all(torch.allclose(found[f"q{i}"].scores, expected[f"q{i}"].scores, atol=1e-5) for i in range(5))
    again = call("run", rows, "--out", out, *FLAGS, "--max-new-tokens", 4)
    assert again.exit_code == 3 and "7 were there" in again.stdout
    assert call("run", as_lines(rows, ROWS[:5]), "--out", tmp_path / "good", *FLAGS).exit_code == 0
    assert call("run", as_lines(rows, [{"id": "x"}]), "--out", tmp_path / "none", *FLAGS).exit_code == 2
    refused = call("run", rows, "--out", out, "--method", "flashtrace", "--hopes", "2")
    assert refused.exit_code == 2 and "has no option hopes" in refused.stderr


def test_columns_of_other_names(tmp_path):
    rows = as_lines(tmp_path / "rows.jsonl", [{"question": ROWS[0]["prompt"], "generation": ROWS[0]["generation"]}])
    assert call("run", rows, "--out", tmp_path / "out", *FLAGS, "--column", "prompt=question").exit_code == 0
    wrong = call("run", rows, "--out", tmp_path / "b", *FLAGS, "--column", "prompt=query")
    assert wrong.exit_code == 2 and "the row has no column 'query'" in wrong.stderr
    assert "not of the form NAME=COLUMN" in call("run", rows, "--out", tmp_path / "c", "--column", "prompt").stderr


def test_the_page_lists_rows_and_failures_and_hostile_text_stays_text(method, tmp_path):
    hostile = "<script>alert(1)</script>"
    rows = [ROWS[0] | {"id": hostile}, {"id": "no", "prompt": ROWS[1]["prompt"], "generation": "1", "target": hostile}]
    out = tmp_path / "out"
    runs.run([*rows, ROWS[2]], method, out, reports=True)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "3 rows" in page and "1 not explained" in page
    assert hostile not in page and page.count("&lt;script&gt;") >= 2
    assert 'href="reports/0.html"' in page and (out / "reports" / "2.html").is_file()
    assert not (out / "reports" / "1.html").exists()
    assert "http://" not in page and "https://" not in page and "<script" not in page
    (out / "reports" / "2.html").unlink()
    runs.run([*rows, ROWS[2]], method, out, reports=True)
    assert (out / "reports" / "2.html").is_file()


def test_an_engine_that_cannot_be_is_refused(method, tmp_path):
    for options, message in (
        ({"engine": "spark"}, "engine must be one of"),
        ({"engine": "local", "workers": 2}, "workers=2 needs engine='ray'"),
        ({"engine": "ray"}, "pass a Recipe"),
        ({"workers": 0}, "workers must be a whole number >= 1"),
    ):
        with pytest.raises(InputError, match=message):
            runs.run(ROWS, method, tmp_path / "out", **options)


def test_a_run_holds_a_window_of_rows_and_no_more(method, tmp_path):
    seen = []

    def stream():
        for i, row in enumerate(ROWS):
            seen.append(i)
            yield row

    done = left(DataSet(stream()), {})
    first = next(buckets(done, Cut(batch=2, window=6)))
    assert len(first) == 2 and seen == list(range(6))
    assert not any(isinstance(row, Failure) for row in first)


class _Died(BaseException):
    """What a kill looks like from inside: nothing after it runs."""


def test_a_row_that_kills_workers_is_told_and_others_of_its_bucket_are_explained(tmp_path):
    bucket = [Row(i, "0" * 16, f"q{i}", "x") for i in range(3)]
    explained = []

    def lines(rows):
        if any(row.number == 1 for row in rows):
            raise _Died
        explained.extend(row.number for row in rows)
        return [f"line {row.number}".encode() for row in rows]

    for _ in range(2):
        with pytest.raises(_Died):
            Hand(tmp_path).explained(bucket, lines)
    first, told, last = Hand(tmp_path).explained(bucket, lines)
    assert (first, last) == (b"line 0", b"line 2") and head_of(told).failed and b"a worker died twice" in told
    assert Hand(tmp_path).explained(bucket[:1], lines) == [b"line 0"]
    Hand(tmp_path).empty()
    with pytest.raises(_Died):
        Hand(tmp_path).explained(bucket, lines)


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = []
    text = (Path(runs.__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "runs.md", "exec"), {"print": lambda *values: printed.append(" ".join(map(str, values)))})
    assert printed == ["1 1", "a 84", "b SpanError"]

"""Ray Data as the engine of a run: the rows, numbers and files of the plain one, whatever happens to its workers."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from flashtrace_plugin import runs
from flashtrace_plugin.errors import InputError
from tests.test_runs import RECIPE, ROWS, as_lines, same, size

ray = pytest.importorskip("ray", reason="the extra 'runs' is not installed")
psutil = pytest.importorskip("psutil")

# One session of Ray for all that follows, because starting it takes longer than everything else.
TWICE = [*ROWS, *({**row, "id": f"{row['id']} again"} for row in ROWS)]


@pytest.fixture(scope="module", autouse=True)
def session():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def expected():
    method = RECIPE.made()
    found = {row["id"]: method.attribute(row["prompt"], row["generation"]) for row in ROWS}
    return found | {f"{id} again": one for id, one in found.items()}


def worker_pids() -> list[int]:
    """Processes of the actors that hold a model."""
    family = psutil.Process().children(recursive=True)
    return [p.pid for p in family if any("MapWorker" in word for word in p.cmdline())]


def kill_a_worker(out, killed: list[int]) -> None:
    """Once there are results, a worker is killed, as a machine's own guard of its memory would."""
    while not ((out / "results.jsonl").exists() and size(out)):
        time.sleep(0.005)
    os.kill(worker_pids()[0], signal.SIGKILL)
    killed.append((out / "results.jsonl").read_bytes().count(b"\n"))


def test_a_killed_worker_loses_nothing_and_other_workers_go_on(expected, tmp_path):
    rows = as_lines(tmp_path / "rows.jsonl", [*TWICE, {"id": "bad", "prompt": "x", "target": "nowhere"}])
    out, killed = tmp_path / "out", []
    killer = threading.Thread(target=kill_a_worker, args=(out, killed), daemon=True)
    killer.start()
    first = runs.run(rows, RECIPE, out, batch=2, engine="ray", workers=2)
    killer.join(5)
    assert 0 < killed[0] < len(TWICE) and (first.explained, first.failed) == (len(TWICE), 1)
    assert same(out, expected)
    # What is missing is found by another number of workers, and by none.
    lines = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
    (out / "results.jsonl").write_bytes(b"".join(lines[:40]))
    second = runs.run(rows, RECIPE, out, batch=2, engine="ray", workers=1)
    assert (second.before, second.total) == (40, len(lines))
    (out / "results.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:50])
    third = runs.run(rows, RECIPE, out, batch=2)
    assert (third.before, third.total) == (7, len(lines))
    assert same(out, expected)


def test_other_rows_are_refused_in_the_words_of_the_plain_run(tmp_path):
    runs.run(ROWS[:2], RECIPE, tmp_path / "out")
    with pytest.raises(InputError, match=r"row 0 of the input \(id 'q4'\) is not the one that the folder has"):
        runs.run(ROWS[4:6], RECIPE, tmp_path / "out", engine="ray", workers=1)

"""Measures methods on cases, one line of JSON for each as soon as it is known.

values = measure_cases(model, cases, {"FlashTrace": scorer(FlashTrace(model))}, out=Path("results.jsonl"))
means(values, METRICS);  differences(values, METRICS, "FlashTrace", sample=SAMPLE)         # from tables
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import FlashTraceError, InputError
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.metrics.scores import Scores, as_scores
from flashtrace_plugin.evaluation.run.contestants import Scorer
from flashtrace_plugin.evaluation.run.lines import append_line, cut_unfinished, read_lines
from flashtrace_plugin.evaluation.run.measures import DELETIONS, Subject, measure

if TYPE_CHECKING:
    import pandas as pd

SAMPLE = ("task", "seed", "number", "answer")
"""The columns that together name a case."""

_NEEDED = ("case", "method", "digest", "model")


def measure_cases(
    model: Any,
    cases: Iterable[Case],
    scorers: Mapping[str, Scorer],
    *,
    out: Path,
    groups: Iterable[str] = ("evidence", "curves"),
    steps: int = DELETIONS,
    batch_size: int | None = None,
    progress: bool = True,
    known: Mapping[tuple[str, str], str] | None = None,
    note_errors: bool = False,
) -> pd.DataFrame:
    """Measures every method on every case.

    cases:       with different names
    scorers:     methods by name
    out:         file of the lines; what it holds already is not computed again, and a last line that was cut off is
                 dropped
    groups:      what is measured, see :mod:`flashtrace_plugin.evaluation.run.measures`
    steps:       groups of deletion; 20 in the papers
    batch_size:  rows per forward pass
    known:       digests by case and method that other files hold, beside those of ``out``
    note_errors: what a method refuses becomes a line that says so, and the run goes on
    result:      one row for each line of the file

    Raises InputError for a file of another model or of other cases of the same name, and for one that cannot be
    written; what was measured stays.
    """
    finished = finished_lines(out, str(model.config.name_or_path)) | dict(known or {})
    groups = tuple(groups)
    for case in tqdm(cases, desc="cases", unit="case", disable=not progress):
        for name in scorers:
            check_same(finished.get((case.name, name), case.digest), case, out)
        subject = Subject(model, case, steps, batch_size)
        for name in [name for name in scorers if (case.name, name) not in finished]:
            append_line(out, _line(subject, name, scorers[name], groups, note_errors))
    return read_results(out)


def _line(subject: Subject, name: str, score: Scorer, groups: Iterable[str], note_errors: bool) -> dict[str, Any]:
    head = _head(subject) | {"method": name}
    unit = subject.forward_seconds
    began = time.perf_counter()
    try:
        given = score(subject.case)
        spent = time.perf_counter() - began
        found = measure(subject, _magnitudes(given, subject.case), groups)
    except FlashTraceError as error:
        if not note_errors:
            raise
        return head | {"error": f"{type(error).__name__}: {error}"}
    clocked = {"seconds": spent, "cost": spent / unit, "seconds to measure": time.perf_counter() - began - spent}
    return head | {key: _plain(value) for key, value in found.items()} | clocked


def _head(subject: Subject) -> dict[str, Any]:
    case = subject.case
    return {
        "model": str(subject.model.config.name_or_path),
        **{column: getattr(case, column) for column in SAMPLE},
        "case": case.name,
        "digest": case.digest,
        "answers": _answers_of(case),
        "right": case.right,
        "forced": case.forced,
        "prompt_length": case.prompt_length,
        "reasoning_length": len(case.reasoning) if case.reasoning is not None else 0,
        "generation_length": len(case.generation),
    }


def _answers_of(case: Case) -> str:
    """Whether the answer is right, forced or wrong: tables never mix them."""
    return "forced" if case.forced else "right" if case.right else "wrong"


def _magnitudes(given: Scores, case: Case) -> Scores:
    """Signed scores count by size; what an Attribution tells beside its scores is kept."""
    if isinstance(given, Attribution):
        return given if not bool((given.scores < 0).any()) else _unsigned(given)
    return as_scores(given, case.prompt_length)


def _unsigned(given: Attribution) -> Attribution:
    from dataclasses import replace

    return replace(given, scores=given.scores.abs())


def _plain(value: Any) -> Any:
    """JSON has no nan: what is not defined is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(*files: Path) -> pd.DataFrame:
    """The lines of files that :func:`measure_cases` wrote, a metric that was not defined for a case as nan."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("tables need pandas: pip install 'flashtrace-plugin[evaluation]'") from error
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in _all(files):
        found.setdefault((line["case"], line["method"]), line)
    return pandas.DataFrame(list(found.values()))


def _all(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        yield from read_lines(file, _NEEDED)


def finished_lines(out: Path, model: str) -> dict[tuple[str, str], str]:
    """Digests by case and method of what the file holds, after a line that was cut off is removed from it."""
    found = digests(out, model)
    cut_unfinished(out)
    return found


def digests(out: Path, model: str) -> dict[tuple[str, str], str]:
    """The same of a file that is only read. Raises InputError for results of another model."""
    found = {}
    for line in read_lines(out, _NEEDED):
        if line["model"] != model:
            raise InputError(f"{out} holds results of the model {line['model']!r}, not {model!r}; give another file")
        found[line["case"], line["method"]] = line["digest"]
    return found


def check_same(digest: str, case: Case, out: Path) -> None:
    """Raises InputError where the file holds another case of the same name."""
    if digest != case.digest:
        raise InputError(f"{out} holds results of another case named {case.name!r}; give another file as out")

"""Tidy tables of a run: one row for each task, kind of answers, method and metric, with counts and intervals.

``means.csv`` and ``differences.csv`` are for programs, ``report.md`` is for readers, the figures lie beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.metrics.bootstrap import Estimate, bootstrap
from flashtrace_plugin.evaluation.run.contestants import method_label
from flashtrace_plugin.evaluation.run.draws import count_drawn
from flashtrace_plugin.evaluation.run.figures import write_figures
from flashtrace_plugin.evaluation.run.manifest import manifest_of, write_file
from flashtrace_plugin.evaluation.run.measures import LOWER, METRICS, NEUTRAL
from flashtrace_plugin.evaluation.run.runner import read_results
from flashtrace_plugin.evaluation.tables import interval_text, markdown

_FALLING = {"RISE": "falls", "MAS": "falls", "RISE of the answer": "falls of the answer"}
_FALLING |= {"MAS of the answer": "falls of the answer"}
"""Metrics that say nothing of a sample whose likelihood does not fall without its prompt, and where that stands."""


def line_files(folder: Path) -> list[Path]:
    """The files of lines of a run, of all its shards."""
    return sorted(folder.glob("lines-*.jsonl"))


def read_run(folder: Path) -> pd.DataFrame:
    """All lines of a run; RISE and MAS are nan where the likelihood does not fall.

    Raises InputError for a folder that holds no run, or no line.
    """
    manifest_of(folder)
    values = read_results(*line_files(folder))
    if not len(values):
        raise InputError(f"{folder} holds no results yet: no sample was usable; draw more, or take answers='forced'")
    if "error" not in values:
        values["error"] = None
    for metric, falls in _FALLING.items():
        if metric in values and falls in values:
            values.loc[values[falls] == 0, metric] = math.nan
    return values


def means_of(values: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """One row for each model, task, kind of answers, method and metric, with its count and 95 % interval."""
    return pd.DataFrame(list(_mean_rows(values, metrics or present(values))))


def _mean_rows(values: pd.DataFrame, metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    for (model, task, answers, method), group in values.groupby(["model", "task", "answers", "method"], sort=False):
        head = {"model": model, "task": task, "answers": answers, "method": method}
        for metric in metrics:
            yield head | {"metric": metric} | _estimate(group[metric], len(group))


def differences_of(values: pd.DataFrame, reference: str, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Each method less the reference on the same samples, in the same form."""
    return pd.DataFrame(list(_difference_rows(values, reference, metrics or present(values))))


def _difference_rows(values: pd.DataFrame, reference: str, metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    for (model, task, answers), group in values.groupby(["model", "task", "answers"], sort=False):
        head = {"model": model, "task": task, "answers": answers, "reference": reference}
        by_method = {name: part.set_index("case") for name, part in group.groupby("method", sort=False)}
        known = by_method.pop(reference, None)
        for method, part in by_method.items() if known is not None else ():
            for metric in metrics:
                gained = (part[metric] - known[metric]).dropna()
                yield head | {"method": method, "metric": metric} | _estimate(gained, len(part))


def _estimate(values: Any, samples: int) -> dict[str, Any]:
    """Mean, interval and count; how many samples it is not defined for."""
    sample = pd.Series(values, dtype=float).dropna()
    found = bootstrap(sample) if len(sample) else Estimate(math.nan, math.nan, math.nan, 0)
    return {"n": found.n, "undefined": samples - found.n, "mean": found.mean, "low": found.low, "high": found.high}


def present(values: pd.DataFrame) -> list[str]:
    """The metrics that were measured."""
    return [metric for metric in METRICS if metric in values and bool(values[metric].notna().any())]


def wide(rows: pd.DataFrame, methods: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Methods as rows, metrics as columns, means with intervals as text."""
    cells = {(row.method, row.metric): interval_text(row.mean, row.low, row.high, row.n) for row in rows.itertuples()}
    columns = {
        metric: [cells.get((name, metric), interval_text(math.nan, 0, 0, 0)) for name in methods] for metric in metrics
    }
    return pd.DataFrame(columns, index=pd.Index(_counted_labels(rows, methods), name="method"))


def _counted_labels(rows: pd.DataFrame, methods: Sequence[str]) -> list[str]:
    """Names for readers; a method of fewer samples than the others says how many it has."""
    counts = (rows["n"] + rows["undefined"]).groupby(rows["method"]).max()
    most = counts.max()
    return [
        method_label(name) + (f" (n = {counts.get(name, 0)})" if counts.get(name, 0) < most else "")
        for name in methods
    ]


def write_summary(folder: Path, reference: str) -> None:
    """Writes the tables and figures of a run. Raises InputError where there is nothing, or no room."""
    values = read_run(folder)
    for name, frame in (("means", means_of(values)), ("differences", differences_of(values, reference))):
        write_file(folder / f"{name}.csv", frame.to_csv(index=False))
    figures = write_figures(values, folder / "figures", reference)
    write_file(folder / "report.md", "\n".join(_report(folder, values, reference, figures)) + "\n")


_MAIN = (
    "cost",
    "recovery",
    "AUROC",
    "specificity",
    "RISE",
    "MAS",
    "RISE of the answer",
    "MAS of the answer",
    "log P, top 20%",
)
"""What readers see first; ``means.csv`` has the rest."""


def _report(folder: Path, values: pd.DataFrame, reference: str, figures: Iterable[str]) -> Iterator[str]:
    about = manifest_of(folder)
    yield f"# {about['model']}, suite {about['suite']}\n\n{_told(about)}"
    counts = count_drawn(sorted(folder.glob("samples-*.jsonl")))
    for answers, part in values.groupby("answers", sort=False):
        if part["task"].nunique() > 1:
            yield from results_section(part.assign(task=f"All tasks, {answers} answers"), reference)
    for (task, answers), part in values.groupby(["task", "answers"], sort=False):
        named = part.assign(task=f"{str(task)[0].upper()}{str(task)[1:]}, {answers} answers")
        yield from results_section(named, reference, counts.get(str(task), {}))
    yield from (f"\n![{name}](figures/{name}.png)" for name in figures)


def results_section(values: pd.DataFrame, reference: str, drawn: dict[str, Any] | None = None) -> Iterator[str]:
    """Counts, means and paired differences of values that bear the results_section's title as their task."""
    names, metrics = list(dict.fromkeys(values["method"])), [m for m in _MAIN if m in present(values)]
    yield f"\n## {values['task'].iloc[0]}\n\n{counted(values, drawn or {})}"
    yield f"\n{markdown(wide(means_of(values, metrics), names, metrics))}"
    metrics = [metric for metric in metrics if metric not in NEUTRAL]
    less = differences_of(values, reference, metrics)
    if len(less):
        yield f"\nLess those of {method_label(reference)} on the same samples:"
        yield f"\n{markdown(wide(less, [name for name in names if name != reference], metrics))}"


def _told(about: dict[str, Any]) -> str:
    return (
        f"Weights {about['weights']}, {about['dtype']}, {about['steps']} groups of deletion, seed {about['seed']}, "
        f"version {about['version']}, torch {about['torch']}. Means with 95 % bootstrap intervals over samples. "
        f"Better lower: {', '.join(LOWER)}; cost is in forward passes; all others better higher."
    )


def counted(values: pd.DataFrame, drawn: dict[str, Any]) -> str:
    """How many samples and targets there are, and what is wrong with some of them."""
    first = values.drop_duplicates("case")
    told = f"n = {len(first)} targets of {first['case'].str.rsplit('/', n=1).str[0].nunique()} samples"
    told += f", {drawn['drawn']} drawn." if drawn else "."
    told += _of_samples(
        first, "falls", 0, "deleting the whole prompt does not lower the likelihood, so no RISE and MAS"
    )
    told += _of_samples(values, "all scores equal", 1, "(methods counted one by one) all scores are equal")
    failed = values[values["error"].notna()]
    for method, part in failed.groupby("method", sort=False):
        told += f" {method_label(str(method))} refused {len(part)}: {part['error'].iloc[0]}"
    return told


def _of_samples(values: pd.DataFrame, column: str, value: float, what: str) -> str:
    count = int((values[column] == value).sum()) if column in values else 0
    return f" In {count} {what}." if count else ""

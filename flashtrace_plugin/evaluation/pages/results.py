"""docs/results.md: who finds the evidence, and the papers' tables in form, from the folders of runs."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flashtrace_plugin.evaluation.pages.papers import TABLES, PaperTable
from flashtrace_plugin.evaluation.run.figures import write_figures
from flashtrace_plugin.evaluation.run.manifest import manifest_of
from flashtrace_plugin.evaluation.run.suites import suite_of
from flashtrace_plugin.evaluation.run.summary import read_run, results_section
from flashtrace_plugin.evaluation.tables import cell, markdown

NOT_MEASURED = "not measured"


def read_runs(folders: Iterable[Path]) -> pd.DataFrame:
    """The lines of several folders, with the suite of each; a line that two folders hold counts once."""
    frames = [read_run(folder).assign(suite=manifest_of(folder)["suite"]) for folder in folders]
    return pd.concat(frames, ignore_index=True).drop_duplicates(["model", "case", "method"])


def results_page(folders: Sequence[Path], images: Path) -> str:
    """The page as text; its figures are written to ``images``."""
    values = read_runs(folders)
    parts = [_INTRODUCTION.format(date=datetime.date.today(), runs=_runs(folders))]
    for (model, suite), part in values.groupby(["model", "suite"], sort=False):
        parts += list(_of_model(str(model), str(suite), part, images))
    parts.append(_PAPERS)
    parts += [line for table in TABLES for line in _paper_table(table, values)]
    return "\n".join(parts) + "\n"


def _runs(folders: Sequence[Path]) -> str:
    """What was run, without the paths of this machine."""
    told = []
    for folder in folders:
        about = manifest_of(folder)
        told.append(
            f"    flashtrace-plugin evaluate --suite {about['suite']} --model {about['model']} --seed {about['seed']}"
            f"   # weights {about['weights']}, {about['steps']} groups of deletion, torch {about['torch']}"
        )
    return "\n".join(told)


def _of_model(model: str, suite: str, values: pd.DataFrame, images: Path) -> Iterator[str]:
    """Means over all tasks, one table for each kind of answers, and the figures."""
    reference = suite_of(suite).reference
    for answers, part in values.groupby("answers", sort=False):
        counts = part.drop_duplicates("case").groupby("task", sort=False).size()
        title = f"{model}, suite {suite}, {answers} answers"
        yield from results_section(part.assign(task=title), reference)
        yield f"\nTargets by task: {', '.join(f'{task} {count}' for task, count in counts.items())}."
    folder = images / f"{model}-{suite}".replace("/", "-")
    for name in write_figures(values, folder, reference):
        yield f"\n![{model}, {suite}: {name}]({images.name}/{folder.name}/{name}.png)"


def _paper_table(table: PaperTable, values: pd.DataFrame) -> Iterator[str]:
    """One table for each metric, with a row for the paper's number and one for each model that was measured."""
    yield f"\n### {table.title}\n\n{table.differs}"
    for metric, ours in table.metrics.items():
        rows = list(_rows(table, metric, ours, values))
        names = pd.Index([name for name, _ in rows], name=metric)
        yield f"\n{markdown(pd.DataFrame([cells for _, cells in rows], index=names, columns=list(table.columns)))}"


def _rows(table: PaperTable, metric: str, ours: str, values: pd.DataFrame) -> Iterator[tuple[str, list[str]]]:
    models = list(dict.fromkeys(values["model"]))
    for method, numbers in table.numbers[metric].items():
        yield f"{method}, paper ({table.model})", [f"{number:.3f}" for number in numbers]
        name = table.rows[method]
        mine = values[values["method"] == name]
        for model in models:
            cells = [_measured(mine[mine["model"] == model], tasks, ours) for tasks in table.columns.values()]
            if set(cells) != {NOT_MEASURED}:
                yield f"{method}, {model}", cells
        if name is None or not len(mine):
            yield f"{method}, here", [NOT_MEASURED] * len(table.columns)


def _measured(values: pd.DataFrame, tasks: Sequence[str], metric: str) -> str:
    """The mean on the first of the tasks that was measured, on right answers before forced ones, with its count."""
    for task in tasks:
        for answers in ("right", "forced"):
            found = values[(values["task"] == task) & (values["answers"] == answers)]
            numbers: Any = found[metric].dropna() if metric in found else []
            if len(numbers):
                return f"{cell(numbers)}, n = {len(numbers)}{' forced' if answers == 'forced' else ''}"
    return NOT_MEASURED


_INTRODUCTION = """\
# Which method finds the evidence

Written on {date} by `python -m flashtrace_plugin.evaluation.pages` from what these commands measured so far, with the
counts and methods that each section tells:

{runs}

Each method explains what the model itself wrote; *forced* answers were put into its mouth and *wrong* ones are
measured against the evidence of the right answer, each in tables of their own. Means with 95 % bootstrap intervals
over targets. Recovery, AUROC, specificity and log P with the top fifth of the prompt kept: higher is better; RISE
and MAS: lower, see [metrics.md](metrics.md). Samples whose likelihood does not fall without the prompt have no
RISE and no MAS.

*random* is the floor. *answer key* scores 1 on evidence and question and 0 elsewhere; no method can know that, and it
need not win deletion, which also rewards marks and words that the model leans on without being evidence. Cost is in
forward passes of the same model on the same text; on a machine that does other work it comes out too high. What holds
for these small models need not hold elsewhere: look at the counts.
Measurements with other counts are kept in [earlier-results.md](earlier-results.md).
"""

_PAPERS = f"""
## The papers' tables, in form

The paper's number stands above ours. The models are other ones, so that the order of the rows can be compared and the
numbers cannot. "{NOT_MEASURED}" means that: no run of the folders above has it.
"""

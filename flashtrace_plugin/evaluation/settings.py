"""Evidence for two defaults: how many hops, and what becomes of sinks. Both print Markdown.

python -m flashtrace_plugin.evaluation.settings hops --cases 6
python -m flashtrace_plugin.evaluation.settings sinks --model smollm2 --cases 3
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import pandas as pd
import typer

from flashtrace_plugin.evaluation import models
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.drawing import REASONER_TASKS, english_cases, reasoner_cases
from flashtrace_plugin.evaluation.metrics import recovery
from flashtrace_plugin.evaluation.run.measures import Subject, measure
from flashtrace_plugin.evaluation.tables import cell, markdown
from flashtrace_plugin.evaluation.tasks.english import ENGLISH
from flashtrace_plugin.methods import METHODS

_HOPS = (0, 1, 2, 4, 8, "auto")
_app = typer.Typer(help=(__doc__ or "").splitlines()[0], add_completion=False)


@_app.command("hops")
def _hops(
    method: Annotated[str, typer.Option(help="a method with hops")] = "lrp",
    cases: Annotated[int, typer.Option(help="samples of each task")] = 6,
    seed: Annotated[int, typer.Option(help="of the samples")] = 2,
) -> None:
    """Recovery by number of hops on the reasoner's tasks with thinking, and how many hops "auto" makes."""
    model, tokenizer = models.load("reasoner")
    tasks = [task for task in REASONER_TASKS if not task.startswith("direct")]
    drawn = [c for task in tasks for c in reasoner_cases(model, tokenizer, task, wanted=cases, seed=seed).cases]
    rows = []
    for hops in _HOPS:
        explain = METHODS[method](model, hops=hops)
        found = [explain.attribute_ids(case.input_ids, **case.spans) for case in drawn]
        measured = pd.DataFrame(
            {
                "task": [case.task for case in drawn],
                "recovery": [recovery(a.scores, c.evidence) for a, c in zip(found, drawn, strict=True)],
            }
        )
        made = sum(a.settings["hops_followed"] for a in found) / len(found)
        by_task = measured.groupby("task", sort=False)["recovery"].mean()
        rows.append([cell(measured["recovery"]), *(f"{by_task[task]:.3f}" for task in tasks), f"{made:.1f}"])
    names = pd.Index([str(hops) for hops in _HOPS], name=f"{method}, hops")
    typer.echo(markdown(pd.DataFrame(rows, index=names, columns=["all tasks", *tasks, "hops made"])))


@_app.command("sinks")
def _sinks(
    model: Annotated[str, typer.Option(help="an English model of `evaluation.models`")] = "smollm2",
    cases: Annotated[int, typer.Option(help="samples of each task")] = 3,
    seed: Annotated[int, typer.Option(help="of the samples")] = 2,
) -> None:
    """Quality with sinks kept and dropped, their share, and how often evidence was taken for a sink."""
    lm, tokenizer = models.load(model)
    drawn = [c for task in ENGLISH for c in english_cases(lm, tokenizer, task, wanted=cases, seed=seed).cases]
    rows, names = [], []
    for method in ("flashtrace", "recommended"):
        for sinks in ("report", "drop"):
            rows.append(_measured(lm, METHODS[method](lm, sinks=sinks), drawn))
            names.append(f"{method}, sinks={sinks!r}")
    typer.echo(markdown(pd.DataFrame(rows, index=pd.Index(names, name=model), columns=[*_QUALITY, *_TOLD])))


_QUALITY = ("AUROC", "recovery", "RISE", "MAS", "log P, top 20%")
_TOLD = ("share of sinks", "sinks", "evidence among them")


def _measured(model: Any, method: Any, cases: Iterable[Case]) -> list[str]:
    values: dict[str, list[float]] = {name: [] for name in (*_QUALITY, *_TOLD)}
    for case in cases:
        found = method.attribute_ids(case.input_ids, **case.spans)
        quality = measure(Subject(model, case), found.scores)
        told = (found.settings["sink_share"], len(found.sinks), len(set(found.sinks) & set(case.evidence)))
        for name, value in (quality | dict(zip(_TOLD, told, strict=True))).items():
            if name in values:
                values[name].append(value)
    return [cell(column, 2) for column in values.values()]


if __name__ == "__main__":
    _app()

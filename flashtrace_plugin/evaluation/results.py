"""Which method finds the evidence: all methods and simple baselines on the bundled reasoner, with intervals.

    python -m flashtrace_plugin.evaluation.results --samples 10 --seeds 1

It writes ``docs/results.md``. Needs the extra ``flashtrace-plugin[evaluation]``.
"""

from __future__ import annotations

import datetime
import hashlib
import shlex
import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from flashtrace_plugin import reasoner
from flashtrace_plugin.evaluation import comparison
from flashtrace_plugin.evaluation.baselines import BASELINES
from flashtrace_plugin.evaluation.comparison import SAMPLE, Scorer, scorer
from flashtrace_plugin.evaluation.drawing import REASONER_TASKS, Drawn, reasoner_cases
from flashtrace_plugin.evaluation.tables import differences, markdown, means
from flashtrace_plugin.methods import METHODS

_REFERENCE = "FlashTrace, token, 1 hop"
_COLUMNS = ("recovery", "AUROC", "RISE", "MAS", "RISE of the answer", "MAS of the answer")


def _contestants(model: Any) -> dict[str, Scorer]:
    """Every method and baseline by the name of its row; baselines first, the answer key last."""
    rows: dict[str, Scorer] = {name: partial(baseline, model) for name, baseline in BASELINES.items()}
    key = rows.popitem()
    rows["IFR"] = scorer(METHODS["ifr"](model))
    rows |= {f"recursive, {_counted(k)}": scorer(METHODS["recursive"](model, hops=k)) for k in (1, 4)}
    for positions in ("token", "predicting"):
        for hops in range(5):
            method = METHODS["flashtrace"](model, hops=hops, positions=positions)
            rows[f"FlashTrace, {positions}, {_counted(hops)}"] = scorer(method)
    rows["HETA, squared gradients"] = scorer(METHODS["heta"](model, curvature="gradient_squared", progress=False))
    return rows | dict([key])


def _counted(hops: int) -> str:
    return "1 hop" if hops == 1 else f"{hops} hops"


def document(values: pd.DataFrame, drawn: Mapping[str, int], circumstances: Mapping[str, Any]) -> str:
    """The page.

    values:        of :func:`flashtrace_plugin.evaluation.comparison.run`
    drawn:         samples drawn by task
    circumstances: what the introduction names
    """
    absent = [task for task in drawn if task not in set(values["task"])]
    missing = f" Without a single right sample, and so not measured: {'; '.join(absent)}." if absent else ""
    parts = [
        _INTRODUCTION.format(**circumstances, date=datetime.date.today()),
        f"## All tasks\n\nn = {_cases(values)}.{missing}\n\n{markdown(means(values, _COLUMNS))}\n",
        f"## Difference to “{_REFERENCE}”, sample by sample\n",
        markdown(differences(values, _COLUMNS, _REFERENCE, sample=SAMPLE)) + "\n",
    ]
    parts += [_section(str(task), group, drawn[str(task)]) for task, group in values.groupby("task", sort=False)]
    return "\n".join(parts)


def _section(task: str, values: pd.DataFrame, drawn: int) -> str:
    told = f"n = {_cases(values)}, of {drawn} drawn."
    first = values.drop_duplicates(list(SAMPLE))
    if rising := int((first["falls"] == 0).sum()):
        told += f" In {rising} of them deleting the whole prompt does not lower the likelihood."
    return f"## {task[0].upper()}{task[1:]}\n\n{told}\n\n{markdown(means(values, _COLUMNS))}\n"


def _cases(values: pd.DataFrame) -> int:
    return len(values.drop_duplicates(list(SAMPLE)))


_INTRODUCTION = """\
# Which method finds the evidence

The bundled reasoner ({parameters} parameters, weights {weights}) on synthetic tasks whose evidence is known,
prompts of at most {length} tokens. Written by

    {command}

on {date}, torch {torch}. Numbers are means with 95 % bootstrap intervals over samples. Recovery and AUROC: higher is
better; RISE and MAS: lower is better, see [metrics.md](metrics.md). Deletion takes ten steps; the likelihood that it
lowers is that of the whole generation, or of the answer with the reasoning before it held fixed.

Each method explains what the reasoner itself wrote. Samples where it was wrong anywhere, reasoning included, are left
out, because the evidence for a wrong answer is not known; each section says how many were drawn.

*random* is the floor. *answer key* scores 1 on the evidence and the question and 0 elsewhere; no method can know that,
and it need not win deletion, which also rewards marks and words that the model leans on without being evidence. *leave
one out* pays one forward pass per prompt token to see what deletion does, so it is strong where deletion is measured.
HETA runs with its cheapest curvature (preset GS); its other settings have their own comparison. This is one small
model trained on such tasks; what holds here need not hold elsewhere.
"""


def main(
    samples: Annotated[int, typer.Option(min=1, help="right samples for each task and seed")] = 25,
    seeds: Annotated[int, typer.Option(min=1, help="number of seeds; each draws its own samples")] = 2,
    seed: Annotated[int, typer.Option(help="first seed")] = 0,
    length: Annotated[int, typer.Option(help="longest prompt, in tokens")] = 128,
    task: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(REASONER_TASKS)}; repeatable")] = None,
    weights: Annotated[Path | None, typer.Option(help="folder of the model instead of the bundled one")] = None,
    out: Annotated[Path, typer.Option(help="Markdown file to write")] = Path("docs/results.md"),
    lines: Annotated[
        Path | None, typer.Option(help="file that keeps the measurements; what it holds is not computed again")
    ] = None,
) -> None:
    """Compare all methods on the reasoner's tasks, and write and print Markdown tables with their circumstances."""
    if unknown := set(task or ()) - set(REASONER_TASKS):
        raise typer.BadParameter(f"no task {', '.join(unknown)}; tasks are {', '.join(REASONER_TASKS)}")
    model, tokenizer = reasoner.load(weights)
    circumstances = {
        "command": _command(samples=samples, seeds=seeds, seed=seed, length=length, task=task or []),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "weights": _fingerprint(weights or reasoner.path()),
        "length": length,
        "torch": torch.__version__,
    }
    drawn: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        kept = lines or Path(folder) / "lines.jsonl"
        for name in task or REASONER_TASKS:
            found = [
                reasoner_cases(model, tokenizer, name, wanted=samples, seed=seed + k, length=length)
                for k in range(seeds)
            ]
            drawn[name] = sum(one.samples for one in found)
            values = _measured(model, found, kept, drawn)
            # Written after every task, so that an interrupted run keeps the tasks that are done.
            text = document(values, drawn, circumstances) if len(values) else "No sample was right.\n"
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, encoding="utf-8")
    typer.echo(out.read_text(encoding="utf-8"))


def _measured(model: Any, found: Iterable[Drawn], lines: Path, tasks: Iterable[str]) -> pd.DataFrame:
    """What is known after the new cases are measured; lines of other tasks, from another run, are left out."""
    values = comparison.run(
        model, [case for one in found for case in one.cases], _contestants(model), out=lines, steps=20
    )
    return values[values["task"].isin(list(tasks))] if len(values) else values


def _command(**options: Any) -> str:
    """The command that draws the same samples; where it reads and writes does not matter."""
    defaults = {"seed": 0, "length": 128, "task": []}
    words = ["python", "-m", "flashtrace_plugin.evaluation.results"]
    for name, value in options.items():
        if defaults.get(name) != value:
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{name}", str(one)]
    return shlex.join(words)


def _fingerprint(folder: Path) -> str:
    """The first digits of the weights' SHA-256, so that a table can be told from one of other weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


if __name__ == "__main__":
    typer.run(main)

"""docs/choosing.md: one figure and one table for a reader in a hurry, from the folders of runs."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flashtrace_plugin.evaluation.pages.results import NOT_MEASURED, read_runs
from flashtrace_plugin.evaluation.run.contestants import method_label
from flashtrace_plugin.evaluation.run.figures import cost_figure, save

_ADVICE = {
    "recommended": "the default: finds the evidence, and that of *this* answer",
    "lrp": "signed relevance; good on traces of reasoning",
    "flashtrace": "the paper's setting: cheap on the longest texts; tells little of one answer among several",
    "flashtrace:recursion=prompt": "as cheap, better at sentences of evidence in long prompts",
    "flashtrace:positions=predicting:hops=4": "as cheap, more specific where an answer is one token",
    "leave_one_out": "the yardstick of deletion; a forward pass for every token",
    "attribot": "the same at a fraction of its cost",
    "heta:curvature=gradient_squared": "a direct answer without reasoning; a masked pass for every token",
    "alti": "rollout; only where attention parks nowhere",
    "attention": "what a first look costs; no explanation",
    "random": "the floor",
}
"""The rows of the table, and what each is for."""


def choosing_page(folders: Sequence[Path], images: Path) -> str:
    """The page as text; its figure is written to ``images``."""
    values = read_runs(folders)
    values = values[values["answers"] != "wrong"]
    figure = cost_figure(values, list(_ADVICE))
    save(figure, images / "choosing.png")
    return _PAGE.format(date=datetime.date.today(), table=_table(values), figure=f"{images.name}/choosing.png")


def _table(values: pd.DataFrame) -> str:
    models = list(dict.fromkeys(values["model"]))
    head = ["method", "take it for", "cost", *(f"AUROC, {m}" for m in models), *(f"specificity, {m}" for m in models)]
    rows = [[method_label(name), text, *_numbers(values, name, models)] for name, text in _ADVICE.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _numbers(values: pd.DataFrame, method: str, models: Sequence[str]) -> list[str]:
    mine = values[values["method"] == method]
    costs = _text(mine.groupby("model")["cost"].median().max() if "cost" in mine else None, "{:.1f}")
    return [costs, *(_mean(mine, model, metric) for metric in ("AUROC", "specificity") for model in models)]


def _mean(values: pd.DataFrame, model: str, metric: str) -> str:
    found: Any = values.loc[values["model"] == model, metric].dropna() if metric in values else []
    return f"{found.mean():.2f} ({len(found)})" if len(found) else NOT_MEASURED


def _text(number: Any, form: str) -> str:
    return NOT_MEASURED if number is None or pd.isna(number) else form.format(number)


_PAGE = """\
# Choosing a method

**In a hurry:** `explain(model, tokenizer, prompt, generation)` runs `recommended`. Take `flashtrace` where the text is
so long that a few backward passes do not fit, and `leave_one_out` or `attribot` to check a single case.

![Quality against cost]({figure})

{table}

AUROC: how often a token of the evidence scores above another one (chance .5). Specificity: of two answers in one
generation, the share of the evidence's mass that lies on that of the explained one (chance .5); in brackets the number
of targets. Cost: forward passes of the same model on the same text, the larger median of the models; it is timed, so
on a machine that does other work it comes out too high, and methods are to be compared within a run. Right and forced
answers count alike here; [results.md](results.md) tells them apart, [metrics.md](metrics.md) has the definitions,
[recommended.md](recommended.md) says how the default was chosen. Written on {date} by
`python -m flashtrace_plugin.evaluation.pages` from the folders of `flashtrace-plugin evaluate`.
"""

"""What recursion does to the methods of Inseq and Captum: before, after, and the paired difference.

Run ``python -m benchmarks.recursion`` from the repository's root; it writes ``docs/recursion.md``. A run that was
stopped goes on where it was, in the file of ``--lines``.

Each method runs in its host once for every generated token; its rows are read three times at no further cost.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import captum
import inseq
import pandas as pd
import torch
import transformers
import typer
from captum.attr import FeatureAblation, InputXGradient, LayerIntegratedGradients
from torch import Tensor

from flashtrace_captum import recursive
from flashtrace_inseq.matrices import BaseMatrix
from flashtrace_plugin import FlashTrace, Recursive, reasoner
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.drawing import ONE_OF_TWO, REASONER_TASKS, reasoner_cases
from flashtrace_plugin.evaluation.run.contestants import Scorer, scorer, scorer_of
from flashtrace_plugin.evaluation.run.runner import SAMPLE, measure_cases
from flashtrace_plugin.evaluation.tables import differences, markdown, means

THINKING = [name for name in REASONER_TASKS if not name.startswith("direct")]
METRICS = ("recovery", "specificity", "MAS", "MAS of the answer")
BEFORE, AUTO, ALL = "before", 'hops="auto"', "hops=inf"
HOPS: dict[str, Any] = {AUTO: "auto", ALL: float("inf")}

Base = Callable[[Tensor, Tensor], Tensor]
"""``base(input_ids [N], positions [r])``: what the tokens at these positions rest on, [r, N]."""


def bases(model: Any, tokenizer: Any, steps: int) -> dict[str, Base]:
    """The methods by host and name, with their default aggregation there."""
    host = inseq.load_model(model, "dummy", tokenizer=tokenizer)
    function, n_steps = host.get_attributed_fn(), {"n_steps": steps}
    layer = LayerIntegratedGradients(model, model.get_input_embeddings())

    def of_inseq(name: str, **options: Any) -> Base:
        return BaseMatrix(host, name, options, function, {})

    def of_captum(method: Any, **options: Any) -> Base:
        made = recursive(method)
        return lambda ids, positions: made.rows(ids, positions, **options)

    together = {"perturbations_per_eval": 64}
    return {
        "Inseq saliency": of_inseq("saliency"),
        "Inseq input_x_gradient": of_inseq("input_x_gradient"),
        f"Inseq integrated_gradients, {steps} steps": of_inseq("integrated_gradients", **n_steps),
        "Inseq attention": of_inseq("attention"),
        "Inseq occlusion": of_inseq("occlusion", **together),
        "Captum InputXGradient": of_captum(InputXGradient(model)),
        f"Captum LayerIntegratedGradients, {steps} steps": of_captum(layer, **n_steps),
        "Captum FeatureAblation": of_captum(FeatureAblation(model), **together),
    }


def remembered(base: Base) -> Callable[[Case], Tensor]:
    """The rows of all generated tokens of a case, [M, N]; those of the last sequence are kept for further readings."""
    last: dict[tuple[int, ...], Tensor] = {}

    def rows(case: Case) -> Tensor:
        key = tuple(case.input_ids.tolist())
        if key not in last:
            last.clear()
            last[key] = base(case.input_ids, torch.arange(case.prompt_length, len(case.input_ids)))
        return last[key]

    return rows


def readings(name: str, rows: Callable[[Case], Tensor]) -> dict[str, Scorer]:
    """The answer's rows summed, and the same rows followed through the reasoning."""

    def before(case: Case) -> Tensor:
        answer = slice(case.target.start - case.prompt_length, case.target.stop - case.prompt_length)
        return rows(case)[answer].sum(0).abs()[: case.prompt_length]

    def after(hops: Any) -> Scorer:
        return lambda case: Recursive(rows(case), hops=hops).attribute_ids(case.input_ids, **case.spans).scores

    return {f"{name}: {BEFORE}": before} | {f"{name}: {label}": after(hops) for label, hops in HOPS.items()}


def references(model: Any) -> dict[str, Scorer]:
    """What the table is to be read against."""
    known = {name.replace("_", " "): scorer_of(name, model) for name in ("random", "leave_one_out")}
    return known | {"FlashTrace, 1 hop": scorer(FlashTrace(model))}


def drawn(model: Any, tokenizer: Any, samples: int, seed: int, length: int) -> list[Case]:
    """Cases of the thinking tasks, and of single answers for specificity; those of one sequence follow each other."""
    given: dict[str, Any] = {"wanted": samples, "seed": seed, "length": length}
    tasks = [*THINKING, *ONE_OF_TWO]
    cases = [case for task in tasks for case in reasoner_cases(model, tokenizer, task, **given).cases]
    return sorted(cases, key=lambda case: case.input_ids.tolist())


def by_sample(values: pd.DataFrame) -> pd.DataFrame:
    """One row for each sample and method: answers of one sample are averaged, and each metric stays with its tasks.

    Specificity is of single answers, all else of whole answers.
    """
    single = values["task"].isin(list(ONE_OF_TWO))
    kept = values.copy()
    kept.loc[single, [name for name in METRICS if name != "specificity"]] = float("nan")
    kept.loc[~single, "specificity"] = float("nan")
    keys = ["method", *(name for name in SAMPLE if name != "answer")]
    return kept.groupby(keys, sort=False)[list(METRICS)].mean().reset_index()


def ordered(values: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """The table of means in the order of the methods."""
    return means(values.sort_values("method", key=lambda column: column.map(names.index), kind="stable"), METRICS)


def changes(values: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Each method after recursion minus itself before, on the same samples."""
    sample = [name for name in SAMPLE if name != "answer"]
    found = []
    for name in names:
        mine = values[values["method"].str.startswith(f"{name}: ")]
        found.append(differences(mine, METRICS, f"{name}: {BEFORE}", sample=sample))
    return pd.concat(found).rename_axis("after minus before")


def document(values: pd.DataFrame, names: list[str], compared: list[str], options: dict[str, Any]) -> str:
    """The page."""
    cases = values.drop_duplicates(list(SAMPLE))
    whole = cases[~cases["task"].isin(list(ONE_OF_TWO))]
    samples = by_sample(values)
    single = samples.dropna(subset="specificity")["method"].value_counts().max()
    return TEXT.format(
        **options,
        command=" ".join(["python", "-m", "benchmarks.recursion", *sys.argv[1:]]),
        date=datetime.date.today(),
        captum=captum.__version__,
        inseq=version("inseq"),
        transformers=transformers.__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        prompt=f"{whole['prompt_length'].mean():.0f}",
        response=f"{whole['generation_length'].mean():.0f}",
        whole=len(whole),
        single=single,
        tasks="; ".join(THINKING),
        means=markdown(ordered(samples, names)),
        differences=markdown(changes(samples, compared)),
    )


TEXT = """\
# Recursion for the methods of Inseq and Captum

A method that explains one token at a time tells what the answer rests on directly: mostly the reasoning before it.
[Recursion](how-it-works.md) goes on from there: what a token of the reasoning got is passed on to what that token
rests on. In Inseq this is `model.attribute(..., method="recursive", base="saliency")`, or for a stored result
`flashtrace_inseq.recursive(out, model.tokenizer)`; in Captum `flashtrace_captum.recursive(Saliency(model))`; in Python
`Recursive(matrix)`.

The bundled reasoner, {samples} right samples for each task ({tasks}); prompts of {prompt} and generations of
{response} tokens on average. Written by

    {command}

on {date}: inseq {inseq}, captum {captum}, transformers {transformers}, torch {torch}, {threads} thread(s), CPU.

*before* is the sum of the answer's rows, its sign dropped, which is what the hosts show for an answer. The other two
are the same rows after recursion: `hops="auto"` until a thousandth of the mass is left, `hops=inf` all at once.
Inseq's rows are aggregated as it does by default (L2 norm over the embedding; attention: mean of heads and layers),
Captum's are summed over the embedding. Means with 95 % bootstrap intervals over samples: recovery of the evidence
(n = {whole}, higher is better), MAS by deletion, watching the whole generation or the answer alone (n = {whole},
lower is better), and specificity, the share of the mass on the evidence of two answers that lies on that of the
explained one (n = {single}, higher is better, .5 is chance; the first two references do not look at the answer).
[Definitions](metrics.md). One small model; what holds here need not hold elsewhere.

{means}

## What recursion changes

The same samples, after minus before.

{differences}
"""


def main(
    samples: Annotated[int, typer.Option(help="right samples for each task")] = 6,
    seed: Annotated[int, typer.Option(help="of the samples")] = 0,
    length: Annotated[int, typer.Option(help="longest prompt, in tokens")] = 64,
    steps: Annotated[int, typer.Option(help="steps of integrated gradients")] = 20,
    method: Annotated[list[str] | None, typer.Option(help="beginning of a method's name; repeatable")] = None,
    lines: Annotated[Path | None, typer.Option(help="file of all measurements, from which a run goes on")] = None,
    out: Annotated[Path, typer.Option(help="Markdown file to write")] = Path("docs/recursion.md"),
) -> None:
    """Measure methods of Inseq and Captum before and after recursion on the reasoner and write one page."""
    model, tokenizer = reasoner.load()
    known = bases(model, tokenizer, steps)
    chosen = {name: base for name, base in known.items() if not method or name.startswith(tuple(method))}
    if not chosen:
        raise typer.BadParameter(f"methods are {', '.join(known)}", param_hint="method")
    scorers: dict[str, Scorer] = {}
    for name, base in chosen.items():
        scorers |= readings(name, remembered(base))
    scorers |= references(model)
    cases = drawn(model, tokenizer, samples, seed, length)
    if not cases:
        raise typer.BadParameter("the reasoner answered no sample right; draw more", param_hint="samples")
    with tempfile.TemporaryDirectory() as folder:
        values = measure_cases(model, cases, scorers, out=lines or Path(folder) / "lines.jsonl")
    text = document(values, list(scorers), list(chosen), {"samples": samples})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)

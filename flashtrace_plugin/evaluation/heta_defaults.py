"""Evidence for HETA's defaults: gates, curvature, masks, rescaling and weights.

    python -m flashtrace_plugin.evaluation.heta_defaults --samples 5             the bundled reasoner
    python -m flashtrace_plugin.evaluation.heta_defaults --data FILE --model X   a model that reads paragraphs

The terms of a sample are computed once and combined in every way; only recursion needs further runs. Prints Markdown.
Needs the extra ``flashtrace-plugin[evaluation]``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from flashtrace_plugin import reasoner
from flashtrace_plugin.evaluation import models
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.drawing import REASONER_TASKS, reasoner_cases
from flashtrace_plugin.evaluation.heta_paragraphs import FORMS, agreement, answered, diagonal, paragraph_case
from flashtrace_plugin.evaluation.heta_variants import CURVATURES, KnownTerms, terms, variants
from flashtrace_plugin.evaluation.metrics import deletion_curve, dsa, recovery
from flashtrace_plugin.evaluation.tables import markdown, means
from flashtrace_plugin.methods import METHODS

_TASKS = ("direct answer, 1 hop", "variables, 2 hops")
_OF_THE_REASONER = [name for name in CURVATURES if name != "last 6 layers"]
_OF_THE_READER = [name for name in CURVATURES if name != "last 2 layers"]
_COLUMNS = ("recovery", "RISE", "MAS", "DSA", "DSA less default's", "MAS less default's", "inside")


def variant_table(values: pd.DataFrame) -> str:
    """What was measured of every variant, as Markdown."""
    return markdown(means(values, [column for column in _COLUMNS if column in values], by="variant"))


def _deletion(model: Any, case: Case, scores: Tensor) -> dict[str, float]:
    """What deleting the prompt's tokens in the order of their scores does to the answer."""
    curve = deletion_curve(
        model, case.input_ids, prompt_length=case.prompt_length, scores=scores, generation=case.target
    )
    return {"RISE": curve.rise, "MAS": curve.mas()}


# The bundled reasoner


def _recursions(model: Any, case: Case) -> dict[str, Tensor]:
    """HETA through the reasoning; with low rank, so that the hops stay comparable and cheap."""
    if case.reasoning is None:
        return {}
    rows = {}
    for hops in (1, 2):
        for gate in ("flow", "per_head"):
            heta = METHODS["heta"](model, hops=hops, gate=gate, curvature="low_rank", progress=False, max_cost=None)
            rows[f"low rank, hops {hops}, gate {gate}"] = heta.attribute_ids(case.input_ids, **case.spans).scores
    return rows


def _reasoner_rows(model: Any, cases: Iterable[Case], seed: int) -> Iterator[dict[str, Any]]:
    for case in cases:
        found = terms(model, case, _OF_THE_REASONER, ("zero", "mean", "pad"))
        for name, scores in (variants(found, seed) | _recursions(model, case)).items():
            reached = {
                "recovery": recovery(scores, case.evidence),
                "DSA": dsa(scores, case.evidence, case.distractors),
            }
            yield {"seed": seed, "variant": name} | reached | _deletion(model, case, scores)


def _reasoner_tables(chosen: Sequence[str], samples: int, seeds: int, length: int) -> None:
    model, tokenizer = reasoner.load()
    for task in chosen:
        rows: list[dict[str, Any]] = []
        for seed in range(seeds):
            drawn = reasoner_cases(model, tokenizer, task, wanted=samples, seed=seed, length=length)
            rows += _reasoner_rows(model, tqdm(drawn.cases, desc=f"{task}, seed {seed}"), seed)
        typer.echo(f"\n**{task}**, {seeds} seeds x {samples} samples\n\n{variant_table(pd.DataFrame(rows))}")


# Mixed paragraphs


def paragraph_rows(
    model: Any, case: Case, curvatures: Sequence[str], seed: int, path: Path, *, deleted: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """One row per variant. The terms are kept in a file, so that what is there is not computed again.

    deleted: variants whose deletion curve is measured, which takes a few seconds each
    """
    known = KnownTerms.load(path) if path.exists() else None
    found = terms(model, case, curvatures, ("zero", "mean"), seed=seed, known=known)
    found.save(path)
    plain = METHODS["flashtrace"](model, hops=0).attribute_ids(case.input_ids, **case.spans)
    rows = variants(found, seed) | {"FlashTrace, no hop": plain.scores}
    reached = {name: agreement(case, scores) for name, scores in rows.items()}
    for name in set(deleted) & set(rows):
        reached[name] |= _deletion(model, case, rows[name])
    default = next(iter(reached.values()))
    right = answered(model, case)
    for name, values in reached.items():
        paired = {
            f"{m} less default's": values[m] - default[m] for m in ("DSA", "MAS") if m in values and m in default
        }
        yield {"seed": seed, "variant": name} | right | values | paired


def _paragraph_tables(
    data: Path, name: str, form: str, seeds: int, curvatures: list[str], deleted: list[str], out: Path
) -> None:
    model, tokenizer = models.load(name)
    examples = json.loads(data.read_text(encoding="utf-8"))["examples"]
    _print_answers(model, tokenizer, examples)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for number, example in enumerate(tqdm(diagonal(examples, seed), desc=f"seed {seed}")):
            case = paragraph_case(tokenizer, example, form)
            path = out / f"{form}-{seed}-{number}.safetensors"
            found = paragraph_rows(model, case, curvatures, seed, path, deleted=deleted)
            rows += [{"support": example["sciq_id"]} | row for row in found]
            pd.DataFrame(rows).to_csv(out / f"{form}.csv", index=False)
    medians = _sizes(sorted(out.glob(f"{form}-*.safetensors")))
    typer.echo("\nmedians: " + ", ".join(f"{name} {size:.3g}" for name, size in medians.items()))
    _print_tables(pd.DataFrame(rows))


def _sizes(files: Sequence[Path]) -> dict[str, float]:
    """Median of each curvature and information over all tokens: raw terms are added as they are."""
    kept = [KnownTerms.load(path) for path in files]
    parts = [{**found.S, **found.I} for found in kept]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: float(torch.cat([part[name] for part in parts if name in part]).median()) for name in names}


def _print_answers(model: Any, tokenizer: Any, examples: Sequence[Mapping[str, Any]]) -> None:
    """How likely the answer is in each form, and how often it is the likeliest."""
    for form in [form for form in FORMS if form != "chat" or tokenizer.chat_template]:
        found = pd.DataFrame([answered(model, paragraph_case(tokenizer, e, form)) for e in tqdm(examples, desc=form)])
        typer.echo(f"{form}: p {found['p'].mean():.3f}, likeliest {found['answered'].mean():.2f}, n = {len(found)}")


def _print_tables(values: pd.DataFrame) -> None:
    """Supports recur, so their means are the more careful sample."""
    right = values[values["answered"] == 1]
    supports = values.groupby(["variant", "support"], sort=False).mean(numeric_only=True).reset_index()
    for title, part in {"all": values, "where the model answers": right, "means by support": supports}.items():
        if len(part):
            typer.echo(f"\n**{title}**\n\n{variant_table(part)}")


def main(
    samples: Annotated[int, typer.Option(min=1, help="per task and seed")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="number of seeds; each draws its own samples")] = 3,
    length: Annotated[int, typer.Option(help="tokens of a prompt at most")] = 96,
    task: Annotated[list[str] | None, typer.Option(help=f"of the reasoner; default: {'; '.join(_TASKS)}")] = None,
    data: Annotated[
        Path | None, typer.Option(help="mixed paragraphs as JSON, instead of the reasoner's tasks")
    ] = None,
    model: Annotated[str, typer.Option(help="the model that reads them, as the command line takes it")] = "",
    form: Annotated[str, typer.Option(help=f"how it is asked: {', '.join(FORMS)}")] = "completion",
    curvature: Annotated[list[str] | None, typer.Option(help="a curvature besides full; all by default")] = None,
    deleted: Annotated[list[str] | None, typer.Option(help="a variant whose RISE and MAS are measured too")] = None,
    out: Annotated[Path, typer.Option(help="terms are kept here, by model and data, and not computed again")] = Path(
        "heta_terms"
    ),
) -> None:
    """Measure HETA's variants and print Markdown tables."""
    if unknown := set(task or ()) - set(REASONER_TASKS):
        raise typer.BadParameter(f"no task {', '.join(unknown)}; tasks are {', '.join(REASONER_TASKS)}")
    if form not in FORMS:
        raise typer.BadParameter(f"--form is {form}; forms are {', '.join(FORMS)}")
    if data is None:
        _reasoner_tables(task or _TASKS, samples, seeds, length)
    elif not model:
        raise typer.BadParameter("--data needs --model, a model that can read the paragraphs")
    else:
        kept = out / f"{Path(model).stem} {data.stem}"
        chosen = ["full", *(curvature or _OF_THE_READER[1:])]
        _paragraph_tables(data, model, form, seeds, chosen, deleted or [], kept)


if __name__ == "__main__":
    typer.run(main)

"""Which method finds the evidence: all methods and simple baselines on the bundled reasoner, with intervals.

Run ``python benchmarks/method_comparison.py --samples 50`` from the repository's root; it writes ``docs/results.md``.
"""

from __future__ import annotations

import datetime
import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from flashtrace_plugin import HETA, IFR, FlashTrace, RecursiveAttribution, Span, reasoner
from flashtrace_plugin.core.flow.pattern import weighted_flow
from flashtrace_plugin.evaluation import tasks
from flashtrace_plugin.evaluation.metrics import Estimate, bootstrap, deletion_curve, log_likelihood, recovery
from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from flashtrace_plugin.models.read.source import HuggingFaceSource
from flashtrace_plugin.text import tokenize

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "variables, 2 hops": ("variable_tracking", {"hops": 2, "chains": 3}),
    "variables, 4 hops": ("variable_tracking", {"hops": 4, "chains": 3}),
    "variables, 2 hops, 2 questions": ("variable_tracking", {"hops": 2, "chains": 3, "questions": 2}),
    "variables, 4 hops, 2 questions": ("variable_tracking", {"hops": 4, "chains": 3, "questions": 2}),
    "needles": ("needle_retrieval", {"keys": 8, "values": 2}),
    "needles, 3 questions": ("needle_retrieval", {"keys": 8, "values": 2, "questions": 3}),
    "direct answer, 1 hop": ("variable_tracking", {"hops": 1, "chains": 3, "thinking": False}),
    "direct answer, 2 hops": ("variable_tracking", {"hops": 2, "chains": 3, "thinking": False}),
}
REFERENCE = "FlashTrace, token, 1 hop"
METRICS = ("recovery", "RISE", "MAS", "MAS, squared")
TRIES = 4
"""Samples drawn for each one wanted, before a task is reported with fewer."""


@dataclass(frozen=True)
class Case:
    """A prompt with what the reasoner generated for it, right to the last word."""

    input_ids: Tensor
    prompt_length: int
    target: Span
    reasoning: Span | None
    gold: tuple[int, ...]
    question: Span

    @property
    def generation(self) -> Span:
        return Span(self.prompt_length, len(self.input_ids))


Scorer = Callable[[Case], Tensor]
"""Scores [prompt_length] of one case."""


def methods(model: Any, seed: int) -> dict[str, Scorer]:
    """Every method by the name of its row; baselines first."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, Scorer] = {
        "random": lambda case: torch.rand(case.prompt_length, generator=generator),
        "attention, mean of layers and heads": lambda case: attention(model, case),
        "gradient x input": lambda case: gradient_input(model, case),
        "leave one out": lambda case: leave_one_out(model, case),
        "IFR": attributor(IFR(model)),
    }
    rows |= {f"recursive, {counted(k)}": attributor(RecursiveAttribution(model, hops=k)) for k in (1, 4)}
    for positions in ("token", "predicting"):
        for hops in range(5):
            name = f"FlashTrace, {positions}, {counted(hops)}"
            rows[name] = attributor(FlashTrace(model, hops=hops, positions=positions))
    rows["HETA, squared gradients"] = attributor(HETA(model, curvature="gradient_squared"))
    return rows | {"answer key": answer_key}


def counted(hops: int) -> str:
    return "1 hop" if hops == 1 else f"{hops} hops"


def attributor(method: Any) -> Scorer:
    def scores(case: Case) -> Tensor:
        return method.attribute_ids(
            case.input_ids, prompt_length=case.prompt_length, target=case.target, reasoning=case.reasoning
        ).scores

    return scores


def answer_key(case: Case) -> Tensor:
    """1 on the evidence and on the question, 0 elsewhere: what nobody can know, not a method."""
    return torch.zeros(case.prompt_length).index_fill(0, torch.tensor([*case.gold, *case.question]), 1.0)


def attention(model: Any, case: Case) -> Tensor:
    """Mean attention of the positions that predict the target."""
    source = HuggingFaceSource(model)
    rows = torch.arange(case.target.start - 1, case.target.stop - 1)
    layers = source.layers(source.check_ids(case.input_ids), rows)
    flows = [weighted_flow(layer.pattern, torch.ones(len(rows)), len(case.input_ids)).mean(0) for layer in layers]
    return torch.stack(flows).mean(0)[: case.prompt_length]


def gradient_input(model: Any, case: Case) -> Tensor:
    """| gradient · embedding | of the target's log-probability."""
    embedded = model.get_input_embeddings()(case.input_ids[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits[0, case.target.start - 1 : case.target.stop - 1]
    wanted = case.input_ids[case.target.slice, None]
    (gradient,) = torch.autograd.grad(logits.log_softmax(-1).gather(-1, wanted).sum(), embedded)
    return (gradient * embedded).sum(-1).abs().detach()[0, : case.prompt_length]


def leave_one_out(model: Any, case: Case) -> Tensor:
    """Fall of log P(generation) when one token is replaced: one forward pass per prompt token."""
    rows = case.input_ids.repeat(case.prompt_length + 1, 1)
    places = torch.arange(case.prompt_length)
    rows[places + 1, places] = replacement_token(model)
    found = log_likelihood(model, rows, generation=case.generation, batch_size=32)
    return (found[0] - found[1:]).clamp(min=0)


def cases(model: Any, tokenizer: Any, kind: str, length: int, seed: int) -> Iterator[Case | None]:
    """Samples without end; None where the reasoner's generation was wrong, since its evidence is then unknown."""
    task, parameters = KINDS[kind]
    rng = random.Random(f"comparison/{kind}/{seed}")
    while True:
        sample = tasks.TASKS[task](rng, length=length, **parameters)
        generation = reasoner.answer(model, tokenizer, sample)
        yield _case(tokenizer, sample, generation) if generation == sample.generation else None


def _case(tokenizer: Any, sample: tasks.Sample, generation: str) -> Case:
    text = tokenize(tokenizer, sample.prompt, " " + generation)
    target, reasoning = text.locate(None, None)
    question = Span(min(sample.question), text.prompt_length)
    return Case(text.input_ids, text.prompt_length, target, reasoning, sample.evidence, question)


def draw(found: Iterable[Case | None], wanted: int) -> tuple[list[Case], int]:
    """The first ``wanted`` right cases, and the number of samples drawn."""
    right: list[Case] = []
    drawn = 0
    for case in islice(found, TRIES * wanted):
        drawn += 1
        right += [case] if case else []
        if len(right) == wanted:
            break
    return right, drawn


def measure(model: Any, case: Case, scores: Tensor, watch: str) -> dict[str, float]:
    generation = case.generation if watch == "generation" else case.target
    curve = deletion_curve(
        model, case.input_ids, prompt_length=case.prompt_length, scores=scores, generation=generation
    )
    values = (recovery(scores, case.gold), curve.rise, curve.mas(), curve.mas(2))
    return dict(zip(METRICS, values, strict=True)) | {"falls": curve.falls}


def run(model: Any, tokenizer: Any, kinds: Iterable[str], options: Mapping[str, Any]) -> Iterator[pd.DataFrame]:
    """For each task one row for each sample and method."""
    for kind in kinds:
        rows: list[dict[str, Any]] = []
        for seed in range(options["seed"], options["seed"] + options["seeds"]):
            right, drawn = draw(cases(model, tokenizer, kind, options["length"], seed), options["samples"])
            scorers = methods(model, seed)
            for number, case in enumerate(tqdm(right, desc=f"{kind}, seed {seed}", unit="sample")):
                common = {"task": kind, "seed": seed, "sample": number, "drawn": drawn}
                for name, scorer in scorers.items():
                    rows.append(common | {"method": name} | measure(model, case, scorer(case), options["watch"]))
        yield pd.DataFrame(rows)


def cell(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def table(values: pd.DataFrame) -> pd.DataFrame:
    """Means with intervals: methods as rows in the order they ran, metrics as columns."""
    groups = values.groupby("method", sort=False)
    return pd.DataFrame({metric: groups[metric].agg(lambda v: cell(bootstrap(v))) for metric in METRICS})


def differences(values: pd.DataFrame) -> pd.DataFrame:
    """Each method minus the reference on the same samples, with intervals."""
    index = ["task", "seed", "sample"]
    wide = {metric: values.pivot(index=index, columns="method", values=metric) for metric in METRICS}
    names = [name for name in values["method"].unique() if name != REFERENCE]
    columns = {
        metric: [cell(bootstrap(frame[name] - frame[REFERENCE])) for name in names] for metric, frame in wide.items()
    }
    return pd.DataFrame(columns, index=pd.Index(names, name="method"))


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table with the index as its first column."""
    head = [frame.index.name or "method", *frame.columns]
    rows = [[str(name), *row] for name, row in zip(frame.index, frame.to_numpy().tolist(), strict=True)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def section(kind: str, values: pd.DataFrame) -> str:
    first = values.drop_duplicates(["seed", "sample"])
    drawn = int(values.groupby("seed")["drawn"].first().sum())
    rising = int((~first["falls"]).sum())
    lines = [f"## {kind[0].upper()}{kind[1:]}", "", f"n = {len(first)}, of {drawn} drawn."]
    if rising:
        lines[-1] += f" In {rising} of them deleting the whole prompt does not lower the likelihood."
    return "\n".join([*lines, "", markdown(table(values))])


def missing(values: pd.DataFrame, kinds: Iterable[str]) -> str:
    """A sentence about tasks in which the reasoner was never right, if there are any."""
    absent = [kind for kind in kinds if kind not in set(values["task"])]
    return f" Without a single right sample, and so not measured: {'; '.join(absent)}." if absent else ""


def document(values: pd.DataFrame, kinds: Iterable[str], options: Mapping[str, Any]) -> str:
    parts = [INTRODUCTION.format(**options, command=" ".join(["python", *sys.argv]), date=datetime.date.today())]
    parts += [
        "## All tasks",
        "",
        f"n = {values.groupby(['task', 'seed'])['sample'].nunique().sum()}.{missing(values, kinds)}",
        "",
        markdown(table(values)),
        "",
    ]
    parts += [f"## Difference to “{REFERENCE}”, sample by sample", "", markdown(differences(values)), ""]
    parts += [section(str(kind), group) + "\n" for kind, group in values.groupby("task", sort=False)]
    return "\n".join(parts)


INTRODUCTION = """\
# Which method finds the evidence

The bundled reasoner ({parameters} parameters, weights {weights}) on synthetic tasks whose evidence is known,
prompts of at most {length} tokens. Written by

    {command}

on {date}, torch {torch}. Numbers are means with 95 % bootstrap intervals over samples. Recovery: higher is better;
RISE and MAS: lower is better. “MAS, squared” is MAS with exponent 2, see [metrics.md](metrics.md). The likelihood
that deletion lowers is that of the {watch}.

Each method explains what the reasoner itself wrote. Samples where it was wrong anywhere, reasoning included, are left
out, because the evidence for a wrong answer is not known; each section says how many were drawn.

*random* is the floor. *answer key* scores 1 on the evidence and the question and 0 elsewhere; no method can know that,
and it need not win deletion, which also rewards marks and words that the model leans on without being evidence. *leave
one out* pays one forward pass per prompt token to see what deletion does, so it is strong where deletion is measured.
HETA runs with its cheapest curvature (preset GS); its other settings have their own comparison. This is one small
model trained on such tasks; what holds here need not hold elsewhere.
"""


def main(
    samples: Annotated[int, typer.Option(help="right samples for each task and seed")] = 25,
    seeds: Annotated[int, typer.Option(help="number of seeds; each draws its own samples")] = 2,
    seed: Annotated[int, typer.Option(help="first seed")] = 0,
    length: Annotated[int, typer.Option(help="longest prompt, in tokens")] = 128,
    task: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(KINDS)}; repeatable")] = None,
    watch: Annotated[str, typer.Option(help="whose likelihood deletion lowers: generation or answer")] = "generation",
    weights: Annotated[Path | None, typer.Option(help="folder of the model instead of the bundled one")] = None,
    out: Annotated[Path, typer.Option(help="Markdown file to write")] = Path("docs/results.md"),
    csv: Annotated[Path | None, typer.Option(help="file for the numbers of every sample")] = None,
) -> None:
    """Compare all methods on the reasoner's tasks, print a Markdown table and write it with its circumstances."""
    unknown = set(task or ()) - set(KINDS)
    if unknown or watch not in ("generation", "answer"):
        raise typer.BadParameter(f"tasks are {', '.join(KINDS)}; --watch is generation or answer")
    model, tokenizer = reasoner.load(weights)
    options = {"samples": samples, "seeds": seeds, "seed": seed, "length": length, "watch": watch}
    options |= {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "weights": fingerprint(weights or reasoner.path()),
        "torch": torch.__version__,
    }
    kinds, frames = task or list(KINDS), []
    for done, frame in enumerate(run(model, tokenizer, kinds, options), start=1):
        frames.append(frame)
        values = pd.concat(frames)
        # Written after every task, so that an interrupted run keeps the tasks that are done.
        write(values, document(values, kinds[:done], options) if len(values) else "No sample was right.", out, csv)
    typer.echo(out.read_text(encoding="utf-8"))


def fingerprint(folder: Path) -> str:
    """The first digits of the weights' SHA-256, so that a table can be told from one of other weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def write(values: pd.DataFrame, text: str, out: Path, csv: Path | None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    if csv:
        values.to_csv(csv, index=False)


if __name__ == "__main__":
    typer.run(main)

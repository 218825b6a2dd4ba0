"""FlashTrace beside Captum's own methods, in Captum, on the same token ids: cost and quality in one table.

Run ``python -m benchmarks.captum_comparison`` from the repository's root; it writes ``docs/captum-comparison.md``.

Captum's methods get their best setting: ``forward_in_tokens=False``, one forward pass per perturbation. The default,
token by token with a cache, gives wrong numbers on transformers >= 5.3, so it is not run. Every result of theirs is
read twice at no further cost, for the answer alone and for the whole response.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import captum
import pandas as pd
import torch
import transformers
import typer
from captum.attr import (
    FeatureAblation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    ShapleyValueSampling,
)
from torch import Tensor
from tqdm import tqdm

from flashtrace_captum import HETA, IFR, FlashTrace, LLMTraceAttribution, TokenIdsInput
from flashtrace_plugin import reasoner
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.drawing import REASONER_TASKS, reasoner_cases
from flashtrace_plugin.evaluation.metrics import deletion_curve, recovery
from flashtrace_plugin.evaluation.tables import markdown, means

COSTS = ("forwards", "of these with a gradient", "CPU seconds")
QUALITY = ("recovery", "RISE", "MAS")
DEFAULT_TASKS = ["variables, 2 hops", "variables, 4 hops", "needles"]


@dataclass
class Spent:
    """Sequences that went through the model, how many of them in a differentiable pass, and the processor time."""

    forwards: int = 0
    graded: int = 0
    seconds: float = 0.0


@contextmanager
def counted(model: Any) -> Iterator[Spent]:
    """Counts at the decoder, because Captum calls ``model.forward`` past the hooks of the model itself."""
    spent = Spent()

    def count(module: Any, args: Any, output: Any) -> None:
        hidden = output[0]
        spent.forwards += hidden.shape[0]
        spent.graded += hidden.shape[0] * hidden.requires_grad

    handle = model.get_decoder().register_forward_hook(count)
    began = time.process_time()
    try:
        yield spent
    finally:
        spent.seconds = time.process_time() - began
        handle.remove()


Explained = dict[str, Tensor]
"""Scores [prompt_length] by what they explain."""
Contestant = Callable[[Case], Explained]


def contestants(model: Any, tokenizer: Any, samples: int, steps: int) -> dict[str, Contestant]:
    """Every method by the name of its rows."""
    embeddings = model.get_input_embeddings()
    sequence = {"forward_in_tokens": False}
    predicting = FlashTrace(model, positions="predicting")
    ablation = LLMAttribution(FeatureAblation(model), tokenizer)
    shapley = LLMAttribution(ShapleyValueSampling(model), tokenizer)
    gradients = LLMGradientAttribution(LayerIntegratedGradients(model, embeddings), tokenizer)
    return {
        "FeatureAblation": theirs(ablation, tokenizer, sequence),
        f"ShapleyValueSampling, {samples} samples": theirs(shapley, tokenizer, sequence | {"n_samples": samples}),
        f"LayerIntegratedGradients, {steps} steps": theirs(gradients, tokenizer, {"n_steps": steps}),
        "IFR": ours(IFR(model), tokenizer),
        "HETA": ours(HETA(model, progress=False, max_cost=None), tokenizer),
        "FlashTrace": ours(FlashTrace(model), tokenizer, hops=1),
        "FlashTrace, predicting positions, 4 hops": ours(predicting, tokenizer, hops=4),
        "FlashTrace, predicting positions": ours(predicting, tokenizer, whole=True),
    }


def parts(case: Case, tokenizer: Any) -> tuple[TokenIdsInput, Tensor]:
    """The prompt as Captum's input, with the pad token for what is absent, and the ids of the response."""
    ids = case.input_ids
    return TokenIdsInput(ids[: case.prompt_length], tokenizer, baselines=tokenizer.pad_token_id), ids[
        case.prompt_length :
    ]


def theirs(wrapper: Any, tokenizer: Any, options: dict[str, Any]) -> Contestant:
    def explain(case: Case) -> Explained:
        inp, response = parts(case, tokenizer)
        rows = wrapper.attribute(inp, response, **options).token_attr.detach().cpu()
        first = case.target.start - case.prompt_length
        answer = rows[first : first + len(case.target)].sum(0)
        return {"answer": answer, "whole response": rows.sum(0)}

    return explain


def ours(method: Any, tokenizer: Any, *, whole: bool = False, **options: Any) -> Contestant:
    """The answer, through the reasoning; or the whole response as one target, which leaves nothing to follow."""

    def explain(case: Case) -> Explained:
        inp, response = parts(case, tokenizer)
        where = {"answer": case.generation} if whole else {"answer": case.target, "reasoning": case.reasoning}
        found = LLMTraceAttribution(method, tokenizer).attribute(inp, response, **where, **options)
        return {"whole response" if whole else "answer": found.seq_attr}

    return explain


def check_likelihood(model: Any, tokenizer: Any, case: Case) -> None:
    """Both sides must see the same tokens: their log P of the unperturbed response agrees."""
    inp, response = parts(case, tokenizer)
    wrapper = LLMAttribution(FeatureAblation(model), tokenizer)
    captums = wrapper._forward_func(inp.to_tensor().float(), inp, response, False, None, False)[0, 0]
    mine = LLMTraceAttribution(FlashTrace(model), tokenizer).presence_function(inp, response)(inp.to_tensor().float())
    torch.testing.assert_close(mine[0], captums, rtol=1e-4, atol=1e-4)


def quality(model: Any, case: Case, scores: Tensor) -> dict[str, float]:
    """Recovery and RISE from the ranking; MAS reads scores as mass, so negative ones count as none there."""
    curve = deletion_curve(model, case.input_ids, prompt_length=case.prompt_length, scores=scores)
    mas = replace(curve, scores=curve.scores.clamp(min=0)).mas()
    return dict(zip(QUALITY, (recovery(scores, case.gold), curve.rise, mas), strict=True))


def run(model: Any, tokenizer: Any, kinds: list[str], options: dict[str, Any]) -> pd.DataFrame:
    """One row for each task, sample, method and part of the response."""
    rows: list[dict[str, Any]] = []
    methods = contestants(model, tokenizer, options["shapley_samples"], options["steps"])
    for kind in kinds:
        given = {"wanted": options["samples"], "seed": options["seed"], "length": options["length"]}
        right, drawn = reasoner_cases(model, tokenizer, kind, **given)
        for number, case in enumerate(tqdm(right, desc=kind, unit="sample")):
            check_likelihood(model, tokenizer, case)
            if not rows:  # the first run of a model checks its logits once, and libraries set themselves up
                for explain in methods.values():
                    explain(case)
            common = {"task": kind, "sample": number, "drawn": drawn}
            common |= {"prompt": case.prompt_length, "response": len(case.generation)}
            for name, explain in methods.items():
                with counted(model) as spent:
                    explained = explain(case)
                costs = dict(zip(COSTS, (spent.forwards, spent.graded, spent.seconds), strict=True))
                for part, scores in explained.items():
                    rows.append(common | {"method": f"{name}: {part}"} | costs | quality(model, case, scores))
    return pd.DataFrame(rows)


def table(values: pd.DataFrame) -> pd.DataFrame:
    """Mean costs, and means with intervals of the quality."""
    groups = values.groupby("method", sort=False)
    costs = {
        "forwards": groups["forwards"].mean().map("{:.0f}".format),
        "of these with a gradient": groups["of these with a gradient"].mean().map("{:.0f}".format),
        "CPU seconds": groups["CPU seconds"].mean().map("{:.2f}".format),
    }
    return pd.concat([pd.DataFrame(costs), means(values, QUALITY)], axis=1).rename_axis("method")


def document(values: pd.DataFrame, options: dict[str, Any]) -> str:
    first = values.drop_duplicates(["task", "sample"])
    text = INTRODUCTION.format(
        **options,
        command=" ".join(["python", "-m", "benchmarks.captum_comparison", *sys.argv[1:]]),
        date=datetime.date.today(),
        captum=captum.__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        prompt=f"{first['prompt'].mean():.0f}",
        response=f"{first['response'].mean():.0f}",
    )
    sections = [f"## All tasks\n\nn = {len(first)}.\n\n{markdown(table(values))}\n"]
    for kind, group in values.groupby("task", sort=False):
        n, drawn = group["sample"].nunique(), group["drawn"].iloc[0]
        sections.append(f"## {str(kind).capitalize()}\n\nn = {n}, of {drawn} drawn.\n\n{markdown(table(group))}\n")
    return "\n".join([text, *sections])


INTRODUCTION = """\
# FlashTrace beside Captum's methods

The bundled reasoner ({parameters} parameters), prompts of {prompt} and responses of {response} tokens on average, one
run for all methods. Written by

    {command}

on {date}: captum {captum}, transformers {transformers}, torch {torch}, {threads} thread(s), CPU.

*Forwards* are sequences that went through the model; a differentiable one also pays a backward pass. The two of
FlashTrace and IFR are one for the attribution and one for `output_probs`; HETA's, and its products with the Hessian,
mostly run a part of the sequence. Quality: means with 95 % bootstrap intervals over samples; recovery of the
evidence, higher is better; RISE and MAS by deletion, watching the whole response, lower is better
([definitions](metrics.md)).

Captum's methods run with `forward_in_tokens=False` (FeatureAblation, ShapleyValueSampling), their fastest setting,
and the pad token as baseline. They score every response token, so each appears twice: *answer* sums the rows of the
answer, with the reasoning before it held fixed; *whole response* sums all rows, which is what RISE and MAS measure.
The other methods explain the answer, FlashTrace through the reasoning, and in its last row the whole response as one
target. A perturbation method answers what happens if a token is removed, FlashTrace where the answer's information
came from: compare the costs together with the quality.
Samples where the reasoner was wrong anywhere are left out. One small model; what holds here need not hold elsewhere.
"""


def main(
    samples: Annotated[int, typer.Option(help="right samples for each task")] = 20,
    seed: Annotated[int, typer.Option(help="of the samples")] = 0,
    length: Annotated[int, typer.Option(help="longest prompt, in tokens")] = 128,
    shapley_samples: Annotated[int, typer.Option(help="permutations of ShapleyValueSampling")] = 5,
    steps: Annotated[int, typer.Option(help="steps of LayerIntegratedGradients")] = 20,
    task: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(REASONER_TASKS)}; repeatable")] = None,
    weights: Annotated[Path | None, typer.Option(help="folder of the model instead of the bundled one")] = None,
    out: Annotated[Path, typer.Option(help="Markdown file to write")] = Path("docs/captum-comparison.md"),
) -> None:
    """Compare Captum's methods with those of this package on the reasoner and write one Markdown table per task."""
    kinds = task or DEFAULT_TASKS
    if set(kinds) - set(REASONER_TASKS):
        raise typer.BadParameter(f"tasks are {', '.join(REASONER_TASKS)}")
    model, tokenizer = reasoner.load(weights)
    options = {
        "samples": samples,
        "seed": seed,
        "length": length,
        "shapley_samples": shapley_samples,
        "steps": steps,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }
    values = run(model, tokenizer, kinds, options)
    if values.empty:
        raise typer.BadParameter(
            "the reasoner answered no sample right; are these trained weights?", param_hint="weights"
        )
    text = document(values, options)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)

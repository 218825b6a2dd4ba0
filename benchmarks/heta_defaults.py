"""Evidence for HETA's defaults: gates, curvature, masks, rescaling and weights on the bundled reasoner.

    python -m benchmarks.heta_defaults --samples 5                    synthetic tasks with known evidence
    python -m benchmarks.heta_defaults --data FILE --model NAME       DSA on a file of mixed paragraphs

The terms of a sample are computed once and combined in every way; only recursion needs further runs. Prints Markdown.
The file of mixed paragraphs needs a model that can read them; the bundled one cannot.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from flashtrace_plugin import HETA, Span, reasoner, tasks
from flashtrace_plugin.metrics import bootstrap, deletion_curve, dsa, recovery
from flashtrace_plugin.text import tokenize

KINDS: dict[str, dict[str, Any]] = {
    "direct answer, 1 hop": {"hops": 1, "chains": 3, "thinking": False},
    "thinking, 2 hops": {"hops": 2, "chains": 3},
}
GATES = ("flow", "per_head", "uniform", None)
CURVATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "low rank": {"curvature": "low_rank", "rank": 64},
    "last 2 layers": {"last_layers": 2},
    "gradient squared": {"curvature": "gradient_squared"},
}
MASKS = ("zero", "mean", "pad")


@dataclass(frozen=True)
class Case:
    """A prompt with what the reasoner wrote for it, right to the last word, and what it should be explained by."""

    input_ids: Tensor
    prompt_length: int
    target: Span
    reasoning: Span | None
    gold: tuple[int, ...]
    distractors: tuple[int, ...]

    @property
    def spans(self) -> dict[str, Any]:
        return {"prompt_length": self.prompt_length, "target": self.target, "reasoning": self.reasoning}


def cases(model: Any, tokenizer: Any, kind: str, length: int, seed: int) -> Iterator[Case]:
    """Samples that the reasoner gets right, without end."""
    rng = random.Random(f"heta/{kind}/{seed}")
    while True:
        sample = tasks.variable_tracking(rng, length=length, **KINDS[kind])
        generation = reasoner.answer(model, tokenizer, sample)
        if generation != sample.generation:
            continue
        text = tokenize(tokenizer, sample.prompt, " " + generation)
        yield Case(text.input_ids, text.prompt_length, *text.locate(None, None), sample.evidence, sample.distractors)


@dataclass(frozen=True)
class Found:
    """All terms of one case: gates M, curvatures S and informations I by name, each over the prompt."""

    M: Mapping[str | None, Tensor]
    S: Mapping[str, Tensor]
    I: Mapping[str, Tensor]  # noqa: E741  the paper's letter

    def scores(
        self,
        gate: str | None = "flow",
        curvature: str = "full",
        mask: str = "zero",
        *,
        beta: float = 0.5,
        gamma: float | None = None,
        rescale: bool = False,
    ) -> Tensor:
        S, info = self.S[curvature], self.I[mask]
        if rescale:
            S, info = S / S.max(), info / info.max()
        return self.M[gate] * (beta * S + (1 - beta if gamma is None else gamma) * info)


def terms(model: Any, case: Case) -> Found:
    def run(name: str, **options: Any) -> Tensor:
        heta = HETA(model, **({"gate": None, "curvature": None, "mask": None, "progress": False} | options))
        return heta.attribute_ids(case.input_ids, **case.spans).components[name][: case.prompt_length]

    return Found(
        {kind: run("gate", gate=kind) for kind in GATES},
        {name: run("curvature", **({"curvature": "full"} | options)) for name, options in CURVATURES.items()},
        {kind: run("information", mask=kind) for kind in MASKS},
    )


def variants(found: Found, seed: int) -> dict[str, Tensor]:
    """Scores by the name of their row."""
    rows = {"default: gate flow, full, zero mask, raw, beta 0.5": found.scores()}
    rows |= {f"gate {gate or 'none'}": found.scores(gate) for gate in GATES[1:]}
    rows |= {f"curvature {name}": found.scores(curvature=name) for name in list(CURVATURES)[1:]}
    rows |= {f"mask {mask}": found.scores(mask=mask) for mask in MASKS[1:]}
    rows |= {f"beta {beta}": found.scores(beta=beta) for beta in (0.0, 0.2, 0.8, 1.0)}
    rows |= {f"rescaled, beta {beta}": found.scores(beta=beta, rescale=True) for beta in (0.2, 0.5, 0.8)}
    rows["rescaled, gate per_head"] = found.scores("per_head", rescale=True)
    rows["rescaled, low rank"] = found.scores(curvature="low rank", rescale=True)
    rows |= {"transition only": found.M["flow"], "Hessian only": found.S["full"], "KL only": found.I["zero"]}
    rows["random"] = torch.rand(len(found.S["full"]), generator=torch.Generator().manual_seed(seed))
    return rows


def recursions(model: Any, case: Case) -> dict[str, Tensor]:
    """HETA through the reasoning; with low rank, so that the hops stay comparable and cheap."""
    if case.reasoning is None:
        return {}
    return {
        f"low rank, hops {hops}, gate {gate}": HETA(model, hops=hops, gate=gate, curvature="low_rank", progress=False)
        .attribute_ids(case.input_ids, **case.spans)
        .scores
        for hops in (1, 2)
        for gate in ("flow", "per_head")
    }


def measure(model: Any, case: Case, scores: Tensor) -> dict[str, float]:
    curve = deletion_curve(
        model, case.input_ids, prompt_length=case.prompt_length, scores=scores, generation=case.target
    )
    return {
        "recovery": recovery(scores, case.gold),
        "RISE": curve.rise,
        "MAS": curve.mas(),
        "DSA": dsa(scores, case.gold, case.distractors),
    }


def table(values: pd.DataFrame) -> str:
    """Means with 95 % bootstrap intervals over samples, rows in the order they ran."""
    metrics = ["recovery", "RISE", "MAS", "DSA"]
    lines = ["| variant | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name, group in values.groupby("variant", sort=False):
        found = [bootstrap(group[metric]) for metric in metrics]
        lines.append(f"| {name} | " + " | ".join(f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in found) + " |")
    return "\n".join(lines)


def synthetic(kinds: list[str], samples: int, seeds: int, length: int) -> None:
    model, tokenizer = reasoner.load()
    for kind in kinds:
        rows: list[dict[str, Any]] = []
        for seed in range(seeds):
            found = cases(model, tokenizer, kind, length, seed)
            for number in tqdm(range(samples), desc=f"{kind}, seed {seed}"):
                case = next(found)
                for name, scores in (variants(terms(model, case), seed) | recursions(model, case)).items():
                    rows.append({"seed": seed, "sample": number, "variant": name} | measure(model, case, scores))
        print(f"\n**{kind}**, {seeds} seeds x {samples} samples\n\n{table(pd.DataFrame(rows))}", flush=True)


# Mixed paragraphs


def mixed_paragraph(tokenizer: Any, example: Mapping[str, Any], options: Mapping[str, Any], model: Any) -> float:
    """DSA of one example: the first answer token explained by evidence words against the distractor segment."""
    narrative, support = example["narrative_segment"], example["sciq_support_segment"]
    prompt = f"{narrative} {support} Question: {example['question']} Answer:"
    words = support.split()
    starts = [len(narrative) + 1 + len(" ".join(words[:i])) + (i > 0) for i in range(len(words))]
    chosen = example["important_word_indices_in_sciq_support"]
    evidence = [(starts[i], starts[i] + len(words[i])) for i in chosen]
    text = tokenize(tokenizer, prompt, " " + example["answer"])
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]

    def over(ranges: list[tuple[int, int]]) -> list[int]:
        return [i for i, (a, b) in enumerate(offsets) if any(a < stop and start < b for start, stop in ranges)]

    first = Span(text.prompt_length, text.prompt_length + 1)
    found = HETA(model, tokenizer, **options).attribute_ids(
        text.input_ids, prompt_length=text.prompt_length, target=first
    )
    segment = over([(len(narrative) + 1, len(narrative) + 1 + len(support))])
    return dsa(found, over(evidence), over([(0, len(narrative))]), evidence_segment=segment)


def paragraphs(data: Path, name: str, limit: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    examples = json.loads(data.read_text(encoding="utf-8"))["examples"][:limit]
    print("| variant | DSA |\n|---|---|")
    for gate in ("flow", "per_head"):
        for rescale in (None, "max"):
            options = {"gate": gate, "rescale": rescale, "curvature": "low_rank", "progress": False}
            values = [mixed_paragraph(tokenizer, e, options, model) for e in tqdm(examples)]
            print(f"| gate {gate}, rescale {rescale} | {bootstrap(values)} |", flush=True)


def main(
    samples: Annotated[int, typer.Option(help="per task and seed")] = 5,
    seeds: int = 3,
    length: Annotated[int, typer.Option(help="tokens of a prompt at most")] = 96,
    kind: Annotated[list[str] | None, typer.Option(help="a synthetic task; all by default")] = None,
    data: Annotated[Path | None, typer.Option(help="mixed paragraphs as JSON, instead of the synthetic tasks")] = None,
    model: Annotated[str, typer.Option(help="name or folder of the model that reads them")] = "",
    limit: Annotated[int, typer.Option(help="paragraphs to use")] = 100,
) -> None:
    if data is None:
        synthetic(kind or list(KINDS), samples, seeds, length)
    elif not model:
        raise typer.BadParameter("--data needs --model, a model that can read the paragraphs")
    else:
        paragraphs(data, model, limit)


if __name__ == "__main__":
    typer.run(main)

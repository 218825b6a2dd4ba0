"""Evidence for HETA's defaults: gates, curvature, masks, rescaling and weights.

    python -m benchmarks.heta_defaults --samples 5                    the bundled reasoner, tasks with known evidence
    python -m benchmarks.heta_defaults --data FILE --model NAME       a model that reads English, mixed paragraphs

The terms of a sample are computed once and combined in every way; only recursion needs further runs. Prints Markdown.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from benchmarks.heta_variants import CURVATURES, NOTHING, Case, Found, table, terms, variants
from flashtrace_plugin import HETA, FlashTrace, Span, reasoner
from flashtrace_plugin.evaluation import tasks
from flashtrace_plugin.evaluation.metrics import deletion_curve, dsa, recovery
from flashtrace_plugin.loading import load
from flashtrace_plugin.text import render, tokenize

KINDS: dict[str, dict[str, Any]] = {
    "direct answer, 1 hop": {"hops": 1, "chains": 3, "thinking": False},
    "thinking, 2 hops": {"hops": 2, "chains": 3},
}
OF_THE_REASONER = [name for name in CURVATURES if name != "last 6 layers"]
OF_THE_READER = [name for name in CURVATURES if name != "last 2 layers"]


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
    found = {"recovery": recovery(scores, case.gold), "DSA": dsa(scores, case.gold, case.distractors)}
    return found | deletion(model, case, scores)


def deletion(model: Any, case: Case, scores: Tensor) -> dict[str, float]:
    """What deleting the prompt's tokens in the order of their scores does to the answer."""
    curve = deletion_curve(
        model, case.input_ids, prompt_length=case.prompt_length, scores=scores, generation=case.target
    )
    return {"RISE": curve.rise, "MAS": curve.mas()}


def synthetic(kinds: list[str], samples: int, seeds: int, length: int) -> None:
    model, tokenizer = reasoner.load()
    for kind in kinds:
        rows: list[dict[str, Any]] = []
        for seed in range(seeds):
            stream = cases(model, tokenizer, kind, length, seed)
            for number in tqdm(range(samples), desc=f"{kind}, seed {seed}"):
                case = next(stream)
                found = terms(model, case, OF_THE_REASONER, ("zero", "mean", "pad"))
                for name, scores in (variants(found, seed) | recursions(model, case)).items():
                    rows.append({"seed": seed, "sample": number, "variant": name} | measure(model, case, scores))
        print(f"\n**{kind}**, {seeds} seeds x {samples} samples\n\n{table(pd.DataFrame(rows))}", flush=True)


# Mixed paragraphs

FORMS = {
    "question": "{paragraph} Question: {question} Answer:",
    "completion": "{paragraph} {question} The answer is the",
    "chat": "{paragraph} {question}",
}


def diagonal(examples: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Every narrative once and every support once, in pairs that no other seed below their number has."""
    by_pair = {(e["narrative_id"], e["sciq_id"]): e for e in examples}
    narratives, supports = (sorted(set(ids)) for ids in zip(*by_pair, strict=True))
    random.Random("paragraphs").shuffle(supports)
    return [by_pair[pair] for pair in zip(narratives, supports[seed:] + supports[:seed], strict=True)]


def prompt_of(tokenizer: Any, example: Mapping[str, Any], form: str) -> str:
    """Begins with the model's begin token: as the attention sink it must be in neither segment."""
    paragraph = f"{example['narrative_segment']} {example['sciq_support_segment']}"
    text = FORMS[form].format(paragraph=paragraph, question=example["question"])
    if form == "chat":
        text = render(tokenizer, [{"role": "user", "content": text}])[0] + "The answer is the"
    begin = tokenizer.bos_token or ""
    added = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return ("" if added else begin) + text.removeprefix(begin)


def paragraph_case(tokenizer: Any, example: Mapping[str, Any], form: str) -> Case:
    """The answer's first token explained by the evidence words of the support against the narrative."""
    narrative, support = example["narrative_segment"], example["sciq_support_segment"]
    prompt = prompt_of(tokenizer, example, form)
    first, second = prompt.index(narrative), prompt.index(support)
    words = [(second + m.start(), second + m.end()) for m in re.finditer(r"\S+", support)]
    evidence = [words[i] for i in example["important_word_indices_in_sciq_support"]]
    text = tokenize(tokenizer, prompt, " " + example["answer"])
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]

    def over(*ranges: tuple[int, int]) -> list[int]:
        return [i for i, (a, b) in enumerate(offsets) if any(a < stop and start < b for start, stop in ranges)]

    n = text.prompt_length
    segments = over((first, first + len(narrative))), over((second, second + len(support)))
    return Case(text.input_ids[: n + 1], n, Span(n, n + 1), None, over(*evidence), *segments)


def agreement(case: Case, scores: Tensor) -> dict[str, float]:
    """Metrics over the paragraph alone, about three tenths of which are evidence, and its share of all mass."""
    inside = sorted({*case.distractors, *case.segment})
    gold = [inside.index(i) for i in case.gold]
    return {
        "recovery": recovery(scores[inside], gold, fraction=0.3),
        "DSA": dsa(scores, case.gold, case.distractors, evidence_segment=case.segment),
        "inside": float(scores[inside].sum() / scores.sum()),
    }


@torch.no_grad()
def answered(model: Any, case: Case) -> dict[str, float]:
    logits = model(case.input_ids[None, :-1].to(model.device)).logits[0, -1].float()
    answer = int(case.input_ids[-1])
    return {"p": float(logits.softmax(-1)[answer]), "answered": float(logits.argmax() == answer)}


def paragraph_rows(
    model: Any, case: Case, curvatures: Sequence[str], seed: int, path: Path, *, deleted: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """One row per variant. The terms are kept in a file, so that what is there is not computed again.

    deleted: variants whose deletion curve is measured, which takes a few seconds each
    """
    known = Found.load(path) if path.exists() else NOTHING
    found = terms(model, case, curvatures, ("zero", "mean"), seed=seed, known=known)
    found.save(path)
    rows = variants(found, seed) | {
        "FlashTrace, no hop": FlashTrace(model, hops=0).attribute_ids(case.input_ids, **case.spans).scores
    }
    reached = {name: agreement(case, scores) for name, scores in rows.items()}
    for name in set(deleted) & set(rows):
        reached[name] |= deletion(model, case, rows[name])
    default = next(iter(reached.values()))
    right = answered(model, case)
    for name, values in reached.items():
        paired = {
            f"{m} less default's": values[m] - default[m] for m in ("DSA", "MAS") if m in values and m in default
        }
        yield {"seed": seed, "variant": name} | right | values | paired


def sizes(files: Sequence[Path]) -> dict[str, float]:
    """Median of each curvature and information over all tokens: raw terms are added as they are."""
    kept = [Found.load(path) for path in files]
    parts = [{**found.S, **found.I} for found in kept]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: float(torch.cat([part[name] for part in parts if name in part]).median()) for name in names}


def paragraphs(
    data: Path, name: str, form: str, seeds: int, curvatures: list[str], deleted: list[str], out: Path
) -> None:
    model, tokenizer = load(name)
    examples = json.loads(data.read_text(encoding="utf-8"))["examples"]
    print_answers(model, tokenizer, examples)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for number, example in enumerate(tqdm(diagonal(examples, seed), desc=f"seed {seed}")):
            case = paragraph_case(tokenizer, example, form)
            path = out / f"{form}-{seed}-{number}.safetensors"
            found = paragraph_rows(model, case, curvatures, seed, path, deleted=deleted)
            rows += [{"support": example["sciq_id"]} | row for row in found]
            pd.DataFrame(rows).to_csv(out / f"{form}.csv", index=False)
    medians = sizes(sorted(out.glob(f"{form}-*.safetensors")))
    print("\nmedians: " + ", ".join(f"{name} {size:.3g}" for name, size in medians.items()))
    print_tables(pd.DataFrame(rows))


def print_answers(model: Any, tokenizer: Any, examples: list[dict[str, Any]]) -> None:
    """How likely the answer is in each form, and how often it is the likeliest."""
    for form in [form for form in FORMS if form != "chat" or tokenizer.chat_template]:
        found = pd.DataFrame([answered(model, paragraph_case(tokenizer, e, form)) for e in tqdm(examples, desc=form)])
        print(f"{form}: p {found['p'].mean():.3f}, likeliest {found['answered'].mean():.2f}, n = {len(found)}")


def print_tables(values: pd.DataFrame) -> None:
    """Supports recur, so their means are the more careful sample."""
    right = values[values["answered"] == 1]
    supports = values.groupby(["variant", "support"], sort=False).mean(numeric_only=True).reset_index()
    for title, part in {"all": values, "where the model answers": right, "means by support": supports}.items():
        print(f"\n**{title}**\n\n{table(part)}")


def main(
    samples: Annotated[int, typer.Option(help="per task and seed")] = 5,
    seeds: int = 3,
    length: Annotated[int, typer.Option(help="tokens of a prompt at most")] = 96,
    kind: Annotated[list[str] | None, typer.Option(help="a synthetic task; all by default")] = None,
    data: Annotated[Path | None, typer.Option(help="mixed paragraphs as JSON, instead of the synthetic tasks")] = None,
    model: Annotated[str, typer.Option(help="the model that reads them, as the command line takes it")] = "",
    form: Annotated[str, typer.Option(help=f"how it is asked: {', '.join(FORMS)}")] = "completion",
    curvature: Annotated[list[str] | None, typer.Option(help="a curvature besides full; all by default")] = None,
    deleted: Annotated[list[str] | None, typer.Option(help="a variant whose RISE and MAS are measured too")] = None,
    out: Annotated[Path, typer.Option(help="terms are kept here, by model and data, and not computed again")] = Path(
        "heta_terms"
    ),
) -> None:
    if data is None:
        synthetic(kind or list(KINDS), samples, seeds, length)
    elif not model:
        raise typer.BadParameter("--data needs --model, a model that can read the paragraphs")
    else:
        kept = out / f"{Path(model).stem} {data.stem}"
        paragraphs(data, model, form, seeds, ["full", *(curvature or OF_THE_READER[1:])], deleted or [], kept)


if __name__ == "__main__":
    typer.run(main)

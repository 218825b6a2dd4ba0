"""Exact match of the bundled reasoner on held-out samples: ``python -m flashtrace_plugin.reasoner.evaluate``.

Prints a Markdown table with one row per kind of task and one column per prompt length. Decoding is greedy. Training
draws from other seeds, so that no sample was seen.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from flashtrace_plugin import reasoner
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.tasks import TASKS, Sample

LENGTHS = (64, 128, 256, 512)
BATCH = 50
KINDS: tuple[tuple[str, dict[str, int | bool]], ...] = (
    *(("variable_tracking", {"hops": hops, "chains": 3}) for hops in range(1, 7)),
    ("variable_tracking", {"hops": 4, "chains": 10}),
    ("variable_tracking", {"hops": 3, "chains": 4, "questions": 2}),
    ("variable_tracking", {"hops": 2, "chains": 4, "values": 3}),
    ("needle_retrieval", {"keys": 8, "values": 1}),
    ("needle_retrieval", {"keys": 40, "values": 1}),
    ("needle_retrieval", {"keys": 8, "values": 4}),
    ("needle_retrieval", {"keys": 8, "values": 2, "questions": 3}),
    ("variable_tracking", {"hops": 1, "chains": 3, "thinking": False}),
    ("variable_tracking", {"hops": 2, "chains": 3, "thinking": False}),
    ("needle_retrieval", {"keys": 8, "values": 2, "thinking": False}),
)


def held_out(task: str, length: int, count: int, parameters: dict[str, int | bool]) -> list[Sample]:
    """``count`` samples of at most ``length`` tokens; none if the parameters do not fit in ``length``."""
    rng = random.Random(f"held-out/{task}/{length}/{parameters}")
    try:
        return [TASKS[task](rng, length=length, **parameters) for _ in range(count)]
    except InputError:
        return []


def generate(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> Iterator[str]:
    """The greedy generations of samples, in batches with padding on the left."""
    for first in range(0, len(samples), BATCH):
        prompts = [sample.prompt for sample in samples[first : first + BATCH]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False)
        yield from tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> tuple[float, float]:
    """Shares, 0 to 1, of samples with the right answer, and with the right reasoning and answer."""
    texts = list(generate(model, tokenizer, samples))
    answers = sum(reasoner.final_answer(text) == sample.answer for text, sample in zip(texts, samples))
    whole = sum(text == sample.generation for text, sample in zip(texts, samples))
    return answers / len(samples), whole / len(samples)


def _cell(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> str:
    if not samples:
        return "–"
    answers, whole = accuracy(model, tokenizer, samples)
    return f"{100 * answers:.1f} ({100 * whole:.1f})"


def _name(task: str, parameters: dict[str, int | bool]) -> str:
    counts = [f"{name} {value}" for name, value in parameters.items() if name != "thinking"]
    mode = [] if parameters.get("thinking", True) else ["direct"]
    return f"{task.replace('_', ' ')}: {', '.join(counts + mode)}"


def main(
    samples: Annotated[int, typer.Option(help="samples per cell")] = 100,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    weights: Annotated[Path | None, typer.Option(help="folder of the model instead of the bundled one")] = None,
) -> None:
    """Print the table: right answers in %, and in brackets the samples whose whole reasoning is right too."""
    torch.set_num_threads(threads)
    model, tokenizer = reasoner.load(weights)
    typer.echo("| task | " + " | ".join(f"{n} tokens" for n in LENGTHS) + " |")
    typer.echo("|---|" + "---|" * len(LENGTHS))
    for task, parameters in tqdm(KINDS, unit="kind"):
        cells = [_cell(model, tokenizer, held_out(task, length, samples, parameters)) for length in LENGTHS]
        typer.echo(f"| {_name(task, parameters)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)

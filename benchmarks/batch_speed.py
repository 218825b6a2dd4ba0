"""Throughput of attribute_batch where texts run together, against the same texts one by one.

    python -m benchmarks.batch_speed                       # the table of docs/batches.md
    OMP_NUM_THREADS=1 python -m benchmarks.batch_speed --texts 4 --length 64

Random Llamas with heads of 64 channels, and the bundled reasoner; texts of nearly one length, a quarter of each the
reasoning and 8 tokens the target. Both ways, and the forward pass of the padded texts alone, are timed in turn in one
run, by the processor's time where there is one thread, so that a busy machine does not matter, and else by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.flashtrace_speed import build
from flashtrace_plugin import Span, reasoner
from flashtrace_plugin.methods import METHODS, Method
from flashtrace_plugin.text import TokenizedText

SHAPES = {"llama, d=64, 4 layers": (64, 4), "llama, d=128, 4 layers": (128, 4), "llama, d=256, 6 layers": (256, 6)}
COLUMNS = ("model", "method", "one by one [ms]", "together [ms]", "times as many", "forward pass [ms]")


def ids_of(vocabulary: int, texts: int, length: int) -> list[torch.Tensor]:
    """Texts whose lengths differ by up to three tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, vocabulary, (length - i % 4,), generator=generator) for i in range(texts)]


def reading(method: Method, ids: torch.Tensor) -> tuple[TokenizedText, Span, Span]:
    """One text, its target and its reasoning."""
    stop = len(ids)
    text = method.read_ids(ids, stop - 8 - stop // 4)
    return text, Span(stop - 8, stop), Span(text.prompt_length, stop - 8)


def one_by_one(method: Method, texts: list[torch.Tensor]) -> list[Any]:
    rows = [reading(method, ids) for ids in texts]
    return [method.attribute_text(text, target=target, reasoning=reasoning) for text, target, reasoning in rows]


def together(method: Method, texts: list[torch.Tensor]) -> list[Any]:
    read, targets, reasonings = zip(*(reading(method, ids) for ids in texts), strict=True)
    return method.attribute_texts(read, targets=targets, reasonings=reasonings)


@torch.no_grad()
def forward(model: Any, texts: list[torch.Tensor]) -> None:
    model(input_ids=torch.stack([ids[: len(texts[-1])] for ids in texts]), use_cache=False, logits_to_keep=1)


def milliseconds(run: Callable[[], Any], texts: int) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return 1000 * (clock() - start) / texts


def rows(name: str, model: Any, methods: list[str], texts: int, length: int, repeats: int) -> None:
    """Prints the lines of one model; all times are those of one text."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = sorted(ids_of(vocabulary, texts, length), key=len, reverse=True)
    for method in (METHODS[m](model) for m in methods):
        runs = [partial(one_by_one, method, ids), partial(together, method, ids), partial(forward, model, ids)]
        rounds = [[milliseconds(run, texts) for run in runs] for _ in range(repeats + 1)][1:]
        alone, beside, unit = (median(column) for column in zip(*rounds, strict=True))
        print(
            f"| {name} | {method.name} | {alone:.1f} | {beside:.1f} | {alone / beside:.1f} | {unit:.1f} |", flush=True
        )


def main(
    texts: Annotated[int, typer.Option(help="How many.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of the longest.")] = 128,
    methods: Annotated[str, typer.Option(help="Names of methods.")] = "flashtrace,ifr,alti,lrp",
    repeats: Annotated[int, typer.Option(help="Timed rounds; the median is reported.")] = 5,
) -> None:
    """Prints the table."""
    print(f"{texts} texts of {length} tokens, float32, {torch.get_num_threads()} threads\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    models = {"bundled reasoner": reasoner.load()[0]}
    for name, (width, layers) in SHAPES.items():
        models[name] = build("llama", width, layers)
    for name, model in models.items():
        rows(name, model, methods.split(","), texts, length, repeats)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()

"""Time and memory of FlashTrace against the model's own forward pass, token-wise IFR and the authors' package.

    python -m benchmarks.flashtrace_speed                        # the table of the README
    python -m benchmarks.flashtrace_speed --lengths 512 --repeats 1

The model is llama-shaped with random weights. The unit is one forward pass of the same model on the same tokens,
timed in the same run, without the logits that attribution does not need either. Every sequence is a prompt, N/4
tokens of reasoning and a target of M tokens, so that the second hop has real work. Token-wise IFR is timed on at
most 64 target tokens and scaled to M, because its cost is linear in M. Memory is the peak
resident size that one run adds in a fresh process, less what the forward pass alone adds there (Linux only).
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig

from flashtrace_plugin import IFR, FlashTrace, Span
from flashtrace_plugin.evaluation.authors import authors_flashtrace

IFR_TOKENS = 64
COLUMNS = (
    "N",
    "M",
    "forward [s]",
    "FlashTrace K=1",
    "IFR, token-wise",
    "flashtrace 0.1.1",
    "memory, ours",
    "memory, 0.1.1",
    "score gap",
)
SHAPES = {"llama": 1, "llama GQA": 4}
"""Query heads per KV head."""


@dataclass(frozen=True)
class Workload:
    """One sequence: prompt, reasoning of N/4 tokens, target of M tokens."""

    length: int
    target_length: int

    @property
    def target(self) -> Span:
        return Span(self.length - self.target_length, self.length)

    @property
    def reasoning(self) -> Span:
        return Span(self.target.start - self.length // 4, self.target.start)

    @property
    def spans(self) -> dict[str, Any]:
        return {"prompt_length": self.reasoning.start, "target": self.target, "reasoning": self.reasoning}

    def ids(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.length)
        return torch.randint(0, 1000, (1, self.length), generator=generator)


def build(shape: str, width: int, layers: int) -> Any:
    """A random llama with heads of 64 channels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64 // SHAPES[shape],
        max_position_embeddings=1 << 20,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def contestants(model: Any, work: Workload) -> dict[str, Callable[[], Any]]:
    """What is timed; each runs its own forward pass."""
    ids = work.ids()
    few = Span(work.target.stop - min(IFR_TOKENS, work.target_length), work.target.stop)
    spans = (work.target.start, work.target.stop), (work.reasoning.start, work.reasoning.stop)
    return {
        "forward": partial(forward, model, ids),
        "FlashTrace": partial(FlashTrace(model).attribute_ids, ids, **work.spans),
        "IFR": partial(IFR(model).attribute_ids, ids, **work.spans | {"target": few}),
        "authors": partial(authors_flashtrace, model, ids, *spans, 1),
    }


@torch.no_grad()
def forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def times(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turn so that a slow minute of the machine hits all of them."""
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(repeats)]
    return {name: median(r[name] for r in rounds) for name in runs}


def score_gap(runs: dict[str, Callable[[], Any]], work: Workload) -> float:
    """Largest difference between the authors' scores and ours, relative to the largest score."""
    ours = runs["FlashTrace"]().scores
    theirs = runs["authors"]().observation["sum"][: work.reasoning.start]
    return float((ours - theirs).abs().max() / ours.max())


def peak_mib(name: str, work: Workload, width: int, layers: int, shape: str) -> float:
    """Peak memory that one run of a contestant adds to a fresh process."""
    arguments = [name, str(work.length), str(work.target_length), str(width), str(layers), shape]
    command = [sys.executable, "-m", "benchmarks.flashtrace_speed", "--peak", "|".join(arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_peak(description: str) -> None:
    name, length, target_length, width, layers, shape = description.split("|")
    model = build(shape, int(width), int(layers))
    contestants(model, Workload(128, 32))[name]()  # libraries allocate their workspaces on the first call
    run = contestants(model, Workload(int(length), int(target_length)))[name]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    before = memory_kib("VmRSS")
    run()
    print((memory_kib("VmHWM") - before) / 1024)


def memory_kib(name: str) -> int:
    """A line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main(
    lengths: Annotated[str, typer.Option(help="Sequence lengths N.")] = "512,1024,2048,4096",
    repeats: Annotated[int, typer.Option(help="Timed rounds; the median is reported.")] = 3,
    width: Annotated[int, typer.Option(help="Model width d.")] = 512,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 8,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama",
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    peak: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Prints the table."""
    if peak:
        return run_peak(peak)
    model = build(shape, width, layers)
    print(f"{shape}, d = {width}, {layers} layers, float32, {platform.machine()}, {torch.get_num_threads()} threads\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for length in map(int, lengths.split(",")):
        for target_length in (64, length // 2):
            work = Workload(length, target_length)
            print(
                row(
                    model, work, repeats, partial(peak_mib, work=work, width=width, layers=layers, shape=shape), memory
                )
            )


def row(model: Any, work: Workload, repeats: int, peak: Callable[[str], float], memory: bool) -> str:
    """One line of the table; times as multiples of the forward pass, memory beyond it."""
    runs = contestants(model, work)
    times(runs, 1)
    took = times(runs, repeats)
    unit = took["forward"]
    # Token-wise IFR is one forward pass plus a part that grows with the number of target tokens.
    scale = work.target_length / min(IFR_TOKENS, work.target_length)
    tokenwise = unit + (took["IFR"] - unit) * scale
    beyond = ["–", "–"]
    if memory:
        base = peak("forward")
        beyond = [f"{peak(name) - base:.0f} MiB" for name in ("FlashTrace", "authors")]
    cells = [
        work.length,
        work.target_length,
        f"{unit:.2f}",
        f"**{took['FlashTrace'] / unit:.2f}x**",
        f"{tokenwise / unit:.0f}x",
        f"{took['authors'] / unit:.1f}x",
        *beyond,
        f"{score_gap(runs, work):.0e}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()

"""Time and memory of the graph of reasoning steps against the model's own forward pass.

    python -m benchmarks.graph_speed                        # the table of docs/graph.md
    python -m benchmarks.graph_speed --lengths 512 --repeats 1

The model is that of benchmarks.flashtrace_speed, llama-shaped with random weights, and so is the unit: one forward
pass of the same model on the same tokens, timed in the same run on one thread. A quarter of every sequence is
reasoning, divided evenly into steps; the target has 64 tokens. *per step* is what a graph adds to one without steps.
Memory is the peak resident size that one run adds in a fresh process, less what the forward pass alone adds there
(Linux only).
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.flashtrace_speed import SHAPES, Workload, build, forward, memory_kib, times
from flashtrace_plugin import LRP, FlashTrace, Span

METHODS = {"flashtrace": FlashTrace, "lrp": LRP}
TARGET = 64
COLUMNS = ("method", "N", "steps", "forward [s]", "no steps", "graph", "per step", "memory")


def units(work: Workload, steps: int) -> dict[str, Any]:
    """Units of the prompt, 16 of them, and steps of about the same length."""
    span = work.reasoning
    edges = torch.linspace(span.start, span.stop, steps + 1).round().long().tolist()
    sources = torch.linspace(0, span.start, 17).round().long().tolist()
    return {
        "unit": [Span(a, b) for a, b in pairwise(sources)],
        "step_unit": [Span(a, b) for a, b in pairwise(edges)],
    }


def contestants(name: str, model: Any, work: Workload, steps: int) -> dict[str, Callable[[], Any]]:
    """What is timed; each runs its own forward pass."""
    ids, given = work.ids(), units(work, steps)
    graph = METHODS[name](model).graph_ids
    direct = {"prompt_length": work.reasoning.start, "target": work.target, "unit": given["unit"]}
    return {
        "forward": partial(forward, model, ids),
        "none": partial(graph, ids, **direct),
        "graph": partial(graph, ids, **work.spans, **given),
    }


def run_peak(description: str) -> None:
    """Prints what one run adds to this process in MiB."""
    name, run, length, steps, width, layers, shape = description.split("|")
    model = build(shape, int(width), int(layers))
    contestants(name, model, Workload(256, TARGET), 2)[run]()  # libraries allocate their workspaces on the first call
    measured = contestants(name, model, Workload(int(length), TARGET), int(steps))[run]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    before = memory_kib("VmRSS")
    measured()
    print((memory_kib("VmHWM") - before) / 1024)


def main(
    methods: Annotated[str, typer.Option(help=f"Of {', '.join(METHODS)}.")] = "flashtrace,lrp",
    lengths: Annotated[str, typer.Option(help="Sequence lengths N.")] = "512,2048",
    steps: Annotated[str, typer.Option(help="Numbers of steps.")] = "10,40",
    repeats: Annotated[int, typer.Option(help="Timed rounds; the median is reported.")] = 3,
    width: Annotated[int, typer.Option(help="Model width d.")] = 512,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 8,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama",
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    peak: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    if peak:
        return run_peak(peak)
    model = build(shape, width, layers)
    print(f"{shape}, d = {width}, {layers} layers, float32, {platform.machine()}, 1 thread\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for name in methods.split(","):
        for length in map(int, lengths.split(",")):
            for count in map(int, steps.split(",")):
                described = f"{{}}|{length}|{count}|{width}|{layers}|{shape}"
                print(row(name, model, length, count, repeats, described if memory else ""), flush=True)


def row(name: str, model: Any, length: int, steps: int, repeats: int, described: str) -> str:
    """One line of the table; times as multiples of the forward pass, memory beyond it."""
    runs = contestants(name, model, Workload(length, TARGET), steps)
    took = times(runs, repeats)
    unit = took["forward"]
    beyond = "–"
    if described:
        both = [_peak_mib(described.format(f"{name}|{run}")) for run in ("graph", "forward")]
        beyond = f"{both[0] - both[1]:.0f} MiB"
    cells = (
        *(name, length, steps, f"{unit:.2f}", f"{took['none'] / unit:.2f}x", f"**{took['graph'] / unit:.2f}x**"),
        f"{(took['graph'] - took['none']) / unit / steps:.3f}x",
        beyond,
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _peak_mib(described: str) -> float:
    command = [sys.executable, "-m", "benchmarks.graph_speed", "--peak", described]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()

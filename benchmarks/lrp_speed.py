"""Time and memory of relevance propagation against the model's own forward pass.

    python -m benchmarks.lrp_speed                          # the table of docs/lrp.md
    python -m benchmarks.lrp_speed --lengths 512 --repeats 1 --no-memory

The model and the unit are those of `benchmarks.flashtrace_speed`: llama-shaped, random weights, one forward pass
without the logits that attribution does not need. A run is one linearised forward pass, its check on the first 128
tokens included, and K + 1 backward passes: hop 0 from a target of 64 tokens, the others from N/4 tokens of reasoning.
"kept" keeps the linearisation, "again" computes it once more, block by block, in every backward pass. Memory is the
peak resident size that one run adds in a fresh process, less what the forward pass alone adds there (Linux only).
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.flashtrace_speed import SHAPES, Workload, build, forward, memory_kib
from flashtrace_plugin.models.derive.relevance import MEMORY_BUDGET, HuggingFace, linearised

HOPS = (0, 1, 4)
BUDGETS = {"kept": MEMORY_BUDGET, "again": 0}
TARGET = 64
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def explain(model: Any, work: Workload, rule: Any, budget: int, hops: int) -> None:
    """One linearised forward pass and hops + 1 backward passes."""
    target, reasoning = torch.zeros(work.length), torch.zeros(work.length)
    target[work.target.slice] = 1.0
    reasoning[work.reasoning.slice] = 1 / len(work.reasoning)
    rows = torch.arange(work.reasoning.start, work.target.stop) - 1
    with linearised(HuggingFace(model), work.ids(), rows, rule=rule, memory_budget=budget) as linear:
        for hop in range(hops + 1):
            linear.relevance(reasoning if hop else target)


def contestants(model: Any, work: Workload, rule: str) -> dict[str, Callable[[], Any]]:
    """What is timed: the forward pass, and every way of keeping with every number of hops."""
    runs: dict[str, Callable[[], Any]] = {"forward": partial(forward, model, work.ids())}
    for name, budget in BUDGETS.items():
        runs |= {f"{name} {hops}": partial(explain, model, work, rule, budget, hops) for hops in HOPS}
    return runs


def times(runs: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each, taken in turn so that a slow minute of the machine hits all of them."""

    def seconds(run: Callable[[], Any]) -> float:
        start = clock()
        run()
        return clock() - start

    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(repeats)]
    return {name: median(r[name] for r in rounds) for name in runs}


def peak_mib(name: str, work: Workload, rule: str, shape: str, width: int, layers: int) -> float:
    """Peak memory that one run of a contestant adds to a fresh process."""
    description = "|".join(map(str, (name, work.length, rule, shape, width, layers)))
    command = [sys.executable, "-m", "benchmarks.lrp_speed", "--peak", description]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_peak(description: str) -> None:
    name, length, rule, shape, width, layers = description.split("|")
    model = build(shape, int(width), int(layers))
    contestants(model, Workload(256, TARGET), rule)[name]()  # libraries allocate their workspaces on the first call
    run = contestants(model, Workload(int(length), TARGET), rule)[name]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    before = memory_kib("VmRSS")
    run()
    print((memory_kib("VmHWM") - before) / 1024)


def main(
    lengths: Annotated[str, typer.Option(help="Sequence lengths N.")] = "512,2048",
    repeats: Annotated[int, typer.Option(help="Timed rounds; the median is reported.")] = 3,
    rules: Annotated[str, typer.Option(help="Rules for attention.")] = "cp,attn",
    width: Annotated[int, typer.Option(help="Model width d.")] = 512,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 8,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama",
    clock: Annotated[str, typer.Option(help="wall; or cpu, which other work on the machine hardly moves.")] = "wall",
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    peak: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Prints the table."""
    if peak:
        return run_peak(peak)
    model = build(shape, width, layers)
    threads = f"{torch.get_num_threads()} threads, {clock} clock"
    print(f"{shape}, d = {width}, {layers} layers, float32, {platform.machine()}, {threads}\n")
    hops = [f"K={k}, {name}" for name in BUDGETS for k in HOPS]
    columns = ["N", "rule", "forward [s]", *hops, *(f"memory, {name}" for name in BUDGETS)]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for length in map(int, lengths.split(",")):
        for rule in rules.split(","):
            work = Workload(length, TARGET)
            measure = partial(peak_mib, work=work, rule=rule, shape=shape, width=width, layers=layers)
            print(row(contestants(model, work, rule), work, rule, repeats, CLOCKS[clock], measure if memory else None))


def row(
    runs: dict[str, Callable[[], Any]],
    work: Workload,
    rule: str,
    repeats: int,
    clock: Callable[[], float],
    peak: Callable[[str], float] | None,
) -> str:
    """One line of the table; times as multiples of the forward pass, memory beyond it."""
    times({name: runs[name] for name in ("forward", "kept 0")}, 1, clock)
    took = times(runs, repeats, clock)
    ratios = [f"{took[name] / took['forward']:.2f}x" for name in runs if name != "forward"]
    beyond = ["–" for _ in BUDGETS]
    if peak is not None:
        base = peak("forward")
        beyond = [f"{peak(f'{name} 1') - base:.0f} MiB" for name in BUDGETS]
    return "| " + " | ".join([str(work.length), rule, f"{took['forward']:.2f}", *ratios, *beyond]) + " |"


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()

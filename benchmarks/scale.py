"""FlashTrace and relevance propagation on long texts: time against the forward pass, and memory that grows as N.

    python -m benchmarks.scale --lengths 4096 8192 16384 32768          # the table of docs/how-it-works.md
    python -m benchmarks.scale --lengths 1024 2048 --methods flashtrace

The model is that of benchmarks.flashtrace_speed with grouped-query attention, on one thread. Every text is a prompt,
1,024 tokens of reasoning (N/4 where that is less) and a target of 64 tokens; one hop. Time is that of a run, divided
by that of the forward pass after it in the same process, in CPU seconds. Memory is the peak resident size that a run
adds to a fresh process, less what the forward pass adds to another (Linux only). A straight line through the memory of
all lengths is printed with its largest residual, and beside it what one layer's pattern of N x N would take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.flashtrace_speed import build, forward, memory_kib
from flashtrace_plugin import Span
from flashtrace_plugin.methods import METHODS

TARGET = 64
REASONING = 1024
NAMES = ("flashtrace", "lrp")
COLUMNS = ("method", "N", "forward [s]", "time", "memory", "pattern of one layer")
_RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""What the GNU allocator is told so that freed tensors leave the process, and peaks are those of tensors."""


def memory(name: str, length: int, width: int, layers: int) -> float:
    """Peak memory that a run adds to this process [MiB]."""
    run = _begun(name, width, layers)[0]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    before = memory_kib("VmRSS")
    run(_ids(length))
    return (memory_kib("VmHWM") - before) / 1024


def times(name: str, length: int, width: int, layers: int) -> list[float]:
    """CPU seconds of a run, and of a forward pass after it."""
    ids, found = _ids(length), []
    for run in _begun(name, width, layers):
        began = time.process_time()
        run(ids)
        found.append(time.process_time() - began)
    return found


def _begun(name: str, width: int, layers: int) -> tuple[Callable[[torch.Tensor], object], ...]:
    """The run of a method, or of "forward", and the forward pass alone; libraries have allocated their workspaces."""
    torch.set_num_threads(1)
    model = build("llama GQA", width, layers)
    passing = partial(forward, model)
    run = passing if name == "forward" else partial(_explained, METHODS[name](model, hops=1))
    run(_ids(256))
    return run, passing


def _ids(length: int) -> torch.Tensor:
    return torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(length))


def _explained(method: object, ids: torch.Tensor) -> None:
    target = Span(ids.shape[1] - TARGET, ids.shape[1])
    reasoning = Span(target.start - min(REASONING, ids.shape[1] // 4), target.start)
    method.attribute_ids(ids, prompt_length=reasoning.start, target=target, reasoning=reasoning)  # type: ignore


def measured(what: str, *arguments: object, **environment: str) -> Any:
    """What a function above gives in a process of its own. Raises RuntimeError if the process dies."""
    code = f"from benchmarks import scale; print(scale.{what}{arguments!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["killed, as happens for want of memory"])[-1]
        raise RuntimeError(f"exit status {done.returncode}: {why}")
    return json.loads(done.stdout)


def line(lengths: Sequence[int], sizes: Sequence[float]) -> str:
    """Memory as a straight line of the length, and how far the points are from it."""
    N, y = torch.tensor(lengths).double(), torch.tensor(sizes).double()
    X = torch.stack([N, torch.ones_like(N)], 1)
    fit = torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
    residual = float((X @ fit - y).abs().max())
    return f"{fit[1]:.0f} MiB + {fit[0] * 1024:.2f} KiB per token, largest residual {residual:.1f} MiB"


def row(name: str, length: int, width: int, layers: int, base: float) -> tuple[str, float]:
    """One line of the table, and the memory beyond the forward pass's ``base`` [MiB]."""
    beyond = measured("memory", name, length, width, layers, **_RETURNS_MEMORY) - base
    took, unit = measured("times", name, length, width, layers)
    pattern = width // 64 * 4 * length**2 / 2**20
    cells = [name, length, f"{unit:.2f}", f"{took / unit:.2f}x", f"{beyond:.0f} MiB", f"{pattern:.0f} MiB"]
    return "| " + " | ".join(map(str, cells)) + " |", beyond


def main() -> None:
    """Prints the table, and the line through the memory of each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    given = parser.parse_args()
    shape = given.width, given.layers
    print(f"llama GQA, d = {shape[0]}, {shape[1]} layers, float32, {platform.machine()}, 1 thread\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    found: dict[str, dict[int, float]] = {name: {} for name in given.methods}
    for length in given.lengths:
        base = measured("memory", "forward", length, *shape, **_RETURNS_MEMORY)
        for name in given.methods:
            try:
                text, found[name][length] = row(name, length, *shape, base)
            except RuntimeError as error:
                text = f"| {name} | {length} | {error} |"
            print(text, flush=True)
    for name, beyond in found.items():
        if len(beyond) > 2:
            print(f"\n{name}: {line(list(beyond), list(beyond.values()))}")


if __name__ == "__main__":
    main()

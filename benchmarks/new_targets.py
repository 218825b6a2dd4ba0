"""What a new target costs on a recorded text, beside a call of its own.

    OMP_NUM_THREADS=1 python benchmarks/new_targets.py --model smollm2 --tokens 1000 3000

One sequence of random ids, a fifth of it generated; targets of eight tokens with the reasoning before them. Times are
the process's own on one CPU thread, so that others on the machine do not count: the fastest of a few runs, in
milliseconds, with the model's own forward pass beside them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from flashtrace_plugin import Span
from flashtrace_plugin.evaluation.models import NAMES, load
from flashtrace_plugin.methods.registry import METHODS


def milliseconds(run: Callable[[], Any], times: int) -> float:
    """The fastest of some runs."""
    found = []
    for _ in range(times):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return 1000 * min(found)


def measured(model: Any, name: str, length: int, times: int) -> list[float]:
    """Of a method: a fresh call, the recording with its first target, and a new target."""
    ids = torch.randint(10, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    prompt = length * 4 // 5
    spans = [
        {"target": Span(stop - 8, stop), "reasoning": Span(prompt + 2, stop - 20)} for stop in (length, length - 9)
    ]
    method = METHODS[name](model)
    fresh = milliseconds(lambda: method.attribute_ids(ids, prompt_length=prompt, **spans[1]), times)
    recording = method.record_ids(ids, prompt_length=prompt)
    first = milliseconds(lambda: recording.attribute(**spans[0]), 1)
    new = []
    for shift in range(times):  # no two are the same, since answers are remembered
        moved = {"target": Span(length - 17 - shift, length - 9 - shift), "reasoning": spans[1]["reasoning"]}
        new.append(milliseconds(lambda moved=moved: recording.attribute(**moved), 1))
    return [fresh, first, min(new), recording.nbytes / 2**20]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", choices=NAMES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 3000])
    parser.add_argument("--methods", nargs="+", default=["flashtrace", "recommended"])
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    model, _ = load(args.model)
    print(f"{args.model}, {torch.get_num_threads()} threads; milliseconds")
    print("| tokens | method | forward pass | a call of its own | first target | new target | MB kept |")
    print("|---|---|---|---|---|---|---|")
    for length in args.tokens:
        ids = torch.zeros(1, length, dtype=torch.long)
        with torch.no_grad():
            forward = milliseconds(lambda ids=ids: model(ids, use_cache=False, logits_to_keep=1), args.times)
        for name in args.methods:
            fresh, first, new, size = measured(model, name, length, args.times)
            print(
                f"| {length:,} | {name} | {forward:,.0f} | {fresh:,.0f} | {first:,.0f} | {new:,.0f} | {size:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Time and memory against the length of the prompt and of the target (FlashTrace, Fig. 4).

    python -m flashtrace_plugin.evaluation.run.scale --model smollm2 --out runs/scale

Every method runs in a process of its own, lengths increasing, so that the peak of its memory, the forward pass
included, is its own. It can be killed and run again: every length of a method is a line.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from flashtrace_plugin.errors import FlashTraceError
from flashtrace_plugin.evaluation import models
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.run.contestants import method_label, scorer_of
from flashtrace_plugin.evaluation.run.figures import legend, panels, save
from flashtrace_plugin.evaluation.run.lines import append_line, cut_unfinished, read_lines
from flashtrace_plugin.evaluation.run.measures import Subject
from flashtrace_plugin.spans import Span

_METHODS = "flashtrace,ifr,exhaustive_rollout,lrp,recommended,leave_one_chunk_out"
_SIZES = "10,100,500"
_FIXED = 100
"""Tokens of what does not vary."""


def _case(vocabulary: int, prompt: int, target: int) -> Case:
    ids = torch.randint(10, vocabulary, (prompt + target,), generator=torch.Generator().manual_seed(0))
    return Case(ids, prompt, Span(prompt, prompt + target), None, evidence=())


def _peak() -> float:
    """MiB: of the accelerator where there is one, of the process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _run(model: str, method: str, sizes: list[tuple[int, int]], out: Path) -> None:
    lm, _ = models.load(model)
    score, loaded = scorer_of(method, lm), _peak()
    for prompt, target in sizes:
        case = _case(lm.config.get_text_config().vocab_size, prompt, target)
        line: dict[str, Any] = {"model": model, "method": method, "prompt": prompt, "target": target}
        line["forward"] = Subject(lm, case).forward_seconds
        try:
            began = time.perf_counter()
            score(case)
            line |= {"seconds": time.perf_counter() - began, "memory": _peak() - loaded}
        except FlashTraceError as error:
            line["error"] = str(error)
        append_line(out, line)


def _main(
    out: Annotated[Path, typer.Option(help="folder of the lines and the figure")],
    model: Annotated[
        str, typer.Option(help="reasoner, smollm2, gemma3-270m, or as for the command line")
    ] = "reasoner",
    methods: Annotated[str, typer.Option(help="names with commas")] = _METHODS,
    sizes: Annotated[str, typer.Option(help="tokens, with commas")] = _SIZES,
) -> None:
    """Measure, and draw."""
    lengths = [int(size) for size in sizes.split(",")]
    wanted = sorted({*product(lengths, [_FIXED]), *product([_FIXED], lengths)}, key=lambda size: (sum(size), size))
    file = out / "scale.jsonl"
    cut_unfinished(file)
    known = {(line["model"], line["method"], line["prompt"], line["target"]) for line in read_lines(file)}
    for method in methods.split(","):
        missing = [size for size in wanted if (model, method, *size) not in known]
        if missing:
            child = multiprocessing.get_context("spawn").Process(target=_run, args=(model, method, missing, file))
            child.start()
            child.join()
            if child.exitcode:
                raise typer.Exit(1)
    save(_figure(pd.DataFrame(list(read_lines(file))).query("model == @model")), out / f"scale-{model}.png")
    typer.echo(file)


def _figure(values: pd.DataFrame) -> Any:
    """Seconds and memory against the prompt and against the target, the other one at 100 tokens."""
    figure = panels(4, 3.6)
    shown = [(what, varied) for what in ("seconds", "memory") for varied in ("prompt", "target")]
    for axis, (what, varied) in zip(figure.axes, shown, strict=True):
        other = "target" if varied == "prompt" else "prompt"
        part = values[values[other] == _FIXED].sort_values(varied)
        for method, one in part.groupby("method", sort=False):
            axis.plot(one[varied], one[what], marker="o", ms=3, label=method_label(str(method)))
        axis.set(xlabel=f"tokens of the {varied}", ylabel="seconds" if what == "seconds" else "memory, MiB")
        axis.set(xscale="log", yscale="log" if what == "seconds" else "linear")
    legend(figure)
    return figure


if __name__ == "__main__":
    typer.run(_main)

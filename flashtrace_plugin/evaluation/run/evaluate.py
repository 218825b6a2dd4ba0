"""A whole suite on one model, in a folder that can be killed at any moment and gone on with.

    folder = run_suite("smollm2", "quick", out="runs/smollm2")

The folder holds ``manifest.json``, a line for every sample that was drawn (``samples-*.jsonl``) and for every method
on it (``lines-*.jsonl``), and the tables and figures made of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flashtrace_plugin import loading
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation import models
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.drawing import case_source
from flashtrace_plugin.evaluation.run.contestants import scorer_of
from flashtrace_plugin.evaluation.run.draws import Shard, drawn_cases
from flashtrace_plugin.evaluation.run.manifest import manifest, open_folder
from flashtrace_plugin.evaluation.run.runner import digests, measure_cases
from flashtrace_plugin.evaluation.run.suites import Suite, suite_of
from flashtrace_plugin.evaluation.run.summary import line_files, write_summary


def run_suite(
    model: str = loading.REASONER,
    suite: str = "quick",
    *,
    out: str | Path,
    methods: Iterable[str] = (),
    tasks: Iterable[str] = (),
    samples: int | None = None,
    seed: int = 0,
    length: int = 128,
    steps: int | None = None,
    answers: str | None = None,
    data: Mapping[str, str | Path] | None = None,
    shard: Shard | None = None,
    progress: bool = True,
    **loaded: Any,
) -> Path:
    """Runs what the folder lacks of a suite, and writes its tables and figures.

    model:   reasoner, smollm2, gemma3-270m, or any name of ``loading.load``
    suite:   of ``SUITES``
    out:     folder; what it holds already is not computed again
    methods, tasks, samples, steps, answers: instead of the suite's
    seed:    of the samples
    length:  tokens of the reasoner's prompts at most
    data:    files of data sets by task
    shard:   the part of the samples to run, so that several processes share a folder
    loaded:  options of ``loading.load``, such as ``device``
    result:  the folder

    Raises InputError for unknown names, a folder of another run or version and one that cannot be written; lines that
    were written stay. What a method refuses on a case becomes a line that says so.
    """
    plan, shard, out = suite_of(suite), shard or Shard(), Path(out)
    reads_text = model != loading.REASONER
    chosen = tuple(methods) or plan.methods
    wanted = samples or (plan.text_samples if reads_text else plan.samples)
    _check(wanted, shard)
    lm, tokenizer = models.load(model, **loaded)
    scorers = {name: scorer_of(name, lm) for name in chosen}
    drawing: dict[str, Any] = {
        "seed": seed,
        "length": length,
        "answers": _answers(answers, plan, reads_text),
        "data": data,
    }
    names = tuple(tasks) or (plan.text if reads_text else plan.reasoner)
    sources = {task: case_source(lm, tokenizer, task, **drawing) for task in names}
    open_folder(out, _manifest(lm, model, suite, plan, steps, drawing))
    told = tqdm(disable=not progress, desc="samples drawn", unit="sample", leave=False)
    cases = _in_turns(
        [
            drawn_cases(
                out / f"samples-{shard.name}.jsonl",
                task,
                source,
                seed=seed,
                samples=wanted,
                shard=shard,
                progress=lambda number: told.update(),
            )
            for task, source in sources.items()
        ]
    )
    measure_cases(
        lm,
        _told(cases, len(names) * shard.wanted(wanted), progress),
        scorers,
        out=out / f"lines-{shard.name}.jsonl",
        groups=plan.groups,
        steps=steps or plan.steps,
        progress=False,
        known=_elsewhere(out, lm),
        note_errors=True,
    )
    write_summary(out, plan.reference)
    return out


def _in_turns(cases: Iterable[Iterator[Case]]) -> Iterator[Case]:
    """One case of every task in turn, so that a run that is stopped early knows something of all of them."""
    going = list(cases)
    while going:
        for one in list(going):
            case = next(one, None)
            if case is None:
                going.remove(one)
            else:
                yield case


def _told(cases: Iterable[Case], expected: int, progress: bool) -> Iterable[Case]:
    return tqdm(cases, total=expected, desc="cases", unit="case", disable=not progress)


def _answers(asked: str | None, plan: Suite, reads_text: bool) -> str:
    """The reasoner is never forced, so that a suite which forces others takes its right answers."""
    chosen = asked or plan.answers
    return "right" if asked is None and chosen == "forced" and not reads_text else chosen


def _manifest(
    lm: Any, model: str, suite: str, plan: Suite, steps: int | None, drawing: Mapping[str, Any]
) -> dict[str, Any]:
    fixed = {key: drawing[key] for key in ("seed", "length", "answers")}
    where = {"torch": torch.__version__, "device": str(lm.device), "threads": torch.get_num_threads()}
    return manifest(
        lm, model, {"suite": suite, "steps": steps or plan.steps, "groups": list(plan.groups)} | fixed | where
    )


def _elsewhere(out: Path, lm: Any) -> dict[tuple[str, str], str]:
    """What all files of the folder hold; another process may be writing some of them, so they are read only."""
    name = str(lm.config.name_or_path)
    return {key: digest for file in line_files(out) for key, digest in digests(file, name).items()}


def _check(samples: int, shard: Shard) -> None:
    if samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}")
    if not 1 <= shard.part <= shard.of:
        raise InputError(f"the shard is {shard.part}/{shard.of}; write i/n with i from 1 to n")

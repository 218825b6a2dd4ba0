"""Explains the rows of a data set, and keeps what it has found whatever happens."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from flashtrace_plugin import __version__
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.options import at_least, one_of
from flashtrace_plugin.runs.buckets import Bucket, Cut, buckets, left
from flashtrace_plugin.runs.data_set import DataSet
from flashtrace_plugin.runs.folder import Folder
from flashtrace_plugin.runs.index import write_index
from flashtrace_plugin.runs.recipe import Recipe, model_name

if TYPE_CHECKING:
    from flashtrace_plugin.methods.base import Method

_ENGINES = ("auto", "local", "ray")
INSTALL = "pip install 'flashtrace-plugin[runs]'"


class Explained(NamedTuple):
    """What a worker gives back: the lines of a bucket, and the fingerprint of its model."""

    fingerprint: str
    lines: list[bytes]


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    folder:    of its results
    explained: rows of this call that were explained
    failed:    rows of this call that were not; the results say why
    before:    rows that had a result before
    earlier_failures: those of them that are failures
    seconds:   of this call
    """

    folder: Path
    explained: int
    failed: int
    before: int
    earlier_failures: int
    seconds: float

    @property
    def failures(self) -> int:
        """Failures among all results."""
        return self.failed + self.earlier_failures

    @property
    def total(self) -> int:
        """Rows that have a result."""
        return self.explained + self.failed + self.before

    def __str__(self) -> str:
        each = f", {self.seconds / (self.explained + self.failed):.2f} s a row" if self.explained + self.failed else ""
        there = f", {self.before} were there" if self.before else ""
        return (
            f"{self.total} rows: {self.explained} explained, {self.failed} failed{there}; {self.seconds:.1f} s{each}; "
            f"{self.folder}"
        )


_Rows = Union[str, Path, DataSet, Iterable[Mapping[str, Any]]]
"""A file, a folder or name of a data set, a :class:`DataSet` that says more, or rows as mappings."""


def run(
    rows: _Rows,
    method: Method | Recipe,
    out: str | Path,
    *,
    batch: int = 16,
    window: int = 1024,
    max_new_tokens: int = 512,
    reports: bool = False,
    retry: bool = False,
    engine: str = "auto",
    workers: int | None = None,
    progress: bool | None = None,
) -> Summary:
    """Explains rows and writes a line of JSON for each; called again with the same rows, it does what is left::

        runs.run("questions.jsonl", Recipe("reasoner", "flashtrace", {"hops": 2}), "out")
        for id, attribution in runs.read("out"): ...

    rows:    each with prompt or messages, and generation, target, reasoning, documents, evidence, id where they are
             known; see docs/runs.md
    method:  a method with its model, or a :class:`Recipe`, whose model is loaded when there is something to explain
    out:     folder of results.jsonl, run.json and index.html
    batch:   rows of like length that are explained, and saved, together, at most
    window:  rows that are read ahead to be sorted by length
    max_new_tokens: tokens that the model writes at most where a row has no generation
    reports: also a report for every row, ``reports/<row>.html``
    retry:   try rows again that failed before
    engine:  "local", this process; "ray", a model for each worker, which needs a recipe; "auto": Ray where there are
             several accelerators and it is installed
    workers: of Ray, by default one for each accelerator
    progress: whether a bar is shown; by default where stderr is a terminal

    A row that cannot be explained is a result with its reason. Raises InputError, before a model is loaded, for a
    folder that cannot be written or holds another run, and for rows that differ from those it has results of.
    """
    cut, source = Cut(batch, window), rows if isinstance(rows, DataSet) else DataSet(rows)
    at_least(1)("max_new_tokens", max_new_tokens)
    chosen = _engine(engine, method, workers)
    began = time.perf_counter()
    with Folder(out, _about(method, max_new_tokens, source)) as folder:
        if retry:
            folder.forget_failures()
        before, earlier = len(folder.done), len(folder.failed)
        work = Work(source, folder.done, cut, method, max_new_tokens, folder.path)
        with _bar(source, before, progress) as bar:
            for explained in _ray(work, workers) if chosen == "ray" else _local(work):
                folder.know(explained.fingerprint)
                bar.update(len(folder.append(explained.lines)))
        write_index(folder.path, reports=reports)
        new, failed = len(folder.done) - before, len(folder.failed) - earlier
    return Summary(folder.path, new - failed, failed, before, earlier, time.perf_counter() - began)


@dataclass(frozen=True)
class Work:
    """What is to be done: rows, those that are done, who explains them, and the folder of the results."""

    source: DataSet
    done: Mapping[int, str]
    cut: Cut
    method: Method | Recipe
    max_new_tokens: int
    folder: Path

    def buckets(self) -> Iterator[Bucket]:
        """The rows that are left."""
        return buckets(left(self.source, self.done), self.cut)


def _local(work: Work) -> Iterator[Explained]:
    """In this process."""
    from flashtrace_plugin.runs.explain import Explainer

    explainer = None
    for bucket in work.buckets():
        if explainer is None:
            made = work.method.made() if isinstance(work.method, Recipe) else work.method
            explainer = Explainer(made, work.max_new_tokens)
        yield Explained(explainer.fingerprint, explainer.lines(bucket))


def _ray(work: Work, workers: int | None) -> Iterator[Explained]:
    from flashtrace_plugin.runs.cluster import on_ray

    return on_ray(work, workers)


def _engine(name: str, method: Method | Recipe, workers: int | None) -> str:
    """The engine to use. Raises InputError for one that cannot be, and for workers that nothing would use."""
    one_of("engine", name, _ENGINES)
    at_least(1, optional=True)("workers", workers)
    if name == "auto":
        name = "ray" if workers is not None or _several_accelerators(method) else "local"
        if name == "ray" and find_spec("ray") is None:
            name = "local"
            warnings.warn(f"one of several accelerators is used; {INSTALL} to use all", stacklevel=3)
    if name == "local" and workers is not None:
        raise InputError(f"workers={workers} needs engine='ray'; the local engine is this process")
    if name == "ray" and not isinstance(method, Recipe):
        raise InputError("workers load models of their own: pass a Recipe(model, method, options), not a method")
    return name


def _several_accelerators(method: Method | Recipe) -> bool:
    """Whether there is more to use than one process does."""
    if not isinstance(method, Recipe) or method.device is not None:
        return False
    import torch

    return torch.accelerator.is_available() and torch.accelerator.device_count() > 1


def _about(method: Method | Recipe, max_new_tokens: int, source: DataSet) -> dict[str, Any]:
    """What the run is one of."""
    if isinstance(method, Recipe):
        name, model = method.method, method.model
    else:
        name, model = method.name, str(method.source.describe().get("model", ""))
    return {
        "version": __version__,
        "method": name,
        "settings": method.settings(),
        "model": model_name(model),
        "max_new_tokens": max_new_tokens,
        "input": source.name,
    }


def _bar(source: DataSet, before: int, progress: bool | None) -> Any:
    from tqdm.auto import tqdm

    try:
        total = len(source)
    except TypeError:
        total = None
    return tqdm(total=total, initial=before, unit="row", disable=None if progress is None else not progress)

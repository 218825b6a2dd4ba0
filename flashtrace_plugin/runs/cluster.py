"""The same run on Ray Data: buckets stream to workers that each hold a model, and their lines stream back.

Ray places workers, starts those that die again and repeats what they had in hand; it holds back the reader when
workers fall behind. One task beside them reads the rows, so several machines need storage that all of them see.
"""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashtrace_plugin.errors import FlashTraceError, InputError
from flashtrace_plugin.runs.engine import INSTALL, Explained, Work
from flashtrace_plugin.runs.hand import Hand
from flashtrace_plugin.runs.recipe import Recipe

try:
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource, ReadTask, read_datasource
    from ray.data.block import BlockMetadata
except ImportError as error:
    raise InputError(f"engine='ray' needs Ray Data; {INSTALL}") from error

_TRIES = 3
"""Times that a bucket is tried again whose worker died; by then a row that kills workers is known and passed over."""
_BLOCK = 1 << 10
"""Bytes above which Ray closes a block: every bucket is one of its own, to be handed to whoever is free."""


def on_ray(work: Work, workers: int | None) -> Iterator[Explained]:
    """What the workers find, as they find it.

    workers: by default one for each accelerator that Ray knows, or one

    Raises InputError where a worker cannot be made, or dies again and again whatever it has in hand.
    """
    hand = Hand(work.folder)
    hand.empty()
    with _connected(workers):
        try:
            for batch in _lines(work, workers).iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
                yield from map(pickle.loads, batch[_COLUMN].to_pylist())
        except ray.exceptions.RayError as error:
            raise _told(error) from error
    hand.empty()


def _lines(work: Work, workers: int | None) -> Dataset:
    """The run as Ray Data plans it: one reader, and workers for its buckets."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    with warnings.catch_warnings():
        # There is no other way to bound retries in the versions that the extra allows.
        warnings.filterwarnings("ignore", message=".*ray_remote_args_fn", category=DeprecationWarning)
        return read_datasource(_Buckets(work), override_num_blocks=1, num_cpus=0).map_batches(
            _Worker,
            fn_constructor_args=(work.method, work.max_new_tokens, work.folder),
            batch_size=1,
            compute=ActorPoolStrategy(size=workers or max(1, gpus)),
            num_gpus=1 if gpus else None,
            num_cpus=None if gpus else 1,
            ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": _TRIES},
        )


_COLUMN = "pickled"


class _Buckets(Datasource):
    """The buckets that are left, as one stream."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        work = self.work
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(lambda: map(_block, work.buckets()), unknown)]


class _Worker:
    """Explains buckets with a model of its own."""

    def __init__(self, recipe: Recipe, max_new_tokens: int, folder: Path) -> None:
        from flashtrace_plugin.runs.explain import Explainer

        self.explainer, self.hand = Explainer(recipe.made(), max_new_tokens), Hand(folder)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        found = (self.hand.explained(pickle.loads(bucket), self.explainer.lines) for bucket in batch[_COLUMN])
        return {_COLUMN: [pickle.dumps(Explained(self.explainer.fingerprint, lines)) for lines in found]}


def _block(value: Any) -> pa.Table:
    """Anything as a block of one row."""
    return pa.table({_COLUMN: pa.array([pickle.dumps(value)], pa.binary())})


@contextmanager
def _connected(workers: int | None) -> Iterator[None]:
    """Ray as it runs already, or as RAY_ADDRESS names it, or on this machine and only for this run."""
    ours = not ray.is_initialized()
    if ours:
        here = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": max(os.cpu_count() or 1, workers or 1)}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **here)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = _BLOCK
    try:
        with DataContext.current(context):
            yield
    finally:
        if ours:
            ray.shutdown()


def _told(error: BaseException) -> InputError:
    """What went wrong in the reader or a worker, in its own words if it is an error of ours."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FlashTraceError):
            return InputError(str(cause))
        cause = getattr(cause, "cause", None) or cause.__cause__
    return InputError(f"Ray could not go on: {' '.join(str(error).split())[:300]}")

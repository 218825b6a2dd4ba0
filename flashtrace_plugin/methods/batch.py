"""Several texts: the short ones of nearly one length share a forward pass, and their hops are made together.

A device idles between the small operations of one short text. What can be shared is told by the method
(:meth:`~flashtrace_plugin.methods.base.Method.recorded`) and by its source; all else goes text by text, and so do the
texts of a pass in which one failed, so that every error is that of its own text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, Union

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.core.recursion import Hop
from flashtrace_plugin.errors import FlashTraceError
from flashtrace_plugin.methods.driver import Found, Step, driving, step_of
from flashtrace_plugin.methods.task import Task
from flashtrace_plugin.text import Located, TokenizedText

if TYPE_CHECKING:
    from flashtrace_plugin.methods.base import Method

_TOKENS = 4096
"""Tokens of one pass, padding included: they fill a device, and take the memory of one text of that length."""

_LEAST = 0.75
"""The share of the longest text's tokens that a text must have to be padded to its length."""

Result = Union[Attribution, FlashTraceError]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class _Given:
    """One text of a batch, with what is explained in it; index: its place among the texts."""

    index: int
    text: TokenizedText
    where: Located


def run_batch(
    method: Method, rows: Iterable[tuple[TokenizedText | FlashTraceError, Any, Any]], progress: bool
) -> list[Result]:
    """The result of every text, or its error.

    rows: text, target and reasoning of each, or the error in the place of a text that could not be read
    """
    results: list[Any] = [caught(partial(_given, method, i, *row)) for i, row in enumerate(rows)]
    given = [one for one in results if isinstance(one, _Given)]
    alone = [one for one in given if method.recorded is None or one.text.inputs]
    together = [one for one in given if method.recorded is not None and not one.text.inputs]
    buckets = [*_buckets(together), *([one] for one in alone)]
    from tqdm.auto import tqdm

    with tqdm(total=len(results), desc=method.name, disable=not progress) as bar:
        bar.update(len(results) - len(given))
        for bucket in buckets:
            for one, result in zip(bucket, _explained(method, bucket), strict=True):
                results[one.index] = result
            bar.update(len(bucket))
    return results


def _given(
    method: Method, index: int, text: TokenizedText | FlashTraceError, target: Any, reasoning: Any
) -> _Given | FlashTraceError:
    return text if isinstance(text, FlashTraceError) else _Given(index, text, method._located(text, target, reasoning))


def caught(call: Callable[[], _Value]) -> _Value | FlashTraceError:
    """What a call gives, or the FlashTraceError that it raises."""
    try:
        return call()
    except FlashTraceError as error:
        return error


def _buckets(given: Sequence[_Given]) -> Iterable[list[_Given]]:
    """Texts that run together, longest first, so that memory that does not suffice is known at once."""
    bucket: list[_Given] = []
    for one in sorted(given, key=lambda one: -len(one.text.input_ids)):
        longest = len((bucket or [one])[0].text.input_ids)
        if bucket and ((len(bucket) + 1) * longest > _TOKENS or len(one.text.input_ids) < _LEAST * longest):
            yield bucket
            bucket = []
        bucket.append(one)
    if bucket:
        yield bucket


def _explained(method: Method, bucket: Sequence[_Given]) -> list[Result]:
    """The results of a bucket, in its order."""
    if len(bucket) > 1:
        try:
            return list(_together(method, bucket))
        except (FlashTraceError, torch.OutOfMemoryError):
            pass  # each text by itself, which tells whose error it was
    return [caught(partial(method._explained, one.text, one.where)) for one in bucket]


def _together(method: Method, bucket: Sequence[_Given]) -> Iterator[Attribution]:
    """The results of texts whose layers are read in one pass. Raises what any of them raises."""
    with method._modes() as autocast, ExitStack() as contexts:
        tasks = [method._open(one.text, one.where, contexts) for one in bucket]
        _read_ahead(method, tasks)
        begun = [method.start(task) for task in tasks]
        steps = [step_of(*one) for one in zip(begun, tasks, strict=True)]
        asking = [driving(method.name, one, task, **method._driven()) for one, task in zip(begun, tasks, strict=True)]
        each = _in_step(asking, steps)
    for one, found in zip(bucket, each, strict=True):
        yield method._put_together(one.text, one.where, found, autocast)


def _read_ahead(method: Method, tasks: Sequence[Task]) -> None:
    rows = [method.recorded(task) for task in tasks]  # type: ignore[misc]
    whole = method.source.whole_text()
    ids = [task.read_for(own, whole)[0] for task, own in zip(tasks, rows, strict=True)]
    for task, own, layers in zip(tasks, rows, method.source.layers_together(ids, rows), strict=True):
        task.read_ahead.append((own, layers))


def _in_step(asking: Sequence[Generator[Tensor, Hop, Found]], steps: Sequence[Step]) -> list[Found]:
    """What drivers find whose hops are made together, as long as each of them asks for one."""
    found: dict[int, Found] = {}
    hops: dict[int, Any] = dict.fromkeys(range(len(asking)))
    while hops:
        wanted: dict[int, Tensor] = {}
        for i, hop in hops.items():
            try:
                wanted[i] = asking[i].send(hop)
            except StopIteration as end:
                found[i] = end.value
        made = _hops([steps[i] for i in wanted], list(wanted.values())) if wanted else []
        hops = dict(zip(wanted, made, strict=True))
    return [found[i] for i in range(len(asking))]


def _hops(steps: Sequence[Step], weights: Sequence[Tensor]) -> list[Hop]:
    """The hop of each step, made together by steps that can; see :class:`~flashtrace_plugin.methods.task.FlowStep`."""
    together = getattr(steps[0], "together", None)
    if together is None:
        return [step(w) for step, w in zip(steps, weights, strict=True)]
    return list(together(steps, weights))

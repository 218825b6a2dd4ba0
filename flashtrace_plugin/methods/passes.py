"""Where the forward passes of a text come from: every call runs its own, or they are kept for the next targets."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.edits import with_edits
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.relevance.rules import AttentionRule
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.models.derive.relevance import (
    Linearised,
    Relevance,
    differentiating,
    linearised,
    state_mark,
)
from flashtrace_plugin.models.derive.runner import Runner
from flashtrace_plugin.models.read.source import Source


class Passes:
    """Forward passes as methods ask for them, each run anew."""

    def layers(self, source: Source, ids: Tensor, rows: Tensor) -> tuple[Sequence[Layer], Tensor]:
        """Layers with at least the positions ``rows`` [r], and the positions that they have; increasing.

        ids: [1, N]; what comes after the last row is run only if it may matter there
        """
        stop = ids.shape[1] if source.whole_text() else int(rows[-1]) + 1
        return with_edits(source.layers(ids[:, :stop], rows)), rows

    def linearised(
        self, source: Source, ids: Tensor, rows: Tensor, rule: AttentionRule, memory_budget: int
    ) -> AbstractContextManager[Linearised]:
        """The model linearised at the text, see :func:`~flashtrace_plugin.models.derive.relevance.linearised`."""
        return linearised(source.runner(ids), ids, rows, rule=rule, memory_budget=memory_budget)


class KeptPasses(Passes):
    """Passes of one text that are run once, for all positions from ``first`` on, and kept.

    max_bytes: that may be kept; what takes more is run again whenever it is asked for
    count:     forward passes so far
    seconds:   that they took
    """

    def __init__(self, first: int, max_bytes: int) -> None:
        self.first, self.max_bytes = first, max_bytes
        self.count, self.seconds = 0, 0.0
        self.drop()

    def drop(self) -> None:
        """Forgets what was kept."""
        self._layers: tuple[Sequence[Layer], Tensor] | None = None
        self._linearised: _Remembering | None = None
        self._mark: Any = None

    def check_model(self, model: Any) -> None:
        """Raises InputError where the model is no longer as it was when the passes were run."""
        now = None if model is None else state_mark(model)
        if self._mark is not None and now != self._mark:
            raise InputError(
                "the model's weights, hooks or attention kernel have changed since the text was recorded, so the "
                "recording is of another model; call drop() on it, or make a new one"
            )
        self._mark = now

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return _layer_bytes(self._layers) + (0 if self._linearised is None else self._linearised.nbytes)

    def layers(self, source: Source, ids: Tensor, rows: Tensor) -> tuple[Sequence[Layer], Tensor]:
        """See :class:`Passes`; positions that were not recorded yet take one more pass, for all that ever were."""
        if self._layers is not None and _covers(self._layers[1], rows):
            return self._layers
        known = torch.arange(0) if self._layers is None else self._layers[1]
        self._layers = None  # so that both are never there at once
        with self._timed():
            found = super().layers(
                source, ids, torch.cat([rows, known, torch.arange(self.first, ids.shape[1])]).unique()
            )
        self._layers = found
        self._keep_within(self._linearised)
        return found

    @contextmanager
    def linearised(
        self, source: Source, ids: Tensor, rows: Tensor, rule: AttentionRule, memory_budget: int
    ) -> Iterator[Linearised]:
        """See :class:`Passes`; of several rules, the last one's pass is kept."""
        kept = self._linearised
        if kept is not None and (kept.rule != rule or not _covers(kept.rows.cpu(), rows)):
            kept = None
        runner = source.runner(ids) if kept is None else kept.runner
        with differentiating(runner):
            yield kept or self._linearise(runner, ids, rows, rule, memory_budget)

    def _linearise(
        self, runner: Runner, ids: Tensor, rows: Tensor, rule: AttentionRule, memory_budget: int
    ) -> _Remembering:
        known = torch.arange(0) if self._linearised is None else self._linearised.rows.cpu()
        self._linearised = None
        every = torch.cat([rows, known, torch.arange(self.first, ids.shape[1] - 1)]).unique().to(ids.device)
        with self._timed():
            found = _Remembering(runner, ids.clone(), every, rule, min(memory_budget, self.max_bytes))
        self._linearised = found
        self._keep_within(found)
        return found

    def _keep_within(self, linearised: _Remembering | None) -> None:
        """Drops the layers, and then the linearisation, where both are too large."""
        if self.nbytes > self.max_bytes and linearised is not None:
            self._layers = None
        if self.nbytes > self.max_bytes:
            self._layers = self._linearised = None

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
        self.count += 1


class _Remembering(Linearised):
    """A linearised model that does not compute one relevance twice: sinks and contexts are those of many targets."""

    _most = 64

    def relevance(self, weights: Tensor, **options: Any) -> Relevance:
        known: OrderedDict[Any, Relevance] = vars(self).setdefault("known", OrderedDict())
        key = tuple((name, _hashable(value)) for name, value in sorted({"weights": weights, **options}.items()))
        if key not in known:
            known[key] = super().relevance(weights, **options)
        known.move_to_end(key)
        while len(known) > self._most:
            known.popitem(last=False)
        return known[key]


def _hashable(value: Any) -> Any:
    return (value.dtype, value.cpu().numpy().tobytes()) if isinstance(value, Tensor) else value


def _covers(known: Tensor, rows: Tensor) -> bool:
    return bool(torch.isin(rows.cpu(), known).all())


def _layer_bytes(kept: tuple[Sequence[Layer], Tensor] | None) -> int:
    """Bytes of what was recorded; weights of the model, which a layer names as well, are not counted."""
    found: dict[int, int] = {}
    for layer in () if kept is None else kept[0]:
        own = {f.name: getattr(layer, f.name) for f in fields(layer) if f.name not in ("W_O", "b_O")}
        for value in [*own.values(), *vars(layer.pattern).values()]:
            if isinstance(value, Tensor):
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(found.values())

"""What a method is given: one sequence with its spans, and the layers of the model on it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.closure import closure, closure_tolerance
from flashtrace_plugin.core.flow.edits import with_edits
from flashtrace_plugin.core.flow.hop import Shares, hops_together, one_hop, row_hops
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.recursion import Hop
from flashtrace_plugin.errors import ClosureError, UnsupportedModelError
from flashtrace_plugin.methods.passes import Passes
from flashtrace_plugin.models.read.source import Source
from flashtrace_plugin.spans import Span

_NEUTRAL = 16
"""Tokens of the prompt that serve as a neutral target: enough to ask for nothing in particular, and few enough that
their logits cost little."""


@dataclass(frozen=True)
class Task:
    """One sequence with its spans, checked.

    source:    reads the model
    input_ids: [1, N]    on the model's device
    kept:      [N] bool  tokens that may have a score
    chosen:    [N] bool  target tokens to explain
    through:   [N] bool  tokens that mass is followed through
    shift:     1 where the position to its left stands for a token, else 0
    sinks:     "keep", "report" or "drop", see the driver's option
    special:   [N] bool  tokens that begin, end or pad a text or belong to a chat template
    contexts:  closed when the call ends; for what a method holds open from its start to its last hop
    read_ahead: rows and layers that were read together with those of other texts
    passes:    where forward passes come from, see :mod:`flashtrace_plugin.methods.passes`
    """

    source: Source
    input_ids: Tensor
    prompt_length: int
    target: Span
    reasoning: Span | None
    kept: Tensor
    chosen: Tensor
    through: Tensor
    shift: int
    sinks: str = "keep"
    special: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    contexts: ExitStack = field(default_factory=ExitStack)
    recorded: list[Recorded] = field(default_factory=list)
    read_ahead: list[tuple[Tensor, list[Layer]]] = field(default_factory=list)
    passes: Passes = field(default_factory=Passes)

    @property
    def length(self) -> int:
        """Number of tokens, N."""
        return self.input_ids.shape[1]

    @cached_property
    def initial(self) -> Tensor:
        """Weights of hop 0: 1 where a target token stands. result: [N]"""
        return torch.zeros(self.length, dtype=torch.float32).index_fill(0, self.target_rows, 1.0)

    @property
    def target_rows(self) -> Tensor:
        """Positions that stand for the chosen target tokens, [m]."""
        return self.chosen.nonzero()[:, 0] - self.shift

    @property
    def rows(self) -> Tensor:
        """Positions that may carry weight in any hop, [r], increasing."""
        return (self.chosen | self.through | self.neutral).nonzero()[:, 0] - self.shift

    @cached_property
    def neutral(self) -> Tensor:
        """Tokens of a target that asks for nothing, to measure sinks by: some of the prompt's own, spread evenly.

        result: [N] bool, none unless sinks are asked for; the first token is left out, because nothing predicts it,
                and so are those of images, which nothing wrote
        """
        chosen = torch.zeros(self.length, dtype=torch.bool)
        written = torch.arange(self.length) < self.prompt_length
        written[[0, *(i for image in self.source.images(self.input_ids[0]) for i in image.positions)]] = False
        known = written.nonzero()[:, 0]
        if self.sinks != "keep" and len(known):
            at = torch.linspace(1, len(known), _NEUTRAL, dtype=torch.float32).round().long()
            chosen[known[at - 1]] = True
        return chosen

    @property
    def neutral_weights(self) -> Tensor:
        """The same as weights on the positions that stand for these tokens, [N]."""
        rows = self.neutral.nonzero()[:, 0] - self.shift
        return torch.zeros(self.length, dtype=torch.float32).index_fill(0, rows, 1.0)

    def record(self, rows: Tensor | None = None) -> Recorded:
        """Layers of the sequence; a recording that is kept for other targets may have further positions, too.

        rows: [r]  positions to read, increasing; by default those that may carry weight
        """
        rows = self.rows if rows is None else rows
        known = [layers for at, layers in self.read_ahead if torch.equal(at, rows)]
        layers, rows = (with_edits(known[0]), rows) if known else self.passes.layers(self.source, self.input_ids, rows)
        found = Recorded(layers, rows, self.length, self.source.describe().get("family", "this model"))
        self._check_causal(found)
        self.recorded.append(found)
        return found

    def read_for(self, rows: Tensor, whole: bool) -> Tensor:
        """The ids [1, n] that are run to record these rows; whole: what comes after the last may matter there."""
        return self.input_ids[:, : self.length if whole else int(rows[-1]) + 1]

    def _check_causal(self, found: Recorded) -> None:
        """Raises UnsupportedModelError where what was generated reads, or is read by, what was not there yet."""
        for layer in found.layers:
            last = getattr(layer.pattern, "last_key", None)
            if last is None:
                continue
            late = (last[: self.prompt_length] >= self.prompt_length).any() or (
                last[self.prompt_length :] > torch.arange(self.prompt_length, len(last), device=last.device)
            ).any()
            if bool(late):
                raise UnsupportedModelError(
                    f"{found.family} reads the text in both directions, also what it wrote itself, so what comes "
                    "later would count as a cause; a model that reads a prefix as a whole needs its token_type_ids "
                    "(0 for the prompt) among the inputs"
                )

    def record_all(self) -> Recorded:
        """Layers with every position up to the last that may carry weight."""
        return self.record(torch.arange(int(self.rows[-1]) + 1))


@dataclass(frozen=True)
class Recorded:
    """Layers of one sequence, with the positions [r] that may carry weight; the family is named in errors."""

    layers: Sequence[Layer]
    rows: Tensor
    length: int
    family: str

    def hop(self, weights: Tensor) -> Hop:
        """One hop of FlashTrace from weights [N] over all positions."""
        return self._hop(one_hop(self.layers, weights[self.rows], self.length))

    def _hop(self, found: Shares) -> Hop:
        self._check(found.closure_error, found.worst_layer)
        return found.mixed(torch.ones(1, dtype=torch.float32))

    def each(self, positions: Tensor) -> Shares:
        """One hop from every given position [B] by itself."""
        found = row_hops(self.layers, torch.searchsorted(self.rows, positions), self.length)
        self._check(found.closure_error, found.worst_layer)
        return found

    def closure(self, weights: Tensor) -> float:
        """How well the layers add up on the rows weighted by ``weights`` [N]. Raises ClosureError above the bound."""
        error, worst = closure(self.layers, weights[self.rows])
        self._check(error, worst)
        return error

    def _check(self, error: float, worst: int) -> None:
        bound = closure_tolerance(self.layers[0].resid_mid.dtype)
        if not error <= bound:
            raise ClosureError(
                f"{self.family}, layer {worst}: attention's parts do not add up to the residual stream "
                f"(relative gap {error:.1e}, bound {bound:.0e}). The block is not what its family's layout says, or a "
                "hook changes what lies between its heads and the stream, so any attribution of it would be wrong"
            )


@dataclass(frozen=True)
class FlowStep:
    """One hop of FlashTrace as a method's step, which several texts can make together."""

    recorded: Recorded

    def __call__(self, weights: Tensor) -> Hop:
        return self.recorded.hop(weights)

    @staticmethod
    def together(steps: Sequence[FlowStep], weights: Sequence[Tensor]) -> list[Hop]:
        """The hop of each from its weights [N]. Raises ClosureError if one of them does not close."""
        each = [step.recorded for step in steps]
        rows = [w[one.rows] for one, w in zip(each, weights, strict=True)]
        found = hops_together([one.layers for one in each], rows, [one.length for one in each])
        return [one._hop(shares) for one, shares in zip(each, found, strict=True)]

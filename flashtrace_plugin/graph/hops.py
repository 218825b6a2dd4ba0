"""Runs the hops of a graph: the answer's, then one from every step, all on one recorded forward pass."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from flashtrace_plugin.errors import CostWarning, InputError, MethodError
from flashtrace_plugin.graph.result import Graph
from flashtrace_plugin.methods.driver import Step, one_step, sink_facts, stepping
from flashtrace_plugin.methods.task import Task
from flashtrace_plugin.spans import Chars, Span
from flashtrace_plugin.text import Located, TokenizedText, Where
from flashtrace_plugin.units.contents import Content, offsets_of
from flashtrace_plugin.units.scores import REST, Unit, Units, find_units
from flashtrace_plugin.units.shares import owned_parts

if TYPE_CHECKING:
    from flashtrace_plugin.methods.base import Method

_MANY = 200
"""Steps from which on the caller is told beforehand how long it will take."""


class GraphOptions(TypedDict, total=False):
    """What else :meth:`~flashtrace_plugin.methods.base.Method.graph` takes."""

    target: Where | None
    reasoning: Where | None
    unit: Units
    step_unit: Units
    max_units: int


@dataclass(frozen=True)
class Asked:
    """A graph as it was asked for: text and spans, where the prompt's contents are, and the options."""

    text: TokenizedText
    where: Located
    contents: tuple[Content, ...]
    unit: Units
    step_unit: Units
    max_units: int

    def __post_init__(self) -> None:
        if not isinstance(self.max_units, int) or self.max_units < 1:
            raise InputError(f"max_units must be a whole number >= 1, got {self.max_units!r}")


def check_steps_are_explained(method: Method) -> None:
    """Raises MethodError for a method that cannot explain steps, InputError for mass followed elsewhere."""
    if not method.explains_steps:
        raise MethodError(
            f"the method {method.name!r} has no graph of steps, because its hops are made for one target; use "
            "FlashTrace, LRP, Recommended, ALTI, IFR or RecursiveAttribution"
        )
    if method.driving.recursion != "reasoning":
        raise InputError(
            f"the steps of a graph are those of the reasoning, so recursion={method.driving.recursion!r} says nothing "
            "about it; use recursion='reasoning', and reasoning=... for other tokens"
        )


def graph_of_steps(method: Method, task: Task, asked: Asked, facts: dict[str, Any]) -> Graph:
    """The graph of a text.

    facts: what the settings are to note beside the options

    Raises InputError for units that do not fit, and for more steps than ``max_units``.
    """
    tokens, where = asked.text.tokens, asked.where
    # A sink would count for the unit that it stands in, and every step would rest on that.
    task = replace(task, sinks="drop") if task.sinks == "report" else task
    sources = _sources(asked)
    steps = _steps(asked)
    own = _Owned.of(tokens, [*sources, *steps, _answer(tokens, where.target)], task.prompt_length)
    run = _Run(method.name, *stepping(method.name, method.start(task), task), own, len(sources), len(steps))
    masses, found = run.masses(asked.max_units)
    return Graph(
        sources=tuple(sources),
        steps=tuple(steps),
        answer=_answer(tokens, where.target),
        **masses,
        tokens=own.counts,
        pieces=tokens,
        token_ids=tuple(asked.text.input_ids.tolist()),
        prompt=Span(0, task.prompt_length),
        reasoning=where.reasoning,
        target=where.target,
        method=method.name,
        settings=_settings(method, asked) | method.source.describe() | facts | found,
        closure_error=run.closure_error,
    )


def _settings(method: Method, asked: Asked) -> dict[str, Any]:
    """The options; a graph has all hops, however many the method would make."""
    chosen = {"unit": asked.unit, "step_unit": asked.step_unit}
    named = {k: v if isinstance(v, str) else getattr(v, "__name__", type(v).__name__) for k, v in chosen.items()}
    return method.settings() | {"hops": "inf"} | named


def _sources(asked: Asked) -> list[Unit]:
    tokens = asked.text.tokens[: asked.text.prompt_length]
    contents = asked.contents or (Content(0, len("".join(tokens))),)
    return find_units(asked.unit, tokens, contents, asked.text.messages)


def _steps(asked: Asked) -> list[Unit]:
    """Units of the reasoning in its order, with what lies between the caller's as units of kind "rest"."""
    span, tokens = asked.where.reasoning, asked.text.tokens
    if span is None:
        return []
    begin, text = len("".join(tokens[: span.start])), "".join(tokens[: span.stop])
    if not text[begin:]:
        return []
    found = find_units(asked.step_unit, tokens[: span.stop], (Content(begin, len(text)),))
    wanted = [unit for unit in found if unit.content]
    outside = next((unit for unit in wanted if unit.ranges[0][0] < begin), None)
    if outside is not None:
        raise InputError(
            f"the step {outside.text[:40]!r} begins at character {outside.ranges[0][0]}, before the reasoning, which "
            f"begins at {begin}; steps must lie inside the reasoning {span}"
        )
    gaps = [chars for unit in found if unit.kind == REST for chars in unit.ranges]
    return _filled(wanted, gaps, text)


def _filled(units: Sequence[Unit], gaps: Sequence[Chars], text: str) -> list[Unit]:
    """Units and what lies between them; white space alone counts for the unit before it."""
    parts = sorted([*units, *(Unit(REST, text[a:b].strip(), ((a, b),)) for a, b in gaps)], key=lambda u: u.ranges)
    merged: list[Unit] = []
    for part in parts:
        if merged and part.kind == REST and not part.text:
            merged[-1] = replace(merged[-1], ranges=(*merged[-1].ranges, *part.ranges))
        else:
            merged.append(part)
    return merged


def _answer(tokens: Sequence[str], target: Span) -> Unit:
    begin, text = len("".join(tokens[: target.start])), "".join(tokens[target.slice])
    return Unit("answer", text.strip(), ((begin, begin + len(text)),))


@dataclass(frozen=True)
class _Owned:
    """Which unit owns how much of which token: units [parts], tokens [parts], shares [parts]; of ``size`` units."""

    unit: Tensor
    token: Tensor
    share: Tensor
    size: int

    @classmethod
    def of(cls, tokens: Sequence[str], units: Sequence[Unit], prompt_length: int) -> _Owned:
        """A token without a character of its own, as a later byte of one, belongs to what its neighbour belongs to."""
        offsets = list(_with_text(offsets_of(tokens), prompt_length))
        return cls(*owned_parts("".join(tokens), offsets, [unit.ranges for unit in units]), len(units))

    def sums(self, scores: Tensor) -> Tensor:
        """Scores of tokens as those of units. scores: [N]; result: [U] float64"""
        sums = torch.zeros(self.size, dtype=torch.float64)
        return sums.index_add(0, self.unit, scores.double()[self.token] * self.share)

    def weights(self, unit: int, length: int) -> Tensor:
        """The share of each token that a unit owns. result: [length]"""
        mine = self.unit == unit
        weights = torch.zeros(length, dtype=torch.float64).index_add(0, self.token[mine], self.share[mine])
        return weights.float()

    @property
    def counts(self) -> Tensor:
        """How many tokens each unit has. result: [U]"""
        return torch.zeros(self.size, dtype=torch.float64).index_add(0, self.unit, self.share)


def _with_text(offsets: Sequence[Chars], prompt_length: int) -> Iterator[Chars]:
    """Offsets, those of empty tokens replaced by their neighbour's in the same part, prompt or generation."""
    for part in (offsets[:prompt_length], offsets[prompt_length:]):
        known = next((chars for chars in part if chars[0] < chars[1]), (0, 0))
        for chars in part:
            known = chars if chars[0] < chars[1] else known
            yield known


@dataclass
class _Run:
    """The hops of one graph."""

    name: str
    step: Step
    task: Task
    sinks: Tensor | None
    own: _Owned
    sources: int
    steps: int
    closure_error: float = 0.0

    def masses(self, max_units: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Shares, what lies inside and what outside, as fields of a graph, and what the answer's hop noted."""
        began = time.perf_counter()
        answer = one_step(self.name, self.step, self.task.initial, self.task)
        self._check_cost(time.perf_counter() - began, max_units)
        self.closure_error = answer.closure_error or 0.0
        facts = dict(answer.facts) | ({} if self.sinks is None else sink_facts(self.sinks, answer, self.task))
        rows = [self._row(v, self._step_alpha(self.sources + v)) for v in range(self.steps)]
        rows.append(self._row(self.steps, answer.alpha * self.task.kept))
        shares, inside, outside = (torch.stack(column) for column in zip(*rows, strict=True))
        return {"shares": shares, "inside": inside, "outside": outside}, facts

    def _step_alpha(self, unit: int) -> Tensor:
        """Importance [N] for the tokens of a step; nothing for a step that is all left out."""
        task = self.task
        weights = self.own.weights(unit, task.length) * task.through
        rows = weights.nonzero()[:, 0]
        if not len(rows):
            return weights
        weights = torch.nn.functional.pad(weights[task.shift :], (0, task.shift))
        here = replace(task, target=Span(int(rows[0]), int(rows[-1]) + 1))  # so that no mass behind it goes unseen
        hop = one_step(self.name, self.step, weights, here)
        self.closure_error = max(self.closure_error, hop.closure_error or 0.0)
        return hop.alpha * task.kept

    def _row(self, v: int, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shares [S+R] of what a step or the answer rests on, the share inside itself, and that outside of all units.

        A step may end inside a token; what is behind its end in its own last token counts as inside.
        """
        mass = self.own.sums(alpha)
        before = mass[: self.sources + v]
        inside = mass[self.sources + v :].sum()
        outside = alpha.double().index_fill(0, self.own.token, 0.0).sum()
        leaving = before.sum() + outside
        total = leaving + inside
        scale = 1 / leaving if leaving > 0 else leaving
        shares = torch.nn.functional.pad(before * scale, (0, self.steps - v))
        return shares, inside / total if total > 0 else total, outside * scale

    def _check_cost(self, seconds: float, max_units: int) -> None:
        """Tells how long many steps will take. Raises InputError for too many."""
        estimate = f"{self.steps:,} steps take one hop each, about {self.steps * seconds:.0f} s here"
        if self.steps > max_units:
            raise InputError(
                f"{estimate}, and are more than max_units={max_units}; choose a coarser step_unit, such as "
                "'paragraph', or raise max_units"
            )
        if self.steps > _MANY:
            advice = "a coarser step_unit, such as 'paragraph', takes less"
            warnings.warn(f"{estimate}; {advice}", CostWarning, stacklevel=6)

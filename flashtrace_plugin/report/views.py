"""What the text can be shaded by: the total, each hop over all positions, and the components of a method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_lowercase
from typing import NamedTuple

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.report.colours import level
from flashtrace_plugin.report.marks import in_table

MAX_ROWS = 24
"""Views made of the rows of one component at most: IFR has one for each target token."""


@dataclass(frozen=True)
class View:
    """One number for each position of the text, or for the first positions of it.

    key:    what its shading classes begin with
    group:  heading of the switch that it is part of
    label:  its button
    note:   what the numbers are
    values: at most N numbers, >= 0 unless signed; the view says nothing about later positions
    whole:  sum that shares refer to, of magnitudes
    signed: whether negative numbers have a colour of their own
    """

    key: str
    group: str
    label: str
    note: str
    values: Sequence[float]
    whole: float
    signed: bool = False

    @cached_property
    def maximum(self) -> float:
        """The largest magnitude."""
        return max(map(abs, self.values))

    @property
    def where(self) -> int:
        """Position of the maximum."""
        return next(i for i, value in enumerate(self.values) if abs(value) == self.maximum)

    def shade(self, position: int) -> str:
        """Class of a position, ``key17`` or for a negative number ``key-17``; none on step 0 of the colour scale."""
        value = self.values[position] if position < len(self.values) else 0.0
        step = level(abs(value), self.maximum)
        return f"{self.key}{'-' if value < 0 else ''}{step}" if step else ""


def views_of(attribution: Attribution) -> list[View]:
    """All views of an attribution: the total first, then the hops, then the components."""
    parts = (_total(attribution), *_hops(attribution), *_components(attribution))
    return [_view(i, *part) for i, part in enumerate(parts)]


class _Part(NamedTuple):
    group: str
    label: str
    note: str
    numbers: Tensor
    signed: bool = False


def _view(index: int, group: str, label: str, note: str, numbers: Tensor, signed: bool) -> View:
    values, whole = (numbers, numbers.abs().sum()) if signed else (numbers.clamp(min=0), numbers.sum())
    return View(_key(index), group, label, note, values.tolist(), float(whole), signed)


def _key(index: int) -> str:
    """Letters only, because a step of the colour scale follows: a … z, aa … zz."""
    tens, ones = divmod(index, len(ascii_lowercase))
    return (ascii_lowercase[tens - 1] if tens else "") + ascii_lowercase[ones]


def _total(attribution: Attribution) -> _Part:
    note = "the prompt's scores" + (", all hops together" if attribution.hops > 0 else "") + _left_out(attribution)
    return _Part("Scores", "Total", note, attribution.scores_without_sinks)


def _left_out(attribution: Attribution) -> str:
    """What is not shown, in words."""
    count = len(attribution.sinks)
    if not count:
        return ""
    tokens = "1 token that draws" if count == 1 else f"{count} tokens that draw"
    return f"; without {tokens} mass whatever is explained, here {attribution.settings['sink_share']:.0%} of it"


def _hops(attribution: Attribution) -> Iterator[_Part]:
    for k, values in enumerate(attribution.hop_scores):
        if len(values) == len(attribution.tokens) and (k == 0 or values.any()):
            shown = values.index_fill(0, torch.tensor(attribution.sinks, dtype=torch.long), 0.0)
            yield _Part("Hops, over all positions", f"Hop {k}", _hop_note(k) + _left_out(attribution), shown)


def _hop_note(k: int) -> str:
    if k == 0:
        return "what the target draws on directly, over the prompt and the generated text"
    if k == 1:
        return "what the reasoning found in hop 0 draws on in turn, over the prompt and the generated text"
    return f"what the reasoning found in hop {k - 1} draws on in turn, over the prompt and the generated text"


def _components(attribution: Attribution) -> Iterator[_Part]:
    for name, values in attribution.components.items():
        if values.dim() == 1 and 0 < len(values) <= len(attribution.tokens):
            yield _component(name, values)
        elif name == "per_token" and len(values) == len(attribution.target):
            yield from _per_token(attribution, values)


_SIGNED = {
    "relevance": "what a token adds to what is explained of the target, directly, before any hop",
    "layer_relevance": "the same, at the residual stream that enters every layer and summed over the layers",
}
"""Components that have a sign by their meaning, and what they are."""


def _component(name: str, values: Tensor) -> _Part:
    """A component; one that is clearly negative somewhere is shown with its signs, whatever its name."""
    label = name.replace("_", " ").capitalize()
    note = _SIGNED.get(name, f"the component {name} of the score")
    signed = name in _SIGNED or bool(values.min() < -1e-6 * values.abs().max())
    return _Part("Components", f"{label} (signed)" if signed else label, note, values, signed)


def _per_token(attribution: Attribution, rows: Tensor) -> Iterator[_Part]:
    count = min(len(rows), MAX_ROWS)
    group = "Target tokens" if count == len(rows) else f"Target tokens, first {count} of {len(rows)}"
    for position, values in zip(list(attribution.target)[:count], rows, strict=False):
        token = in_table(attribution.tokens[position])
        yield _Part(group, token, f"what the target token {token} (position {position}) draws on by itself", values)

"""What the text can be shaded by: the total, each hop over all positions, and the components of a method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_lowercase

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
    values: at most N numbers >= 0; the view says nothing about later positions
    whole:  sum that shares refer to
    """

    key: str
    group: str
    label: str
    note: str
    values: Sequence[float]
    whole: float

    @cached_property
    def maximum(self) -> float:
        return max(self.values)

    @property
    def where(self) -> int:
        """Position of the maximum."""
        return self.values.index(self.maximum)

    def level(self, position: int) -> int:
        """Step of the colour scale at a position."""
        return level(self.values[position], self.maximum) if position < len(self.values) else 0


def views_of(attribution: Attribution) -> list[View]:
    """All views of an attribution: the total first, then the hops, then the components."""
    parts = (_total(attribution), *_hops(attribution), *_components(attribution))
    return [_view(i, *part) for i, part in enumerate(parts)]


_Part = tuple[str, str, str, Tensor]


def _view(index: int, group: str, label: str, note: str, numbers: Tensor) -> View:
    return View(_key(index), group, label, note, numbers.clamp(min=0).tolist(), float(numbers.sum()))


def _key(index: int) -> str:
    """Letters only, because a step of the colour scale follows: a … z, aa … zz."""
    tens, ones = divmod(index, len(ascii_lowercase))
    return (ascii_lowercase[tens - 1] if tens else "") + ascii_lowercase[ones]


def _total(attribution: Attribution) -> _Part:
    note = "the prompt's scores" + (", all hops together" if attribution.hops > 0 else "")
    return "Scores", "Total", note, attribution.scores


def _hops(attribution: Attribution) -> Iterator[_Part]:
    for k, values in enumerate(attribution.hop_scores):
        if len(values) == len(attribution.tokens) and (k == 0 or values.any()):
            yield "Hops, over all positions", f"Hop {k}", _hop_note(k), values


def _hop_note(k: int) -> str:
    if k == 0:
        return "what the target draws on directly, over the prompt and the generated text"
    if k == 1:
        return "what the reasoning found in hop 0 draws on in turn, over the prompt and the generated text"
    return f"what the reasoning found in hop {k - 1} draws on in turn, over the prompt and the generated text"


def _components(attribution: Attribution) -> Iterator[_Part]:
    for name, values in attribution.components.items():
        if values.dim() == 1 and 0 < len(values) <= len(attribution.tokens):
            yield "Components", name.replace("_", " ").capitalize(), f"the component {name} of the score", values
        elif name == "per_token" and len(values) == len(attribution.target):
            yield from _per_token(attribution, values)


def _per_token(attribution: Attribution, rows: Tensor) -> Iterator[_Part]:
    count = min(len(rows), MAX_ROWS)
    group = "Target tokens" if count == len(rows) else f"Target tokens, first {count} of {len(rows)}"
    for position, values in zip(list(attribution.target)[:count], rows, strict=False):
        token = in_table(attribution.tokens[position])
        yield group, token, f"what the target token {token} (position {position}) draws on by itself", values

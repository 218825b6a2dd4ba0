"""What the text can be shaded by: the total, each hop over all positions, and the components of a method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.report.marks import in_table

MAX_ROWS = 24
"""Views made of the rows of one component at most: IFR has one for each target token."""


@dataclass(frozen=True)
class View:
    """One number for each position of the text.

    group:   heading of the switch that it is part of
    label:   its button
    note:    what the numbers are
    values:  [N] float32, >= 0 unless signed; 0 where the view says nothing
    signed:  whether negative numbers have a colour of their own
    sources: whether only the prompt counts as a source, so that shares are of the prompt's contents
    """

    group: str
    label: str
    note: str
    values: Tensor
    signed: bool = False
    sources: bool = False


def views_of(attribution: Attribution) -> list[View]:
    """All views of an attribution: the total first, then the hops, then the components.

    Raises InputError for scores that are no finite numbers, of which nothing could be shown.
    """
    check_numbers(attribution)
    parts = (_total(attribution), *_hops(attribution), *_components(attribution))
    return [_view(len(attribution.tokens), part) for part in parts]


def check_numbers(attribution: Attribution) -> None:
    """Raises InputError for a result that has no tokens, or scores that are not finite or as many as its tokens."""
    if not attribution.tokens:
        raise InputError("the attribution has no tokens, so there is no text to show; was it made with token ids?")
    if len(attribution.scores) != len(attribution.prompt):
        raise InputError(
            f"the attribution has {len(attribution.scores)} scores for {len(attribution.prompt)} tokens of the "
            "prompt; was its file edited?"
        )
    for name, values in (("scores", attribution.scores), ("hop_scores", attribution.hop_scores)):
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            raise InputError(
                f"{name} holds {len(bad)} numbers that are not finite, the first at {bad[0].tolist()}; nothing could "
                "be told from its colours. Explain the text again in bfloat16 or float32"
            )


class _Part(NamedTuple):
    group: str
    label: str
    note: str
    numbers: Tensor
    signed: bool = False
    sources: bool = False


def _view(length: int, part: _Part) -> View:
    numbers = part.numbers.float()
    broken = int((~numbers.isfinite()).sum())
    note = part.note + (f"; {broken} positions have no number and count as 0" if broken else "")
    numbers = numbers.masked_fill(~numbers.isfinite(), 0.0)
    values = torch.zeros(length, dtype=torch.float32)
    values[: len(numbers)] = numbers if part.signed else numbers.clamp(min=0)
    return View(part.group, part.label, note, values, part.signed, part.sources)


def _total(attribution: Attribution) -> _Part:
    note = "the prompt's scores" + (", all hops together" if attribution.hops > 0 else "")
    if attribution.hops and attribution.reasoning is not None:
        note += "; on the reasoning, the mass that passed through it on its way"
    totals = attribution.totals
    totals[attribution.target.stop :] = 0.0
    return _Part("Scores", "Total", note, totals, sources=True)


def _hops(attribution: Attribution) -> Iterator[_Part]:
    for k, values in enumerate(attribution.hop_scores):
        if len(values) == len(attribution.tokens) and (k == 0 or values.any()):
            yield _Part("Hops", f"Hop {k}", _hop_note(k), values)


def _hop_note(k: int) -> str:
    if k == 0:
        return "what the target draws on directly, over the prompt and the generated text"
    if k == 1:
        return "what the reasoning found in hop 0 draws on in turn, over the prompt and the generated text"
    return f"what the reasoning found in hop {k - 1} draws on in turn, over the prompt and the generated text"


def _components(attribution: Attribution) -> Iterator[_Part]:
    for name, values in attribution.components.items():
        if name == "sinks":  # told by the switch of that name
            continue
        if values.dim() == 1 and 0 < len(values) <= len(attribution.tokens):
            yield _component(name, values)
        elif name == "per_token" and len(values) == len(attribution.target):
            yield from _per_token(attribution, values)


_SIGNED = {
    "relevance": "what a token adds to what is explained of the target, directly, before any hop: orange speaks for "
    "it and blue against it",
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

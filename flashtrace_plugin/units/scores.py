"""Mass of tokens added up over units of text: the answer to which sentence, message or document it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from flashtrace_plugin.errors import InputError, SpanError
from flashtrace_plugin.frames import as_frame
from flashtrace_plugin.images import ImageTokens
from flashtrace_plugin.spans import Chars, Span, occurrences
from flashtrace_plugin.units.contents import Content, offsets_of
from flashtrace_plugin.units.shares import unit_sums
from flashtrace_plugin.units.split import SPLITTERS, Splitter, sorted_apart, split

if TYPE_CHECKING:
    import pandas as pd

Units = Union[str, Splitter, Mapping[str, str], Sequence[Chars], "Sequence[Span]"]
"""Units by name, by a splitter, as named documents, or as ranges: of characters of the visible text as ``(start,
stop)``, of token positions as :class:`~flashtrace_plugin.Span`."""

TEMPLATE, SINKS, REST = "template", "sinks", "rest"
"""Kinds of the units that hold what is no content, what draws mass whatever the target, and what no unit covers."""


@dataclass(frozen=True)
class Unit:
    """A part of the visible text.

    kind:    "sentence", "message", …; "template" for what the chat template wrote, "rest" for contents that belong to
             no unit of the caller's
    text:    what it says, without white space at its ends
    ranges:  the characters of the visible text that count for it, with the white space behind it; more than one range
             for "template" and "rest"
    name:    of a document; the role of a message, or of the message that it stands in
    message: index of that message; None without messages
    """

    kind: str
    text: str
    ranges: tuple[Chars, ...]
    name: str = ""
    message: int | None = None

    @property
    def content(self) -> bool:
        """Whether somebody wrote it as content that was asked for: neither template, nor sinks, nor rest."""
        return self.kind not in (TEMPLATE, SINKS, REST)

    def __str__(self) -> str:
        return f"{self.name}: {self.text}" if self.name else self.text


@dataclass(frozen=True)
class UnitScore:
    """One unit with its numbers.

    score:   mass of its tokens
    share:   of the mass of all contents; nan for the template's unit and that of sinks, which explain nothing
    density: mass per token; long units have more mass because they are long
    """

    unit: Unit
    score: float
    share: float
    density: float


@dataclass(frozen=True, eq=False)
class UnitScores:
    """Mass over units, in the order of the text. It adds up to the mass of the tokens.

    units:  U units; those that are no content come last
    scores: [U] float32
    tokens: [U] float32   how many tokens each unit has; a token that two units share counts in parts
    """

    units: tuple[Unit, ...]
    scores: Tensor
    tokens: Tensor

    @cached_property
    def density(self) -> Tensor:
        """Mass per token. result: [U]"""
        return self.scores / self.tokens.clamp(min=torch.finfo(torch.float32).tiny)

    @cached_property
    def shares(self) -> Tensor:
        """Mass relative to that of all contents; 0 where there is none, nan for template and sinks. result: [U]"""
        outside = self._of_kind(TEMPLATE, SINKS)
        total = self.scores[~outside].sum()
        shares = self.scores / total if total else torch.zeros_like(self.scores)
        return shares.masked_fill(outside, torch.nan)

    @property
    def template_share(self) -> float:
        """Share of all mass that lies on what the chat template or the tokenizer wrote, which explains nothing."""
        total = float(self.scores.sum())
        return float(self.scores[self._of_kind(TEMPLATE)].sum()) / total if total else 0.0

    def _of_kind(self, *kinds: str) -> Tensor:
        return torch.tensor([unit.kind in kinds for unit in self.units])

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> UnitScore:
        numbers = (float(values[index]) for values in (self.scores, self.shares, self.density))
        return UnitScore(self.units[index], *numbers)

    def __iter__(self) -> Iterator[UnitScore]:
        return (self[i] for i in range(len(self)))

    def top(self, k: int = 5, *, by: str = "score") -> list[UnitScore]:
        """The k units of content that have most, best first; ties in the order of the text.

        by: "score", or "density", mass per token

        Raises InputError for another measure.
        """
        if by not in ("score", "density"):
            raise InputError(f"by must be 'score' or 'density', got {by!r}")
        values = self.scores if by == "score" else self.density
        order = [i for i in values.argsort(descending=True, stable=True).tolist() if self.units[i].content]
        return [self[i] for i in order[:k]]

    def to_frame(self) -> pd.DataFrame:
        """A row for each unit: kind, name, message, start, stop, text, tokens, score, share, density.

        Raises InputError without pandas.
        """
        return as_frame(self.to_dict()["units"])

    def _repr_html_(self) -> str:
        from flashtrace_plugin.report.displays import number, share, table, text

        top = self.top(10)
        rows = [(one.share, one.density, one.unit.name, one.unit.text) for one in top]
        written = [one for one in self if one.unit.kind == TEMPLATE and one.score]
        note = f"The chat template has {self.template_share:.1%} of all mass." if written else ""
        title = f"{len(top)} of {len(self)} units, those with most mass first"
        return table(title, {"share": share, "mass per token": number, "name": text, "text": text}, rows, note)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON; characters count in the visible text."""
        rows = [
            {
                "kind": one.unit.kind,
                "name": one.unit.name,
                "message": one.unit.message,
                "start": one.unit.ranges[0][0],
                "stop": one.unit.ranges[-1][1],
                "text": one.unit.text,
                "tokens": float(tokens),
                "score": one.score,
                "share": one.share if one.unit.kind not in (TEMPLATE, SINKS) else None,
                "density": one.density,
            }
            for one, tokens in zip(self, self.tokens.tolist(), strict=True)
        ]
        return {"units": rows}

    def __repr__(self) -> str:
        best = ", ".join(f"{one.unit.text[:40]!r} {one.share:.1%}" for one in self.top(3))
        return f"UnitScores({len(self)} units; top: {best})"


def score_units(
    units: Sequence[Unit], tokens: Sequence[str], scores: Tensor, first: int = 0, sinks: Sequence[int] = ()
) -> UnitScores:
    """Adds up the scores [n] of the tokens from position ``first`` on. Every character must belong to a unit.

    tokens: pieces of the visible text, of which ``tokens[first : first + n]`` have scores
    sinks:  positions whose mass is that of a unit of its own, whatever they stand in
    """
    # The later bytes of a character have no text of their own, and belong where it does.
    offsets = [(a if a < b else a - 1, b) for a, b in offsets_of(tokens)[first : first + len(scores)]]
    counted = torch.stack([scores.float().cpu(), torch.ones(len(scores), dtype=torch.float32)])
    drawn = torch.tensor([i - first for i in sinks], dtype=torch.long)
    apart = counted[:, drawn].sum(1, keepdim=True)
    text, ranges, drew = "".join(tokens), [unit.ranges for unit in units], bool(apart[0] > 0)  # not if dropped
    sums = unit_sums(text, offsets, ranges, counted.index_fill(1, drawn, 0.0) if drew else counted).float()
    if not drew:
        return UnitScores(tuple(units), *sums)
    own = _gathered(SINKS, text, [offsets[i] for i in drawn.tolist()])
    return UnitScores((*units, own), *torch.cat([sums, apart], dim=1))


def find_units(
    chosen: Units,
    tokens: Sequence[str],
    contents: Sequence[Content],
    messages: int = 0,
    images: Sequence[ImageTokens] = (),
) -> list[Unit]:
    """The units of the visible text of ``tokens`` from the first content on, together with template and rest.

    contents: where content is; all other characters are the template's
    messages: how many messages there were, to tell those that cannot be found
    images:   each of which is a unit, whatever is chosen

    Raises InputError for units that overlap, cut a character or cannot be found.
    """
    text = "".join(tokens)
    known = {c.message for c in contents}
    lost = [i for i in range(messages) if i not in known]
    if lost and (chosen == "message"):
        raise InputError(
            f"message {lost[0]} does not stand in the rendered prompt as it was given: the chat template dropped or "
            "rewrote it. Pass what the template writes, or ask for other units"
        )
    found = _images(images, tokens)
    contents = _beside(contents, [chars for unit in found for chars in unit.ranges])
    found += [] if chosen == "image" else _chosen(chosen, text, tokens, contents)
    filled = sorted_apart([chars for unit in found for chars in unit.ranges], len(text), "units")
    inside = [(c.start, c.stop) for c in contents]
    rest = _without(inside, filled)
    template = _without([(0, len(text))], sorted([*filled, *rest]))
    extra = [_gathered(kind, text, ranges) for kind, ranges in ((REST, rest), (TEMPLATE, template)) if ranges]
    return found + extra


def _images(images: Sequence[ImageTokens], tokens: Sequence[str]) -> list[Unit]:
    """A unit for every image, tile or video; what stands between its rows is its own."""
    offsets = offsets_of(tokens)
    edges = [(offsets[image.span.start][0], offsets[image.span.stop - 1][1]) for image in images]
    known = zip(images, edges, strict=True)
    return [Unit(image.kind, "", (chars,), f"{image.kind} {i}") for i, (image, chars) in enumerate(known)]


def _beside(contents: Sequence[Content], taken: Sequence[Chars]) -> list[Content]:
    """Contents without the characters that images take."""
    if not taken:
        return list(contents)
    return [replace(c, start=a, stop=b) for c in contents for a, b in _without([(c.start, c.stop)], taken)]


def _chosen(chosen: Units, text: str, tokens: Sequence[str], contents: Sequence[Content]) -> list[Unit]:
    if chosen == "message":
        filled = [c for c in contents if c.start < c.stop]
        return [Unit("message", text[c.start : c.stop], ((c.start, c.stop),), c.role, c.message) for c in filled]
    if isinstance(chosen, Mapping):
        return [_document(name, document, text, contents) for name, document in chosen.items()]
    if isinstance(chosen, str) and chosen not in SPLITTERS:
        raise InputError(
            f"units must be one of {', '.join(map(repr, (*SPLITTERS, 'message', 'image')))}, a splitter, named "
            f"documents {{'name': 'text'}}, or ranges, got {chosen!r}"
        )
    if callable(chosen) or isinstance(chosen, str):
        kind = chosen if isinstance(chosen, str) else getattr(chosen, "__name__", type(chosen).__name__)
        splitter = SPLITTERS[chosen] if isinstance(chosen, str) else chosen
        return [
            Unit(kind, text[a:b].strip(), ((a, b),), c.role, c.message)
            for c in contents
            for a, b in _meeting(split(text[c.start : c.stop], splitter, kind), c)
        ]
    return _given(chosen, text, tokens)


def _meeting(pieces: Sequence[Chars], content: Content) -> list[Chars]:
    """Pieces of a content in characters of the visible text, each with the white space behind it."""
    starts = [content.start, *(content.start + start for start, _ in pieces[1:])]
    return list(zip(starts, [*starts[1:], content.stop], strict=True)) if pieces else []


def _given(ranges: Sequence[Any], text: str, tokens: Sequence[str]) -> list[Unit]:
    """Units of the caller's ranges. Raises InputError for what is none, and for a span that cuts a character."""
    if not isinstance(ranges, Sequence) or not ranges:
        raise InputError(f"units must be ranges (start, stop) of characters or Spans of tokens, got {ranges!r}")
    offsets = offsets_of(tokens)
    chars = [_chars_of(one, offsets) if isinstance(one, Span) else tuple(one) for one in ranges]
    if any(len(one) != 2 or not all(isinstance(edge, int) for edge in one) for one in chars):
        raise InputError(f"units must be ranges (start, stop) of characters or Spans of tokens, got {ranges!r}")
    return [Unit("span", text[a:b], ((a, b),)) for a, b in sorted_apart(chars, len(text), "units")]


def _chars_of(span: Span, offsets: Sequence[Chars]) -> Chars:
    if span.stop > len(offsets):
        raise SpanError(f"the unit {span} ends after the last of {len(offsets)} tokens")
    cut = [i for i in (span.start, span.stop) if i < len(offsets) and offsets[i][0] == offsets[i][1]]
    if cut:
        raise InputError(
            f"the unit {span} cuts a character: token {cut[0]} holds later bytes of one that began before it; let the "
            "unit begin or end where a character does"
        )
    return offsets[span.start][0], offsets[span.stop - 1][1]


def _document(name: str, document: str, text: str, contents: Sequence[Content]) -> Unit:
    """Where a document is in the contents. Raises InputError unless it is there exactly once."""
    piece = document.strip() if isinstance(document, str) else ""
    if not piece:
        raise InputError(f"the document {name!r} must be a text that is not empty, got {document!r}")
    places = [(at, c) for c in contents for at in occurrences(text, piece, c.start, c.stop)]
    if len(places) != 1:
        how = f"occurs {len(places)} times in" if places else "is not in"
        raise InputError(
            f"the document {name!r} {how} the prompt; it must stand there once, word for word: {piece[:60]!r}"
        )
    at, content = places[0]
    return Unit("document", piece, ((at, at + len(piece)),), str(name), content.message)


def _without(whole: Sequence[Chars], taken: Sequence[Chars]) -> list[Chars]:
    """Ranges less those that are taken; both in the order of the text."""
    left = []
    for start, stop in whole:
        begin = start
        for a, b in taken:
            if a < stop and begin < b:
                if begin < a:
                    left.append((begin, a))
                begin = max(begin, b)
        if begin < stop:
            left.append((begin, stop))
    return left


def _gathered(kind: str, text: str, ranges: Sequence[Chars]) -> Unit:
    return Unit(kind, "".join(text[a:b] for a, b in ranges).strip(), tuple(ranges))

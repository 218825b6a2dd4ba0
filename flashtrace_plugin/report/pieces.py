"""The text cut into what can be shaded as one: words, sentences, messages, with what each token counts for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.report.flow import segments
from flashtrace_plugin.report.kinds import Kind, kinds_of, visible_offsets
from flashtrace_plugin.units.contents import Content
from flashtrace_plugin.units.scores import Unit, Units, find_units
from flashtrace_plugin.units.shares import owned_parts

_MIN_UNITS = 3
"""A text is shaded by units at first if the prompt has so many; else by tokens."""


@dataclass(frozen=True)
class Pieces:
    """The text as pieces, in the order of the text: units of contents, and tokens that belong to none by themselves.

    name:    of the unit, such as "sentence"
    owner:   [N] piece that each token is shown with
    parts:   (token, piece, share) of tokens that count in parts for several pieces, or not as a whole
    names:   of the pieces; documents and messages have one, others ""
    """

    name: str
    owner: Tensor
    parts: tuple[tuple[int, int, float], ...] = ()
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.owner.max()) + 1

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token, piece and share of all that counts: each [entries]."""
        whole = torch.ones(len(self.owner), dtype=torch.bool)
        whole[[token for token, _, _ in self.parts]] = False
        token = whole.nonzero()[:, 0]
        extra = torch.tensor(self.parts, dtype=torch.float64).reshape(-1, 3)
        return (
            torch.cat([token, extra[:, 0].long()]),
            torch.cat([self.owner[token], extra[:, 1].long()]),
            torch.cat([torch.ones(len(token), dtype=torch.float64), extra[:, 2]]),
        )

    def sums(self, values: Tensor) -> Tensor:
        """Scores [N] of tokens added up over pieces. result: [pieces] float64"""
        token, piece, share = self.weights
        return torch.zeros(len(self), dtype=torch.float64).index_add(0, piece, values.double()[token] * share)

    @cached_property
    def counts(self) -> Tensor:
        """How many tokens each piece has, in parts where it shares one. [pieces]"""
        return self.sums(torch.ones(len(self.owner), dtype=torch.float32))

    @cached_property
    def first(self) -> list[int]:
        """The first token that is shown with each piece. [pieces]"""
        at = torch.full((len(self),), len(self.owner), dtype=torch.long)
        return at.scatter_reduce(0, self.owner, torch.arange(len(self.owner)), "amin").tolist()

    @cached_property
    def last(self) -> list[int]:
        at = torch.zeros(len(self), dtype=torch.long)
        return at.scatter_reduce(0, self.owner, torch.arange(len(self.owner)), "amax").tolist()


def name_of(unit: Units) -> str:
    """A unit in a word, for buttons and sentences."""
    if isinstance(unit, str):
        return unit
    if isinstance(unit, dict):
        return "document"
    return getattr(unit, "__name__", "unit").strip("_")


def cuts_of(attribution: Attribution, unit: Units) -> list[Pieces]:
    """The cuts that a report offers: token, word, the unit, and where the prompt was messages, those.

    Raises InputError for units that cannot be found, as :meth:`~flashtrace_plugin.attribution.Attribution.by` does.
    """
    kinds = kinds_of(attribution)
    wanted: list[Units] = ["word", unit, *["message"] * bool(attribution.messages)]
    chosen = [one for i, one in enumerate(wanted) if one not in wanted[:i]]
    return [Pieces("token", torch.arange(len(kinds))), *(_cut(attribution, one, kinds) for one in chosen)]


def first_cut(attribution: Attribution, cuts: Sequence[Pieces], unit: Units) -> int:
    """Which cut is shown at first: that of the unit, if there are enough of it to tell apart."""
    chosen = next(i for i, cut in enumerate(cuts) if cut.name == name_of(unit))
    owners = cuts[chosen].owner[attribution.prompt.slice]
    return chosen if len(owners.unique()) >= _MIN_UNITS else 0


def _cut(attribution: Attribution, unit: Units, kinds: Sequence[Kind]) -> Pieces:
    """Units that hold content; what is of another kind, or in no unit, stands by itself."""
    found = [one for one in _units(attribution, unit) if one.content]
    tokens = attribution.tokens
    ranges = [one.ranges for one in found]
    shares: dict[int, list[tuple[float, int]]] = {}
    for u, token, share in zip(*(c.tolist() for c in owned_parts("".join(tokens), visible_offsets(tokens), ranges))):
        shares.setdefault(token, []).append((share, u))
    alone = (Kind.TEMPLATE, Kind.SINK)
    best = [-1 if kinds[i] in alone or i not in shares else max(shares[i])[1] for i in range(len(tokens))]
    keys = [b if b >= 0 else len(found) + i for i, b in enumerate(best)]
    order = _in_order(keys)
    owner = torch.tensor([order[key] for key in keys], dtype=torch.long)
    split = tuple(
        (i, order.get(u, int(owner[i])), share)  # a unit that no token is shown with counts for its neighbour
        for i, parts in shares.items()
        if kinds[i] not in alone and (len(parts) > 1 or parts[0][0] < 1)
        for share, u in parts
    )
    names = [""] * len(order)
    for u, one in enumerate(found):
        if u in order:
            names[order[u]] = one.name
    return Pieces(name_of(unit), owner, split, tuple(names) if any(names) else ())


def _in_order(keys: Iterable[int]) -> dict[int, int]:
    """Numbers from 0 on for keys in the order in which they come."""
    order: dict[int, int] = {}
    for key in keys:
        order.setdefault(key, len(order))
    return order


def _units(attribution: Attribution, unit: Units) -> Iterator[Unit]:
    """Units of the prompt and of every stretch of generated text."""
    prompt = attribution.tokens[attribution.prompt.slice]
    contents = attribution.contents or ((Content(0, len("".join(prompt))),) if "".join(prompt) else ())
    if contents:
        yield from find_units(unit, prompt, contents)
    written = tuple(_written(attribution))
    if unit == "message":
        yield from (Unit("message", "", ((c.start, c.stop),), c.role) for c in written)
    elif written:
        kind = unit if isinstance(unit, str) else "sentence"
        yield from (replace(one, name="") for one in find_units(kind, attribution.tokens, written))


def _written(attribution: Attribution) -> Iterator[Content]:
    """The stretches of generated text, each as a content of its own."""
    text, edges = "".join(attribution.tokens), [0]
    for token in attribution.tokens:
        edges.append(edges[-1] + len(token))
    for segment in segments(attribution)[1:]:
        start, stop = edges[segment.span.start], edges[segment.span.stop]
        if text[start:stop].strip():
            yield Content(start, stop, segment.part)

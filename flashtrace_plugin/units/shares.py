"""How much of each token belongs to each unit of text, so that the mass of tokens adds up over units."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from flashtrace_plugin.spans import Chars


def token_shares(text: str, offsets: Sequence[Chars], units: Sequence[Sequence[Chars]]) -> Tensor:
    """Share of each token that each unit owns; scores [N] of tokens become ``shares @ scores`` of units.

    text:    what the tokens cover
    offsets: N character ranges, one for each token
    units:   U units, each with the character ranges it fills; several where it is repeated
    result:  [U, N]

    A token belongs to the units by its characters other than white space, so that the space before a word does not
    count for what surrounds the unit; a token of white space alone belongs by all its characters.
    """
    shares = torch.zeros(len(units), len(offsets), dtype=torch.float32)
    for unit, token, share in _owned(text, offsets, units):
        shares[unit, token] += share
    return shares


def unit_sums(text: str, offsets: Sequence[Chars], units: Sequence[Sequence[Chars]], scores: Tensor) -> Tensor:
    """``token_shares(…) @ scores`` without the matrix, which for words is as wide as it is high.

    scores: [..., N];  result: [..., U] float64
    """
    unit, token, share = owned_parts(text, offsets, units)
    sums = torch.zeros(*scores.shape[:-1], len(units), dtype=torch.float64)
    return sums.index_add(-1, unit, scores.double()[..., token] * share)


def owned_parts(
    text: str, offsets: Sequence[Chars], units: Sequence[Sequence[Chars]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of :func:`token_shares` that are not 0: units, tokens, and shares in float64, each [parts]."""
    columns = list(zip(*_owned(text, offsets, units), strict=True)) or [(), (), ()]
    unit, token = (torch.tensor(column, dtype=torch.long) for column in columns[:2])
    return unit, token, torch.tensor(columns[2], dtype=torch.float64)


def unit_tokens(tokens: Sequence[str], units: Sequence[Sequence[Chars]], wanted: Sequence[bool]) -> list[list[int]]:
    """Indices of the tokens of each unit; a token in several is the largest part's, and nobody's if one is not wanted.

    tokens: pieces of the text
    wanted: for each unit, whether it may have tokens
    """
    stops = list(accumulate(len(token) for token in tokens))
    # A later byte of a character belongs to what that character belongs to.
    offsets = [(min(a, b - 1) if b else a, b) for a, b in zip([0, *stops], stops)]
    owners: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for unit, token, share in _owned("".join(tokens), offsets, units):
        owners[token].append((-share, unit))
    found: list[list[int]] = [[] for _ in units]
    for token, parts in sorted(owners.items()):
        if all(wanted[unit] for _, unit in parts):
            found[min(parts)[1]].append(token)
    return found


def _owned(text: str, offsets: Sequence[Chars], units: Sequence[Sequence[Chars]]) -> Iterator[tuple[int, int, float]]:
    """(unit, token, share of the token)"""
    owner = {i: unit for unit, ranges in enumerate(units) for a, b in ranges for i in range(a, b)}
    for token, (start, stop) in enumerate(offsets):
        visible = [i for i in range(start, stop) if not text[i].isspace()] or range(start, stop)
        counts = Counter(owner[i] for i in visible if i in owner)
        yield from ((unit, token, count / len(visible)) for unit, count in counts.items())

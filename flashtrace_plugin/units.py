"""Units of text: parts of a prompt, such as the slots of a template, and how much of each token belongs to them."""

from __future__ import annotations

from collections.abc import Sequence

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
    owner = {i: unit for unit, ranges in enumerate(units) for a, b in ranges for i in range(a, b)}
    shares = torch.zeros(len(units), len(offsets))
    for token, (start, stop) in enumerate(offsets):
        visible = [i for i in range(start, stop) if not text[i].isspace()] or range(start, stop)
        for i in visible:
            if i in owner:
                shares[owner[i], token] += 1 / len(visible)
    return shares

"""Sequences that run in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Texts:
    """Sequences that run in one forward pass, the shorter ones padded at the right, where causal models never look.

    ids:  of each sequence, [n]
    rows: [r] of each, positions that may carry weight, increasing
    """

    def __init__(self, ids: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        self.rows, self.lengths = list(rows), [len(one) for one in ids]
        # A token of the text itself, because models warn of padding ids, and some compute otherwise for them.
        longest = max(self.lengths)
        self.input_ids = torch.stack([torch.cat([one, one[-1:].expand(longest - len(one))]) for one in ids])
        self.flat_rows = torch.cat([i * longest + one for i, one in enumerate(self.rows)])

    def of_each(self, values: Tensor | None, dim: int = 0) -> Sequence[Tensor | None]:
        """Values at all rows as those of every text."""
        return [None] * len(self.rows) if values is None else values.split([len(one) for one in self.rows], dim)

"""Attention patterns that are never stored whole, and the weighted flow through them.

Everything in this package needs one primitive of the attention pattern A^h (FlashTrace, Eq. 8/10/18)::

    flow^h[j] = sum_i w_i A^h[i, j]

It is a weighted column sum, so only the rows with ``w_i != 0`` matter and each can be recomputed from the
queries and keys, used and thrown away. The cost is that of ``q k^T`` for those rows; the memory is one block
of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

BLOCK_BYTES = 4 << 20
"""Size of one block of recomputed pattern rows on a CPU, so that the softmax stays in cache."""

MIN_BLOCK_ROWS = 16
"""On long texts a block outgrows the cache rather than turn the matrix product into single rows."""

_ACCELERATOR_BLOCK_BYTES = 1 << 28
"""Size of a block on an accelerator, where large launches matter more than cache."""


def block_bytes(device: torch.device, on_cpu: int) -> int:
    """Bytes of one block of temporaries on this device."""
    return on_cpu if device.type == "cpu" else _ACCELERATOR_BLOCK_BYTES


class Pattern(Protocol):
    """One layer's attention pattern, readable row by row for the recorded positions."""

    @property
    def positions(self) -> Tensor:
        """positions: [rows]  the query positions that can be read, increasing"""
        ...

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
        """Yields ``(part, start, A)``: ``A [H, len(part), keys]`` for ``rows[part]`` and keys ``start:start+keys``."""
        ...


@runtime_checkable
class ChannelFlow(Protocol):
    """What a layer reads from without a pattern, see :mod:`.recurrence`; it has flows, but no rows that sum to 1."""

    @property
    def positions(self) -> Tensor:
        """positions: [rows]  the query positions that can be read, increasing"""
        ...

    def channel_flow(self, weights: Tensor, length: int) -> Tensor:
        """See :func:`channel_flow`."""
        ...


@dataclass(frozen=True)
class QKPattern:
    """A pattern recomputed from queries and keys.

    positions: [rows]        query positions, increasing
    q:         [H, rows, d_k]  after rotary embedding and q-norm
    k:         [H_kv, N, d_k]  after rotary embedding and k-norm, KV heads not repeated
    first_key: [N]           query i reads keys first_key[i]..i (sliding windows, chunks, padding); None: from 0
    last_key:  [N]           query i reads keys up to last_key[i] >= i (images, prefixes); None: up to itself
    scaling:   float         multiplies q k^T
    softcap:   float         scores become softcap * tanh(scores / softcap); None: no cap
    sinks:     [H]           extra logit per head that takes mass and gives no value (gpt-oss); None: no sink
    bias:      [H or 1, rows or 1, N]  added to the scores (ALiBi, arbitrary masks); None: no bias
    """

    positions: Tensor
    q: Tensor
    k: Tensor
    scaling: float
    first_key: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    last_key: Tensor | None = None

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
        """See :class:`Pattern`. ``rows`` [r] are indices into ``positions``, increasing."""
        heads, stop = self.q.shape[0], reach(self, rows)
        size = max(MIN_BLOCK_ROWS, block_bytes(self.q.device, BLOCK_BYTES) // (4 * heads * stop))
        for begin in range(0, len(rows), size):
            part = slice(begin, min(begin + size, len(rows)))
            yield part, *self._softmax(rows[part])

    def _softmax(self, rows: Tensor) -> tuple[int, Tensor]:
        queries = self.positions[rows]
        start = 0 if self.first_key is None else int(self.first_key[queries].min())
        stop = reach(self, rows)
        scores = self._scores(rows, start, stop)
        self._hide(scores, queries, start)
        if self.sinks is None:
            return start, scores.softmax(-1)
        sink = self.sinks.float()[:, None, None].expand(-1, len(rows), 1)
        return start, torch.cat([scores, sink], -1).softmax(-1)[..., :-1]

    def _scores(self, rows: Tensor, start: int, stop: int) -> Tensor:
        heads, _, width = self.q.shape
        groups = self.k.shape[0]
        q = self.q[:, rows].reshape(groups, heads // groups * len(rows), width).float()
        k = self.k[:, start:stop].float()
        scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=self.scaling)
        scores = scores.view(heads, len(rows), stop - start)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.bias is not None:
            bias = self.bias if self.bias.shape[1] == 1 else self.bias[:, rows]
            scores = scores + bias[..., start:stop].float()
        return scores

    def _hide(self, scores: Tensor, queries: Tensor, start: int) -> None:
        """Takes away, in place, what a query may not see. Only keys at the edges of a block are hidden from anyone."""
        keys = torch.arange(start, start + scores.shape[-1], device=queries.device)
        last = queries if self.last_key is None else self.last_key[queries]
        late = slice(max(0, int(last.min()) + 1 - start), None)
        scores[..., late].masked_fill_(keys[late] > last[:, None], -torch.inf)
        if self.first_key is not None:
            first = self.first_key[queries]
            early = slice(0, int(first.max()) - start)
            scores[..., early].masked_fill_(keys[early] < first[:, None], -torch.inf)


@dataclass(frozen=True)
class StoredPattern:
    """A pattern taken from the model itself, for architectures that keep their queries and keys to themselves.

    positions: [rows]        query positions, increasing
    A:         [H, rows, N]  the rows of the pattern
    """

    positions: Tensor
    A: Tensor

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
        """See :class:`Pattern`."""
        stop = int(self.positions[rows[-1]]) + 1
        yield slice(0, len(rows)), 0, self.A[:, rows, :stop].float()


def reach(pattern: Pattern | ChannelFlow, rows: Tensor) -> int:
    """One behind the last key that any of the rows [r], indices into ``pattern.positions``, increasing, reads."""
    last = pattern.last_key if isinstance(pattern, QKPattern) else None
    queries = pattern.positions[rows]
    return int(queries[-1] if last is None else last[queries].max()) + 1


def weighted_flow(pattern: Pattern, weights: Tensor, length: int) -> Tensor:
    """Weighted column sum of the attention pattern (FlashTrace, Eq. 8/10/18).

    weights: [rows]        one weight per recorded position
    result:  [H, length]   float32; keys from ``length`` on are left out and must carry no weight
    """
    rows = weights.nonzero()[:, 0]
    flow: Tensor | None = None
    for part, start, A in pattern.blocks(rows) if len(rows) else ():
        if flow is None:
            flow = A.new_zeros(A.shape[0], length)
        flow[:, start : start + A.shape[-1]] += weights[rows[part]].to(A) @ A
    if flow is None:
        raise ValueError("weighted_flow needs at least one non-zero weight")
    return flow


def channel_flow(pattern: Pattern | ChannelFlow, weights: Tensor, length: int) -> Tensor:
    """Weighted column sum with one weight per channel of a head, for heads that are gated where they are read.

    weights: [H, rows, d_h]
    result:  [H, length, d_h]   float32; :func:`weighted_flow` of every channel, at the price of one attention pass
    """
    if isinstance(pattern, ChannelFlow):
        return pattern.channel_flow(weights, length)
    rows = weights.any(-1).any(0).nonzero()[:, 0]
    flow = weights.new_zeros(weights.shape[0], length, weights.shape[-1], dtype=torch.float32)
    for part, start, A in pattern.blocks(rows):
        flow[:, start : start + A.shape[-1]] += A.mT @ weights[:, rows[part]].to(A)
    return flow


def pattern_rows(pattern: Pattern, rows: Tensor, length: int) -> Tensor:
    """The chosen rows of the pattern, for token-wise methods that need each row by itself.

    rows:   [r]             indices into ``pattern.positions``, increasing
    result: [r, H, length]  float32
    """
    out: Tensor | None = None
    for part, start, A in pattern.blocks(rows):
        if out is None:
            out = A.new_zeros(len(rows), A.shape[0], length)
        out[part, :, start : start + A.shape[-1]] = A.transpose(0, 1)
    if out is None:
        raise ValueError("pattern_rows needs at least one row")
    return out

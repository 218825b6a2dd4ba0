"""Fused attention in a linearised model, without a pattern of N x N numbers.

With the pattern frozen (rule "cp") the output is linear in the values, and its backward step is the weighted flow
of FlashTrace with a weight per channel::

    dV[j] = sum_i A[i, j] dO[i]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flashtrace_plugin.core.flow.pattern import (
    BLOCK_BYTES,
    MIN_BLOCK_ROWS,
    Pattern,
    QKPattern,
    block_bytes,
    channel_flow,
)
from flashtrace_plugin.core.relevance.nodes import scaled

_ROWS = 256


@dataclass(frozen=True)
class _MaskedPattern:
    """A pattern under any mask at all, in double precision if q is: the slower twin of QKPattern.

    q, k:      [H, rows, d_k], [H_kv, N, d_k]
    mask:      [H or 1, rows or 1, N]  bool (True: seen) or added to the scores; None: all is seen
    causal:    query i sees keys 0..i
    """

    q: Tensor
    k: Tensor
    scaling: float
    mask: Tensor | None
    causal: bool

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.q.shape[1], device=self.q.device)

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
        """See :class:`~flashtrace_plugin.core.flow.pattern.Pattern`."""
        heads, length = self.q.shape[0], self.k.shape[1]
        size = max(MIN_BLOCK_ROWS, block_bytes(self.q.device, BLOCK_BYTES) // (4 * heads * length))
        for begin in range(0, len(rows), size):
            part = slice(begin, min(begin + size, len(rows)))
            yield part, 0, self._softmax(rows[part])

    def _softmax(self, rows: Tensor) -> Tensor:
        dtype = torch.promote_types(self.q.dtype, torch.float32)
        groups = self.q.shape[0] // self.k.shape[0]
        k = self.k.to(dtype).repeat_interleave(groups, 0)
        scores = self.q[:, rows].to(dtype) @ k.mT * self.scaling
        if self.causal:
            scores.masked_fill_(torch.arange(scores.shape[-1], device=rows.device) > rows[:, None], -torch.inf)
        if self.mask is not None:
            mask = self.mask if self.mask.shape[1] == 1 else self.mask[:, rows]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1).nan_to_num_(nan=0.0)  # a query that sees nothing reads nothing


@dataclass(frozen=True)
class _Reading:
    """A mask read as one interval of keys per query, ``first_key[i]..i``, and what is added to the scores."""

    first_key: Tensor | None
    bias: Tensor | None


@dataclass
class Masks:
    """Reads each mask once: one serves every layer of its kind, and N x N comparisons cost as much as attention."""

    _known: dict[Any, tuple[Tensor, _Reading | None]] = field(default_factory=dict)

    def read(self, mask: Tensor) -> _Reading | None:
        """The reading of a mask [H or 1, N, N], or None where it is no interval that ends at its query."""
        key = (mask.data_ptr(), mask.shape, mask.stride())
        if key not in self._known:
            self._known[key] = mask, _read(mask)
        return self._known[key][1]


def _read(mask: Tensor) -> _Reading | None:
    if mask.shape[-2] != mask.shape[-1]:
        return None
    starts = [_starts(mask, start) for start in range(0, mask.shape[-1], _ROWS)]
    if any(start is None for start in starts):
        return None
    first = torch.cat([start for start in starts if start is not None])
    return _Reading(None if bool((first == 0).all()) else first, _bias(mask))


def _starts(mask: Tensor, begin: int) -> Tensor | None:
    """First key of each of the queries from ``begin`` on; None if any sees something else than an interval."""
    seen = _seen(mask[:, begin : begin + _ROWS])
    keys = torch.arange(mask.shape[-1], device=mask.device)
    queries = torch.arange(begin, begin + seen.shape[1], device=mask.device)
    first = seen[0].to(torch.uint8).argmax(-1)
    interval = (keys >= first[:, None]) & (keys <= queries[:, None])
    return first if bool((seen == interval).all()) else None


def _seen(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _bias(mask: Tensor) -> Tensor | None:
    """The mask itself, if it adds anything where it lets through."""
    if mask.dtype == torch.bool:
        return None
    added = any(bool((rows * _seen(rows)).any()) for rows in mask.split(_ROWS, 1))
    return mask if added else None


class Store:
    """Copies of tensors in one allocation: small ones that outlive large ones would leave holes in the heap.

    length: number of tensors to expect, of one shape; others are copied by themselves
    """

    def __init__(self, length: int) -> None:
        self.length, self.used = length, 0
        self._all: Tensor | None = None

    def put(self, x: Tensor) -> Tensor:
        """A copy of x, without a graph."""
        if self._all is None:
            self._all = x.new_empty(self.length, *x.shape)
        if self.used == self.length or self._all.shape[1:] != x.shape or self._all.dtype != x.dtype:
            return x.detach().clone()
        self.used += 1
        return self._all[self.used - 1].copy_(x).detach()


class FrozenPattern(Function):
    """Attention with its pattern frozen: the model's own kernel forward, ``dV = A^T dO`` backward.

    v: [B, H_kv, N, d_h];  q: [B, H, N, d_k];  k: [B, H_kv, N, d_k];  options: those of scaled_dot_product_attention

    Keeps q and k.
    """

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, q: Tensor, k: Tensor, options: dict[str, Any], masks: Masks, known: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.options, ctx.masks = options, masks
        return F.scaled_dot_product_attention(q, k, v, **options) if known is None else known.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k = ctx.saved_tensors
        flows = [_values(*item, ctx.options, ctx.masks, i) for i, item in enumerate(zip(q, k, grad))]
        return torch.stack(flows).to(grad.dtype), None, None, None, None, None


def _values(q: Tensor, k: Tensor, grad: Tensor, options: dict[str, Any], masks: Masks, item: int) -> Tensor:
    """dV of one sequence. q: [H, N, d_k]; k: [H_kv, N, d_k]; grad: [H, N, d_h]; result: [H_kv, N, d_h]"""
    mask = options.get("attn_mask")
    if mask is not None:
        mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
        mask = mask[item if len(mask) > 1 else 0]
    pattern = _pattern(q, k, mask, options, masks)
    flow = _flow(pattern, grad, k.shape[1]) if grad.dtype == torch.float64 else channel_flow(pattern, grad, k.shape[1])
    return flow if len(flow) == len(k) else flow.unflatten(0, (len(k), -1)).sum(1)


def _flow(pattern: Pattern, weights: Tensor, length: int) -> Tensor:
    """:func:`~flashtrace_plugin.core.flow.pattern.channel_flow` in double precision."""
    rows = torch.arange(weights.shape[1], device=weights.device)
    flow = weights.new_zeros(weights.shape[0], length, weights.shape[-1])
    for part, start, A in pattern.blocks(rows):
        flow[:, start : start + A.shape[-1]] += A.mT @ weights[:, rows[part]]
    return flow


def _pattern(q: Tensor, k: Tensor, mask: Tensor | None, options: dict[str, Any], masks: Masks) -> Pattern:
    scaling = options.get("scale") or q.shape[-1] ** -0.5
    causal = bool(options.get("is_causal"))
    reading = _Reading(None, None) if causal and mask is None else None
    if mask is not None and not causal:
        reading = masks.read(mask)
    if reading is None or q.dtype == torch.float64:
        return _MaskedPattern(q, k, scaling, mask, causal)
    positions = torch.arange(q.shape[1], device=q.device)
    return QKPattern(positions, q, k, scaling, first_key=reading.first_key, bias=reading.bias)


def frozen_attention(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], masks: Masks, known: Tensor | None = None
) -> Tensor:
    """Rule "cp": relevance goes through the values only (Ali et al. 2022). known: the result, if it is known."""
    return FrozenPattern.apply(v, q.detach(), k.detach(), options, masks, known)


def shared_attention(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """Rule "attn": half of the relevance of A V to each, softmax by its gradient, half of that of q k^T to each.

    Every step is linear in the incoming gradient, so the model's own fused backward is used: v gets 1/2 of its
    gradient, q and k 1/4 (AttnLRP, Achtibat et al. 2024, Eq. 13-15).
    """
    width, options = v.shape[-1], {**options, "scale": options.get("scale") or q.shape[-1] ** -0.5}
    q, k, v = scaled(q, 0.25), scaled(k, 0.25), scaled(v, 0.5)
    wide = max(width, q.shape[-1])
    if width != q.shape[-1]:  # with zeros to equal width, as kernels that never store the pattern want it
        q, k, v = (F.pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options)[..., :width]

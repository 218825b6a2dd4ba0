"""L1 proximity (FlashTrace, Eq. 4/7): how much of a target vector disappears when one contribution is removed."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtrace_plugin.core.pattern import block_bytes

BLOCK_BYTES = 1 << 20
"""Size of one block of contributions on a CPU: it is written, compared and dropped, so it should stay in cache."""


def proximity(c: Tensor, t: Tensor) -> Tensor:
    """prox(c, t) = max(0, |t|_1 - |t - c|_1).

    c:      [..., d]
    t:      [..., d]
    result: [...]     float32, positively homogeneous: prox(a c, a t) = a prox(c, t)
    """
    t, c = t.float(), c.float()
    return (t.abs().sum(-1) - (t - c).abs().sum(-1)).clamp_min(0)


def source_proximity(flow: Tensor, v: Tensor, W_O: Tensor, t: Tensor) -> Tensor:
    """Proximity of every source's contribution through every head (Eq. 6/18/19).

    The contribution of source j through head h is ``c = flow[h, j] * (v[h, j] W_O[h])``; all N·H of them would
    be N·H·d numbers, so they are made and reduced block by block.

    flow:   [B, H, N]       one set of flows per target vector
    v:      [H_kv, N, d_h]
    W_O:    [H, d_h, d]     float32, post-norm gain folded in
    t:      [B, d]          aggregated targets, float32
    result: [B, H, N]       float32
    """
    batch, heads, length = flow.shape
    group, width = heads // v.shape[0], W_O.shape[-1]
    out = flow.new_empty(flow.shape)
    norm = t.abs().sum(-1)
    block = max(16, block_bytes(t.device, BLOCK_BYTES) // (4 * width))
    projected, rest = flow.new_empty(block, width), flow.new_empty(block, width)
    for h in range(heads):
        values = v[h // group].float()
        for begin in range(0, length, block):
            part = slice(begin, min(begin + block, length))
            n = part.stop - part.start
            u = torch.mm(values[part], W_O[h], out=projected[:n])
            for b in range(batch):
                left = torch.addcmul(t[b], flow[b, h, part, None], u, value=-1, out=rest[:n])
                out[b, h, part] = norm[b] - torch.linalg.vector_norm(left, ord=1, dim=-1)
    return out.clamp_min_(0)

"""L1 proximity (FlashTrace, Eq. 4/7): how much of a target vector disappears when one contribution is removed.

Taken literally, ``|t|_1 - |t - c|_1`` subtracts two large numbers, and in float32 a contribution below a millionth
of the target drowns in their rounding. With s = sign(t) it is the same as::

    sum_m min(s_m c_m, 2 |t_m| - s_m c_m)  =  sum_m s_m c_m  -  2 sum_m relu(s_m c_m - |t_m|)

which keeps small contributions to full precision, gives exactly 0 for c = 0, and is also less work: the first sum
is linear in c, and the second needs one matrix product whose result is reduced while it is in cache, for the few
channels where a contribution can be larger than the target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.pattern import block_bytes

_BLOCK_BYTES = 1 << 20
"""Size of one block of contributions on a CPU: it is written, reduced and dropped, so it should stay in cache."""


def proximity(c: Tensor, t: Tensor) -> Tensor:
    """prox(c, t) = max(0, |t|_1 - |t - c|_1).

    c:      [..., d]
    t:      [..., d]
    result: [...]     float32, positively homogeneous: prox(a c, a t) = a prox(c, t)
    """
    t, c = t.float(), c.float()
    along = c * _sign(t)
    return torch.minimum(along, 2 * t.abs() - along).sum(-1).clamp_min(0)


def source_proximity(flow: Tensor, v: Tensor, W_O: Tensor, t: Tensor) -> Tensor:
    """Proximity of every source's contribution through every head (Eq. 6/18/19).

    The contribution of source j through head h is ``c = flow[h, j] * (v[h, j] W_O[h])``; all N·H of them would
    be N·H·d numbers, so they are made and reduced block by block.

    flow:   [B, H, N]       one set of flows per target vector
    v:      [H_kv, N, d_h]  or [B, H_kv, N, d_h], where every target vector is of another text
    W_O:    [H, d_h, d]     float32, post-norm gain folded in
    t:      [B, d]          aggregated targets, float32
    result: [B, H, N]       float32
    """
    if v.dim() == 3:
        return torch.stack([_one_target(f, v, W_O, target) for f, target in zip(flow, t, strict=True)])
    size = max(1, block_bytes(t.device, _BLOCK_BYTES) // (4 * flow.shape[-1] * t.shape[-1]))
    parts = zip(flow.split(size), v.split(size), t.split(size), strict=True)
    return torch.cat([_of_texts(f, own, W_O, targets) for f, own, targets in parts])


def _one_target(flow: Tensor, v: Tensor, W_O: Tensor, t: Tensor) -> Tensor:
    """flow: [H, N], t: [d] -> [H, N]"""
    heads, length = flow.shape
    group, width = heads // v.shape[0], len(t)
    size = max(16, block_bytes(t.device, _BLOCK_BYTES) // (4 * width))
    block = t.new_empty(min(size, length) * width)
    along, below = W_O * _sign(t), -t.abs()
    reach = along.norm(dim=1)
    out = torch.empty_like(flow)
    for h in range(heads):
        z = flow[h, :, None] * v[h // group].float()
        linear, longest = z @ along[h].sum(-1), z.norm(dim=1)
        for begin in range(0, length, size):
            part = slice(begin, min(begin + size, length))
            live = _live(reach[h] * longest[part].max(), below)
            bound, rows = below[live], part.stop - begin
            into = block[: rows * len(bound)].view(rows, len(bound))
            over = torch.addmm(bound, z[part], along[h][:, live], out=into)
            out[h, part] = linear[part] - 2 * over.relu_().sum(-1)
    return out.clamp_min_(0)


def _of_texts(flow: Tensor, v: Tensor, W_O: Tensor, t: Tensor) -> Tensor:
    """flow: [B, H, N], v: [B, H_kv, N, d_h], t: [B, d] -> [B, H, N], as :func:`_one_target` for each of B texts"""
    if len(flow) == 1:
        return _one_target(flow[0], v[0], W_O, t[0])[None]  # which leaves out channels that cannot matter
    group, out = flow.shape[1] // v.shape[1], torch.empty_like(flow)
    sign, below = _sign(t)[:, None], -t.abs()[:, None]
    for h in range(flow.shape[1]):
        along = W_O[h] * sign
        z = flow[:, h, :, None] * v[:, h // group].float()
        over = torch.baddbmm(below, z, along)
        out[:, h] = (z @ along.sum(-1, keepdim=True))[..., 0] - 2 * over.relu_().sum(-1)
    return out.clamp_min_(0)


def _live(reach: Tensor, below: Tensor) -> Tensor | slice:
    """Channels where a contribution may exceed the target, none being larger than ``reach`` [d] (Cauchy-Schwarz).

    They are few, because one source of many brings little of the target; in the others the second sum is exactly 0.
    An accelerator is not asked, for the answer would have to be waited for.
    """
    return (1.001 * reach > -below).nonzero()[:, 0] if below.device.type == "cpu" else slice(None)


def _sign(t: Tensor) -> Tensor:
    return torch.where(t >= 0, 1.0, -1.0).to(t.dtype)  # two numbers make a tensor of the default type

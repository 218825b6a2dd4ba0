"""One hop of FlashTrace: from weights over positions to importance over positions (Eq. 5-8, 16-21)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.flow.pattern import channel_flow, pattern_rows, weighted_flow
from flashtrace_plugin.core.flow.proximity import proximity, source_proximity

ROW_BLOCK = 32
"""Token-wise methods handle this many target rows at a time: [ROW_BLOCK, H, N] is the largest thing they hold."""


@dataclass(frozen=True)
class Hop:
    """Shares of one hop, one per target vector (B = 1 unless the method is token-wise).

    alpha:           [B, N]     sum of the token shares over layers
    head_shares:     [B, L, H]
    residual_shares: [B, L]
    mlp_shares:      [B, L]     Eq. 21, reported beside the token scores
    closure_error:   float      largest relative gap of the decomposition over layers
    worst_layer:     int        the layer with that gap
    """

    alpha: Tensor
    head_shares: Tensor
    residual_shares: Tensor
    mlp_shares: Tensor
    closure_error: float
    worst_layer: int


@dataclass(frozen=True)
class _LayerShares:
    tokens: Tensor
    heads: Tensor
    residual: Tensor
    mlp: Tensor
    gap: Tensor


def one_hop(layers: Sequence[Layer], weights: Tensor, length: int) -> Hop:
    """Attributes the weighted sum of rows, as one vector, to all positions.

    weights: [rows]   w_i >= 0 over the recorded positions, at least one non-zero
    length:  N        scores of positions after the last weighted one are exactly 0
    """
    stop = _last_position(layers[0], weights) + 1
    return _assemble((_aggregate_shares(layer, weights, stop) for layer in layers), length, stop)


def row_hops(layers: Sequence[Layer], rows: Tensor, length: int) -> Hop:
    """Attributes every chosen row by itself: the token-wise method that FlashTrace aggregates away (Eq. 30).

    rows: [B]   indices into the recorded positions, increasing
    The cost is B times that of the proximity in :func:`one_hop`; the flow costs the same.
    """
    blocks = [_row_block(layers, part, length) for part in rows.split(ROW_BLOCK)]
    worst = max(blocks, key=lambda b: b.closure_error)
    return replace(
        worst,
        alpha=torch.cat([b.alpha for b in blocks]),
        head_shares=torch.cat([b.head_shares for b in blocks]),
        residual_shares=torch.cat([b.residual_shares for b in blocks]),
        mlp_shares=torch.cat([b.mlp_shares for b in blocks]),
    )


def _row_block(layers: Sequence[Layer], rows: Tensor, length: int) -> Hop:
    stop = int(layers[0].pattern.positions[rows[-1]]) + 1

    def shares(layer: Layer) -> _LayerShares:
        if layer.z_gate is not None:  # the gate makes v W_O differ from row to row
            return _joined([_aggregate_shares(layer, w, stop) for w in torch.eye(len(layer.resid_pre))[rows]])
        here = rows.to(layer.v.device)
        weights = torch.nn.functional.one_hot(here, len(layer.resid_pre)).float()
        w = layer.attention_weights(weights)
        flow = pattern_rows(layer.pattern, here, stop) * w.sum(-1)[:, None, None]
        return _layer_shares(layer, weights, w, flow, layer.v[:, :stop])

    return _assemble(map(shares, layers), length, stop)


def _aggregate_shares(layer: Layer, weights: Tensor, stop: int) -> _LayerShares:
    """Shares of one layer in the weighted sum of rows. weights: [rows]"""
    weights = weights.to(layer.v.device)
    w = layer.attention_weights(weights)
    if layer.z_gate is None:
        flow, v = weighted_flow(layer.pattern, w, stop), layer.v[:, :stop]
    else:
        through = channel_flow(layer.pattern, w[:, None] * layer.z_gate.float(), stop)
        v = through * layer.v[:, :stop].float().repeat_interleave(len(through) // len(layer.v), 0)
        flow = v.new_ones(v.shape[:2])
    return _layer_shares(layer, weights[None], w[None], flow[None], v)


def _joined(rows: Sequence[_LayerShares]) -> _LayerShares:
    return _LayerShares(
        tokens=torch.cat([row.tokens for row in rows]),
        heads=torch.cat([row.heads for row in rows]),
        residual=torch.cat([row.residual for row in rows]),
        mlp=torch.cat([row.mlp for row in rows]),
        gap=torch.stack([row.gap for row in rows]).max(),
    )


def _layer_shares(layer: Layer, weights: Tensor, w: Tensor, flow: Tensor, v: Tensor) -> _LayerShares:
    """Shares of one layer. weights, w: [B, rows]; flow: [B, H, stop]; v: [H_kv, stop, d_h]; Eq. 16-21."""
    t = _row_sum(weights, layer.resid_mid)
    r = _row_sum(weights, layer.resid_pre)
    u = _row_sum(weights, layer.resid_post)
    W_O = layer.output_map()
    heads = source_proximity(flow, v, W_O, t)
    residual = proximity(r, t)
    total = heads.sum((1, 2)) + residual
    total = torch.where(total > 0, total, 1.0)
    mlp, bypass = proximity(u - t, u), proximity(t, u)
    gap = _closure_gap(layer, w, flow, v, W_O, t, r)
    return _LayerShares(
        tokens=heads.sum(1) / total[:, None],
        heads=heads.sum(2) / total[:, None],
        residual=residual / total,
        mlp=mlp / torch.where(mlp + bypass > 0, mlp + bypass, 1.0),
        gap=gap,
    )


def _closure_gap(layer: Layer, w: Tensor, flow: Tensor, v: Tensor, W_O: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """How far the parts are from the whole: |t - r - sum_h sum_j c^h_j - bias|_1 over the size of the write.

    It costs O(N d) because sum_j c^h_j = (flow^h v^h) W_O^h, and checks every weighted row at once. The floor
    absorbs the rounding of the residual stream itself where attention writes next to nothing.
    """
    group = flow.shape[1] // v.shape[0]
    z = torch.einsum("bgqj,gjd->bgqd", flow.unflatten(1, (-1, group)), v.float()).flatten(1, 2)
    parts = torch.einsum("bhd,hdm->bm", z, W_O) + w.sum(-1)[:, None] * layer.output_bias()
    write = (t - r).abs().sum(-1)
    return ((t - r - parts).abs().sum(-1) / (write + closure_floor(layer) * t.abs().sum(-1))).max()


def closure_floor(layer: Layer) -> float:
    """The share of the stream below which an attention write drowns in the stream's own rounding."""
    return {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 5e-2}.get(layer.resid_mid.dtype, 0.25)


def closure_tolerance(dtype: torch.dtype) -> float:
    """Largest closure error that rounding explains, by the model's dtype."""
    return {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3}.get(dtype, 2e-2)


def _row_sum(weights: Tensor, resid: Tensor) -> Tensor:
    return weights @ resid.float()


def _last_position(layer: Layer, weights: Tensor) -> int:
    return int(layer.pattern.positions[weights.nonzero()[-1, 0]])


def _assemble(layers: Iterable[_LayerShares], length: int, stop: int) -> Hop:
    shares = list(layers)

    def stack(name: str) -> Tensor:
        return torch.stack([getattr(s, name).cpu() for s in shares], 1)

    gaps = torch.stack([s.gap.cpu() for s in shares])
    return Hop(
        alpha=torch.nn.functional.pad(stack("tokens").sum(1), (0, length - stop)),
        head_shares=stack("heads"),
        residual_shares=stack("residual"),
        mlp_shares=stack("mlp"),
        closure_error=float(gaps.max()),
        worst_layer=int(gaps.argmax()),
    )

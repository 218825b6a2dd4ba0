"""Whether the parts of a layer add up to its residual stream: the proof that a model was read correctly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.flow.pattern import channel_flow, reach, weighted_flow
from flashtrace_plugin.core.flow.recurrence import softmax_pattern


def closure(layers: Sequence[Layer], weights: Tensor) -> tuple[float, int]:
    """Largest closure gap of the weighted rows over layers, and the layer that has it.

    weights: [rows]   w_i >= 0 over the recorded positions, at least one non-zero

    It costs one weighted flow per layer; a hop computes the same gaps on its way.
    """
    stop = last_read(layers, weights.nonzero()[:, 0])
    gaps = torch.cat([_gap(layer, weights.to(layer.v.device), stop).cpu() for layer in layers])
    return float(gaps.max()), int(gaps.argmax())


def _gap(layer: Layer, weights: Tensor, stop: int) -> Tensor:
    w = layer.attention_weights(weights)
    flow, v = read_values(layer, w, stop)
    t, r = row_sum(weights[None], layer.resid_mid), row_sum(weights[None], layer.resid_pre)
    attention = closure_gap(layer, w[None], flow[None], v, layer.output_map(), t, r)
    return torch.maximum(attention, mlp_gap(layer, weights[None], t))


def read_values(layer: Layer, w: Tensor, stop: int) -> tuple[Tensor, Tensor]:
    """Weighted flow [H, stop] and the values [H or H_kv, stop, d_h] it carries; heads gated where they read have
    one flow per channel, which is folded into their values. w: [rows] as attention sees them"""
    if layer.z_gate is None:
        return weighted_flow(softmax_pattern(layer.pattern), w, stop), layer.v[:, :stop]
    through = channel_flow(layer.pattern, w[:, None] * layer.z_gate.float(), stop)
    v = through * layer.v[:, :stop].float().repeat_interleave(len(through) // len(layer.v), 0)
    return v.new_ones(v.shape[:2]), v


def closure_gap(layer: Layer, w: Tensor, flow: Tensor, v: Tensor, W_O: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """How far the parts are from the whole: |t - r - sum_h sum_j c^h_j - bias|_1 over the size of the write. [B]

    It costs O(N d) because sum_j c^h_j = (flow^h v^h) W_O^h, and checks every weighted row at once. The floor
    absorbs the rounding of the residual stream itself where attention writes next to nothing.
    """
    group = flow.shape[1] // v.shape[-3]
    z = (flow.unflatten(1, (-1, group)) @ v.float()).flatten(1, 2)
    parts = torch.einsum("bhd,hdm->bm", z, W_O) + w.sum(-1)[:, None] * layer.output_bias()
    write = (t - r).abs().sum(-1)
    return (t - r - parts).abs().sum(-1) / (write + closure_floor(layer) * t.abs().sum(-1))


def mlp_gap(layer: Layer, weights: Tensor, t: Tensor) -> Tensor:
    """How far stream, MLP and edits are from the layer's output, over the size of what the MLP writes.

    weights: [B, rows]; t: [B, d], the weighted stream after attention; result: [B]
    """
    u, m = row_sum(weights, layer.resid_post), row_sum(weights, layer.mlp_out)
    e = 0.0 if layer.edit is None else row_sum(weights, layer.edit)
    return (u - t - m - e).abs().sum(-1) / (m.abs().sum(-1) + closure_floor(layer) * u.abs().sum(-1))


def closure_floor(layer: Layer) -> float:
    """The share of the stream below which an attention write drowns in the stream's own rounding."""
    return {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 5e-2}.get(layer.resid_mid.dtype, 0.25)


def closure_tolerance(dtype: torch.dtype) -> float:
    """Largest closure error that rounding explains, by the model's dtype."""
    return {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3}.get(dtype, 2e-2)


def row_sum(weights: Tensor, resid: Tensor) -> Tensor:
    """Weighted sum of rows in float32. weights: [B, rows]; resid: [rows, d] or [B, rows, d]; result: [B, d]"""
    return weights @ resid.float() if resid.dim() == 2 else (weights[:, None] @ resid.float())[:, 0]


def last_read(layers: Sequence[Layer], rows: Tensor) -> int:
    """One behind the last position that any layer reads from the rows [r], increasing."""
    return max(reach(layer.pattern, rows) for layer in layers)

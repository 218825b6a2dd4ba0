"""HETA's gate: how much attention-weighted value flow from each position ends at the target (HETA, M_T).

Phi^(l,h)(i -> T) is the attention rollout of Abnar & Zuidema restricted to paths that end at the target, and

    M[i] ∝ sum_l sum_h Phi^(l,h)(i -> T) * |v^h_i W_O^h|_1 ,   sum_i M[i] = 1.

The paper leaves the rollout's treatment of heads open, so there are two readings, :func:`flow_mass` and
:func:`per_head_mass`. Both return the unnormalised mass by layer and head. What a norm after attention does
to a write (gain and 1/rms) belongs to the write and scales the mass; the rollout itself mixes plain patterns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.flow.pattern import Pattern, weighted_flow
from flashtrace_plugin.core.flow.recurrence import softmax_pattern


def flow_mass(layers: Sequence[Layer], weights: Tensor) -> Tensor:
    """One sweep from the top in which heads mix after every layer::

        rho^(L)    = weights
        flow^(l,h) = weighted attention flow of layer l with weights rho^(l)
        rho^(l-1)  = 1/2 rho^(l) + 1/2 mean_h flow^(l,h)

    weights: [N]        on the positions that predict the target; all N positions are recorded
    result:  [L, H, N]  flow^(l,h)[i] |v^h_i W_O^h|_1, float32
    """
    rho, mass = weights.float(), []
    for layer in reversed(layers):
        rho = rho.to(layer.v.device)
        pattern = softmax_pattern(layer.pattern)
        flow = weighted_flow(pattern, rho, len(rho))
        scaled = layer.attention_weights(rho)
        written = flow if scaled is rho else weighted_flow(pattern, scaled, len(rho))
        mass.append((written * _value_norms(layer, len(rho))).cpu())
        rho = (rho + flow.mean(0)) / 2
    return torch.stack(mass[::-1])


def per_head_mass(layers: Sequence[Layer], weights: Tensor) -> Tensor:
    """One rollout per head index, heads never mixing: Phi^(l,h) = weights · R_l, R_l = (1/2 A_l + 1/2 I) R_{l-1}.

    R_l is built from the bottom, but its rows are wanted only for the target, so a row vector per starting
    layer is pushed down instead; all of them go through a layer's pattern together.

    weights: [N]        on the positions that predict the target; all N positions are recorded
    result:  [L, H, N]  Phi^(l,h)[i] |v^h_i W_O^h|_1, float32
    """
    heads, length = layers[0].n_heads, len(weights)
    rows = torch.empty(0, heads, length, dtype=torch.float32)
    for layer in reversed(layers):
        device = layer.v.device
        start = layer.attention_weights(weights.float().to(device)).expand(1, heads, length)
        rows = torch.cat([start, rows.to(device)])
        rows = (rows + _stacked_flow(softmax_pattern(layer.pattern), rows)) / 2
    norms = torch.stack([_value_norms(layer, length).to(rows.device) for layer in layers])
    return (rows * norms).cpu()


def _stacked_flow(pattern: Pattern, weights: Tensor) -> Tensor:
    """Weighted column sums of the pattern for several weights, each by head: sum_i w^{s,h}_i A^h[i, j].

    weights, result: [S, H, N]   float32; all N positions are recorded
    """
    flow = torch.zeros_like(weights)
    every = torch.arange(weights.shape[-1], device=weights.device)
    for part, start, A in pattern.blocks(every):
        flow[..., start : start + A.shape[-1]] += torch.einsum("shr,hrk->shk", weights[..., part], A)
    return flow


def _value_norms(layer: Layer, length: int) -> Tensor:
    """|v^h_i W_O^h|_1 for the first values that attention reads, post-norm gain folded in. result: [H, length]"""
    W_O = layer.output_map()
    group = layer.n_heads // layer.v.shape[0]
    norms = [(layer.v[h // group, :length].float() @ W_O[h]).abs().sum(-1) for h in range(layer.n_heads)]
    return torch.stack(norms)


def normalised(mass: Tensor) -> Tensor:
    """mass / sum(mass); zeros stay zeros."""
    total = mass.sum()
    return mass / total if total > 0 else mass

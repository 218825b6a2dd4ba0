"""Span-wise rollout: weights go down through the layers, divided by how near each contribution is to what it builds.

    t = sum_i rho_i m_i ;  e_j = sum_h prox(flow^h[j] v^h_j W_O^h, t) ;  r_i = prox(rho_i x_i, t)
    rho_below[j] = ( e_j + r_j ) / ( sum e + sum r )

ALTI's aggregation (Ferrando et al. 2022) with the span trick: one weighted flow and one projection per layer, whatever
the number of weighted positions. Mass 1 is kept on the way, but for the shares of edits of the stream, which no
position has brought there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.closure import read_values
from flashtrace_plugin.core.flow.edits import unedited
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.flow.pattern import weighted_flow
from flashtrace_plugin.core.flow.proximity import proximity, source_proximity
from flashtrace_plugin.core.flow.recurrence import softmax_patterns

PARKED = 10.0
"""A position is a sink of attention if all queries together read it this many times as often as an even share."""


def span_rollout(layers: Sequence[Layer], weights: Tensor, sinks: Tensor) -> Tensor:
    """The weights at the embeddings.

    layers:  with all of n positions recorded
    weights: [n]       at the top, at least one above 0
    sinks:   [n] bool  positions that pass nothing on: what they would take is divided among the others
    result:  [n]       sum 1 without edits, float32 on the CPU
    """
    rho, kept = weights.float() / weights.sum(), 1.0
    for layer in reversed(layers):
        rho = unedited(layer, rho.to(layer.v.device))
        kept *= 1.0 if layer.edit is None else float(rho.sum())
        if not kept:
            break
        rho = _below(layer, rho, sinks.to(layer.v.device))
    return rho.cpu() * kept


def _below(layer: Layer, rho: Tensor, sinks: Tensor) -> Tensor:
    flow, v = read_values(layer, layer.attention_weights(rho), len(rho))
    t = (rho @ layer.resid_mid.float())[None]
    taken = source_proximity(flow[None], v, layer.output_map(), t)[0].sum(0)
    taken = (taken + proximity(rho[:, None] * layer.resid_pre.float(), t)).masked_fill(sinks, 0.0)
    total = taken.sum()
    return taken / torch.where(total > 0, total, 1.0)


def attention_sinks(layers: Sequence[Layer], length: int) -> Tensor:
    """Positions on which attention parks: read far more often than others by the first queries together.

    layers: with all of n positions recorded
    length: how many queries count
    result: [n] bool

    Recurrences are not asked, since their coefficients are no shares of a query's attention.
    """
    n = len(layers[0].resid_pre)
    mass = torch.zeros(n, dtype=torch.float32)
    for pattern in (pattern for layer in layers for pattern in softmax_patterns(layer.pattern)):
        even = (torch.arange(n, device=pattern.positions.device) < length).float() / length
        mass += weighted_flow(pattern, even, n).mean(0).cpu()
    return mass > PARKED * mass.sum() / length

"""One hop of FlashTrace: from weights over positions to importance over positions (Eq. 5-8, 16-21)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.closure import closure_gap, last_read, mlp_gap, read_values, row_sum
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.flow.pattern import pattern_rows
from flashtrace_plugin.core.flow.proximity import proximity, source_proximity
from flashtrace_plugin.core.flow.recurrence import softmax_pattern
from flashtrace_plugin.core.flow.stack import stackable, stacked
from flashtrace_plugin.core.recursion import Hop

_ROW_BLOCK = 32
"""Token-wise methods handle this many target rows at a time: [ROW_BLOCK, H, N] is the largest thing they hold."""


@dataclass(frozen=True)
class Shares:
    """What one pass over the layers finds, for each of B target vectors (B = 1 unless the method is token-wise).

    alpha:           [B, N]     sum of the token shares over layers
    head_shares:     [B, L, H]
    residual_shares: [B, L]
    mlp_shares:      [B, L]     Eq. 21, reported beside the token scores
    edit_shares:     [B, L]     share of what something else put into the layer's output; None: nothing did
    gaps:            [B, L]     relative gap of the decomposition
    """

    alpha: Tensor
    head_shares: Tensor
    residual_shares: Tensor
    mlp_shares: Tensor
    edit_shares: Tensor | None
    gaps: Tensor

    @property
    def closure_error(self) -> float:
        """The largest gap."""
        return float(self.gaps.max())

    @property
    def worst_layer(self) -> int:
        """The layer with the largest gap."""
        return int(self.gaps.max(0).values.argmax())

    def of(self, row: int, length: int) -> Shares:
        """Those of one target vector, over its first positions."""
        one = slice(row, row + 1)
        parts = {name: None if value is None else value[one] for name, value in vars(self).items()}
        return Shares(**parts | {"alpha": self.alpha[one, :length]})  # type: ignore[arg-type]

    def mixed(self, weights: Tensor) -> Hop:
        """The weighted mean of the B rows as one hop. weights: [B], sum 1"""
        return Hop(
            alpha=weights @ self.alpha,
            head_shares=torch.einsum("b,blh->lh", weights, self.head_shares),
            residual_shares=weights @ self.residual_shares,
            mlp_shares=weights @ self.mlp_shares,
            edit_shares=None if self.edit_shares is None else weights @ self.edit_shares,
            closure_error=self.closure_error,
        )


@dataclass(frozen=True)
class _LayerShares:
    tokens: Tensor
    heads: Tensor
    residual: Tensor
    mlp: Tensor
    edit: Tensor
    gap: Tensor


def one_hop(layers: Sequence[Layer], weights: Tensor, length: int) -> Shares:
    """Attributes the weighted sum of rows, as one vector, to all positions.

    weights: [rows]   w_i >= 0 over the recorded positions, at least one non-zero
    length:  N        scores of positions after the last that a weighted one reads are exactly 0
    """
    stop = last_read(layers, weights.nonzero()[:, 0])
    return _assemble(layers, [_aggregate_shares(layer, weights, stop) for layer in layers], length, stop)


def row_hops(layers: Sequence[Layer], rows: Tensor, length: int) -> Shares:
    """Attributes every chosen row by itself: the token-wise method that FlashTrace aggregates away (Eq. 30).

    rows: [B]   indices into the recorded positions, increasing
    The cost is B times that of the proximity in :func:`one_hop`; the flow costs the same.
    """
    blocks = [_row_block(layers, part, length) for part in rows.split(_ROW_BLOCK)]
    parts = {
        name: None if value is None else torch.cat([getattr(block, name) for block in blocks])
        for name, value in vars(blocks[0]).items()
    }
    return Shares(**parts)  # type: ignore[arg-type]


def hops_together(texts: Sequence[Sequence[Layer]], weights: Sequence[Tensor], lengths: Sequence[int]) -> list[Shares]:
    """:func:`one_hop` of several texts through one model, layer by layer at once.

    texts:   layers of each;  weights: [rows] of each;  lengths: N of each
    """
    if not all(stackable(layers) for layers in texts):
        return [one_hop(*each) for each in zip(texts, weights, lengths, strict=True)]
    shares = []
    for layer, w in (stacked(own, weights) for own in zip(*texts, strict=True)):
        through = layer.attention_weights(w)
        shares.append(_layer_shares(layer, w, through, layer.pattern.flow(through), layer.v))
    stop = shares[0].tokens.shape[1]
    found = _assemble(texts[0], shares, max(stop, *lengths), stop)
    return [found.of(i, length) for i, length in enumerate(lengths)]


def _row_block(layers: Sequence[Layer], rows: Tensor, length: int) -> Shares:
    stop = last_read(layers, rows)

    def shares(layer: Layer) -> _LayerShares:
        if layer.z_gate is not None:  # the gate makes v W_O differ from row to row
            ones = torch.eye(len(layer.resid_pre), dtype=torch.float32)[rows]
            return _joined([_aggregate_shares(layer, w, stop) for w in ones])
        here = rows.to(layer.v.device)
        weights = torch.nn.functional.one_hot(here, len(layer.resid_pre)).float()
        w = layer.attention_weights(weights)
        flow = pattern_rows(softmax_pattern(layer.pattern), here, stop) * w.sum(-1)[:, None, None]
        return _layer_shares(layer, weights, w, flow, layer.v[:, :stop])

    return _assemble(layers, [shares(layer) for layer in layers], length, stop)


def _aggregate_shares(layer: Layer, weights: Tensor, stop: int) -> _LayerShares:
    """Shares of one layer in the weighted sum of rows. weights: [rows]"""
    weights = weights.to(layer.v.device)
    w = layer.attention_weights(weights)
    flow, v = read_values(layer, w, stop)
    return _layer_shares(layer, weights[None], w[None], flow[None], v)


def _joined(rows: Sequence[_LayerShares]) -> _LayerShares:
    return _LayerShares(
        tokens=torch.cat([row.tokens for row in rows]),
        heads=torch.cat([row.heads for row in rows]),
        residual=torch.cat([row.residual for row in rows]),
        mlp=torch.cat([row.mlp for row in rows]),
        edit=torch.cat([row.edit for row in rows]),
        gap=torch.cat([row.gap for row in rows]),
    )


def _layer_shares(layer: Layer, weights: Tensor, w: Tensor, flow: Tensor, v: Tensor) -> _LayerShares:
    """Shares of one layer. weights, w: [B, rows]; flow: [B, H, stop]; v: [(B,) H_kv, stop, d_h]; Eq. 16-21."""
    t = row_sum(weights, layer.resid_mid)
    r = row_sum(weights, layer.resid_pre)
    u = row_sum(weights, layer.resid_post)
    W_O = layer.output_map()
    heads = source_proximity(flow, v, W_O, t)
    residual = proximity(r, t)
    total = heads.sum((1, 2)) + residual
    total = torch.where(total > 0, total, 1.0)
    e = torch.zeros_like(u) if layer.edit is None else row_sum(weights, layer.edit)
    mlp, edit, bypass = proximity(u - t - e, u), proximity(e, u), proximity(t, u)
    written = mlp + edit + bypass
    written = torch.where(written > 0, written, 1.0)
    gap = torch.maximum(closure_gap(layer, w, flow, v, W_O, t, r), mlp_gap(layer, weights, t))
    return _LayerShares(
        tokens=heads.sum(1) / total[:, None],
        heads=heads.sum(2) / total[:, None],
        residual=residual / total,
        mlp=mlp / written,
        edit=edit / written,
        gap=gap,
    )


def _assemble(layers: Sequence[Layer], shares: Sequence[_LayerShares], length: int, stop: int) -> Shares:
    def stack(name: str) -> Tensor:
        return torch.stack([getattr(s, name).cpu() for s in shares], 1)

    return Shares(
        alpha=torch.nn.functional.pad(stack("tokens").sum(1), (0, length - stop)),
        head_shares=_by_layer([s.heads.cpu() for s in shares]),
        residual_shares=stack("residual"),
        mlp_shares=stack("mlp"),
        edit_shares=None if all(layer.edit is None for layer in layers) else stack("edit"),
        gaps=stack("gap"),
    )


def _by_layer(heads: Sequence[Tensor]) -> Tensor:
    """[B, H] of each layer -> [B, L, H]; layers with fewer heads than others have zeros for those they lack."""
    most = max(each.shape[1] for each in heads)
    return torch.stack([torch.nn.functional.pad(each, (0, most - each.shape[1])) for each in heads], 1)

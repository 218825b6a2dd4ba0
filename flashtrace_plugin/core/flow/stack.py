"""One layer of several texts as one record, so that a hop of all of them takes the operations of one.

Short texts leave a device idle between small operations. Only rows with weight are put in, and the shorter texts are
padded: with rows of weight 0, and with keys that no weighted row sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.flow.pattern import BLOCK_BYTES, QKPattern, block_bytes


def stackable(layers: Sequence[Layer]) -> bool:
    """Whether a text's layers can be stacked: patterns that are nothing but causal softmax, and no parts beside."""
    return all(
        isinstance(layer.pattern, QKPattern)
        and layer.pattern.bias is None
        and layer.z_gate is None
        and layer.edit is None
        for layer in layers
    )


@dataclass(frozen=True)
class _Patterns:
    """Patterns of B texts at their weighted rows, padded.

    one:       pattern of one of them, for what they have in common
    positions: [B, rows]             query positions
    first_key: [B, rows]             first key that each reads
    q:         [B, H, rows, d_k]
    k:         [B, H_kv, stop, d_k]
    """

    one: QKPattern
    positions: Tensor
    first_key: Tensor
    q: Tensor
    k: Tensor

    def flow(self, weights: Tensor) -> Tensor:
        """Weighted column sums of all patterns. weights: [B, rows]; result: [B, H, stop] float32"""
        texts, heads, rows, _ = self.q.shape
        size = max(1, block_bytes(self.q.device, BLOCK_BYTES) // (4 * texts * heads * self.k.shape[2]))
        parts = (slice(begin, begin + size) for begin in range(0, rows, size))
        return torch.stack([(weights[:, None, None, p] @ self._rows(p))[:, :, 0] for p in parts]).sum(0)

    def _rows(self, part: slice) -> Tensor:
        """Some rows of every pattern, [B, H, part, stop]."""
        q, k, one = self.q[:, :, part].float(), self.k.float(), self.one
        scores = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3) @ k.mT * one.scaling
        scores = scores.view(*q.shape[:3], -1)
        if one.softcap is not None:
            scores = one.softcap * torch.tanh(scores / one.softcap)
        keys = torch.arange(scores.shape[-1], device=q.device)
        hidden = (keys > self.positions[:, part, None]) | (keys < self.first_key[:, part, None])
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
        if one.sinks is None:
            return scores.softmax(-1)
        sink = one.sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def stacked(layers: Sequence[Layer], weights: Sequence[Tensor]) -> tuple[Any, Tensor]:
    """One layer of B texts as one record whose tensors have the texts before all else, and the weights of its rows.

    weights: [rows] of each text

    result: a Layer, with a pattern that has a ``flow``; weights [B, rows]
    """
    device = layers[0].v.device
    rows = [one.nonzero()[:, 0].to(device) for one in weights]
    stop = max(int(layer.pattern.positions[own[-1]]) + 1 for layer, own in zip(layers, rows, strict=True))

    def of_rows(values: Sequence[Tensor | None]) -> Any:
        if any(value is None for value in values):
            return None
        return pad_sequence([value[own] for value, own in zip(values, rows, strict=True)], batch_first=True)  # type: ignore

    def of_keys(values: Sequence[Tensor]) -> Tensor:
        """[H_kv, n, width] of each -> [B, H_kv, stop, width]"""
        return pad_sequence([value[:, :stop].transpose(0, 1) for value in values], batch_first=True).transpose(1, 2)

    each: list[Any] = [layer.pattern for layer in layers]
    first = [torch.zeros_like(p.positions) if p.first_key is None else p.first_key[p.positions] for p in each]
    q = pad_sequence([p.q.transpose(0, 1)[own] for p, own in zip(each, rows, strict=True)], batch_first=True)
    pattern: Any = _Patterns(
        each[0], of_rows([p.positions for p in each]), of_rows(first), q.transpose(1, 2), of_keys([p.k for p in each])
    )
    by_row = ("resid_pre", "resid_mid", "resid_post", "mlp_out", "post_scale")
    parts: dict[str, Any] = {name: of_rows([getattr(layer, name) for layer in layers]) for name in by_row}
    record = replace(layers[0], pattern=pattern, v=of_keys([layer.v for layer in layers]), **parts)
    return record, of_rows([one.to(device) for one in weights])

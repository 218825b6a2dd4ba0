"""Who wrote the final residual stream: the layers' shares multiplied along the way down."""

from __future__ import annotations

import torch
from torch import Tensor


def final_stream_shares(residual_shares: Tensor, mlp_shares: Tensor) -> Tensor:
    """Shares of the final residual stream by the component that wrote it, walking down from the last layer.

    residual_shares: [hops, L]        p, share of the residual bypass in what attention leaves (Eq. 19)
    mlp_shares:      [hops, L]        f, share of the MLP in the layer's output (Eq. 21)
    result:          [hops, 1 + 2 L]  embed, then attention and MLP by layer; sums to 1

    ``b = p (1 - f)`` bypasses a layer, attention wrote ``(1 - p) (1 - f)`` and the MLP ``f``; a layer's part of the
    final stream is that times the b of all layers above, and what bypasses all layers is ``embed``.
    """
    bypass = residual_shares * (1 - mlp_shares)
    above = torch.cat([torch.ones_like(bypass[:, :1]), bypass.flip(1).cumprod(1)], 1).flip(1)  # [hops, L+1]
    attn = (1 - residual_shares) * (1 - mlp_shares) * above[:, 1:]
    mlp = mlp_shares * above[:, 1:]
    return torch.cat([above[:, :1], torch.stack([attn, mlp], -1).flatten(1)], 1)

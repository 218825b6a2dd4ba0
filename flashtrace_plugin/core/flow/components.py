"""Who wrote the final residual stream: the layers' shares multiplied along the way down."""

from __future__ import annotations

import torch
from torch import Tensor


def final_stream_shares(residual_shares: Tensor, mlp_shares: Tensor, edit_shares: Tensor | None = None) -> Tensor:
    """Shares of the final residual stream by the component that wrote it, walking down from the last layer.

    residual_shares: [hops, L]        p, share of the residual bypass in what attention leaves (Eq. 19)
    mlp_shares:      [hops, L]        f, share of the MLP in the layer's output (Eq. 21)
    edit_shares:     [hops, L]        e, share of what something else put into the layer's output; None: nothing did
    result:          [hops, 1 + 2 L]  embed, then attention and MLP by layer; sums to 1. With edits [hops, 1 + 3 L]:
                                      attention, MLP and edit by layer

    ``b = p (1 - f - e)`` bypasses a layer, attention wrote ``(1 - p) (1 - f - e)`` and the MLP ``f``; a layer's part
    of the final stream is that times the b of all layers above, and what bypasses all layers is ``embed``.
    """
    mid = 1 - mlp_shares if edit_shares is None else 1 - mlp_shares - edit_shares
    bypass = residual_shares * mid
    above = torch.cat([torch.ones_like(bypass[:, :1]), bypass.flip(1).cumprod(1)], 1).flip(1)  # [hops, L+1]
    written = [(1 - residual_shares) * mid, mlp_shares] + ([] if edit_shares is None else [edit_shares])
    by_layer = torch.stack([part * above[:, 1:] for part in written], -1)
    return torch.cat([above[:, :1], by_layer.flatten(1)], 1)

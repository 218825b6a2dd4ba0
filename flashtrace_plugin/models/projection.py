"""The output projection by head, from whatever module acts like one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def by_head(projection: nn.Module, n_heads: int) -> tuple[Tensor, Tensor | None]:
    """Weight [H, d_h, d] and bias [d] (or None) of an affine map from head outputs to the residual stream.

    A module that is neither ``nn.Linear`` nor ``Conv1D`` (LoRA, quantised weights) is applied to the identity,
    so that what it really computes is used and not what its ``weight`` happens to hold.
    """
    weight, bias = _matrix(projection)
    return weight.detach().unflatten(0, (n_heads, -1)), None if bias is None else bias.detach()


def _matrix(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    if type(projection) in (nn.Linear, Conv1D):
        weight, bias = projection.get_parameter("weight"), projection._parameters.get("bias")
        return (weight.T if type(projection) is nn.Linear else weight), bias
    return _probed(projection)


def _probed(projection: nn.Module) -> tuple[Tensor, Tensor]:
    width = getattr(projection, "in_features", None) or next(projection.parameters()).shape[-1]
    like = next(p for p in projection.parameters() if p.is_floating_point())
    zero = torch.zeros(1, width, dtype=like.dtype, device=like.device)
    bias = projection(zero)
    identity = torch.eye(width, dtype=like.dtype, device=like.device)
    return projection(identity) - bias, bias[0]

"""The output projection by head, from whatever module acts like one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flashtrace_plugin.errors import UnsupportedModelError


def by_head(
    projection: Any, n_heads: int, like: Tensor | None = None, name: str = "this model"
) -> tuple[Tensor, Tensor | None]:
    """Weight [H, d_h, d] and bias [d] (or None) of an affine map from head outputs to the residual stream.

    A plain ``nn.Linear`` or ``Conv1D`` is read. Anything else (LoRA, weights in 8 or 4 bits, weights that wait in main
    memory or on disk) is applied to the identity, so that what it really computes is used and not what its ``weight``
    happens to hold.

    like: [H_kv, N, d_h]  the layer's values, which have the width, dtype and device of what the projection is given
    name: family and layer, for errors

    Raises UnsupportedModelError for a module that is not an affine map.
    """
    if _is_plain(projection):
        weight, bias = projection.weight, projection.bias
        weight = weight.T if type(projection) is nn.Linear else weight
    else:
        if like is None:
            like = next(p for p in projection.parameters() if p.is_floating_point())
        width = getattr(projection, "in_features", n_heads * like.shape[-1])
        weight, bias = _probed(projection, width, like, name)
    if len(weight) % n_heads:
        raise UnsupportedModelError(
            f"{name}: {_kind(projection)}, the output projection, takes {len(weight)} channels, which cannot be cut "
            f"into {n_heads} heads; its layout is wrong"
        )
    return weight.detach().unflatten(0, (n_heads, -1)), None if bias is None else bias.detach()


def _is_plain(projection: Any) -> bool:
    """Whether the module is its weights: torchao keeps ``nn.Linear`` and changes the tensor, accelerate empties it."""
    if type(projection) not in (nn.Linear, Conv1D):
        return False
    return type(projection.weight) in (nn.Parameter, Tensor) and projection.weight.device.type != "meta"


def _probed(projection: nn.Module, width: int, like: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What the module makes of every unit vector and of zero, checked on a vector without small or equal entries."""
    units = torch.eye(width + 1, width, dtype=like.dtype, device=like.device)
    z = torch.linspace(-1.5, 1.7, width, dtype=like.dtype, device=like.device)
    # One call, because kernels for low-bit weights treat a single row differently from many.
    *rows, bias, seen = _applied(projection, torch.cat([units, z[None]])[None], name)[0].detach()
    weight = torch.stack(rows) - bias
    _check_affine(
        seen.float(), z.float() @ weight.float() + bias.float(), weight.dtype, f"{name}: {_kind(projection)}"
    )
    return weight, bias


def _applied(projection: nn.Module, x: Tensor, name: str) -> Tensor:
    try:
        return projection(x)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{name}: {_kind(projection)}, the output projection, cannot be applied to what heads have read "
            f"({error}); its layout is wrong"
        ) from error


def _check_affine(seen: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    gap = float((seen - expected).abs().max() / expected.abs().max())
    bound = _AFFINE_TOLERANCE.get(dtype, 5e-2)
    if not gap <= bound:
        raise UnsupportedModelError(
            f"{name}, the output projection, is not an affine map (relative gap {gap:.1e}, bound {bound:.0e}), so "
            "what a head writes is not the sum of what it read. A module that quantises its activations does this; "
            "load the model with weight-only quantisation or without"
        )


def _kind(projection: nn.Module) -> str:
    return type(projection).__qualname__


_AFFINE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2}
"""Gap to its own matrix that rounding explains, by dtype."""

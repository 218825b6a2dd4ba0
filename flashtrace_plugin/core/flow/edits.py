"""What something other than attention and MLP puts into the residual stream between two layers: a steering hook.

It belongs to neither, so it is a part of its own. It is told from rounding by the bound of closure, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from flashtrace_plugin.core.flow.closure import closure_floor, closure_tolerance
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.flow.proximity import proximity
from flashtrace_plugin.errors import ClosureError


def with_edits(layers: Sequence[Layer]) -> list[Layer]:
    """The layers, each ending with the stream as the next one reads it, and with what was edited on the way.

    layers: all of a model in order, with ``edit`` still None

    Raises ClosureError where edit and stream cancel each other, as when a stream is replaced: both are then as large
    as what is left of them, L1 proximity to either vanishes, and nothing could be told apart.
    """
    read = [*(after.resid_pre / layer.out_scale for layer, after in pairwise(layers)), layers[-1].resid_post]
    each = enumerate(zip(layers, read, strict=True))
    return [_with_edit(i, layer, x.to(layer.resid_mid.device)) for i, (layer, x) in each]


_LEAST_TOLD = 0.25
"""Of a row's size, what proximity must tell of the edit and of the stream that it was made to."""


def _with_edit(index: int, layer: Layer, read: Tensor) -> Layer:
    edit = read.float() - layer.resid_mid.float() - layer.mlp_out.float()
    size = layer.mlp_out.float().abs().sum(-1) + closure_floor(layer) * read.float().abs().sum(-1)
    rounding = edit.abs().sum(-1) <= closure_tolerance(layer.resid_mid.dtype) * size
    if bool(rounding.all()):
        return layer
    told = _told(read.float(), edit, read.float() - edit).masked_fill(rounding, 1.0)
    if not float(told.min()) >= _LEAST_TOLD:
        raise ClosureError(
            f"layer {index}: a hook replaced the stream, or cancels it (L1 proximity tells {float(told.min()):.2f} of "
            f"it apart, at least {_LEAST_TOLD} is needed), and which tokens are behind what is left is not known. "
            "Remove the hook, or let it add to the stream. A vision-language model that adds image features between "
            "its layers can be followed through text, with recursion='reasoning'"
        )
    return replace(layer, resid_post=read, edit=edit.masked_fill(rounding[:, None], 0.0))


def _told(u: Tensor, edit: Tensor, written: Tensor) -> Tensor:
    """Proximity of both parts to what is read, relative to the larger of it and what was written. result: [rows]"""
    size = u.abs().sum(-1).maximum(written.abs().sum(-1))
    return (proximity(edit, u) + proximity(written, u)) / size.clamp_min(1e-30)


def unedited(layer: Layer, rho: Tensor) -> Tensor:
    """Weights on a layer's output, less the share of the edits in it. rho and result: [rows]"""
    if layer.edit is None:
        return rho
    u = layer.resid_post.float()
    edit, rest = proximity(layer.edit, u), proximity(u - layer.edit, u)
    return rho * rest / (edit + rest).clamp_min(1e-30)

"""What something other than attention and MLP puts into the residual stream between two layers: a steering hook.

It belongs to neither, so it is a part of its own. It is told from rounding by the bound of closure, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from flashtrace_plugin.core.flow.closure import closure_floor, closure_tolerance
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.flow.proximity import proximity


def with_edits(layers: Sequence[Layer]) -> list[Layer]:
    """The layers, each ending with the stream as the next one reads it, and with what was edited on the way.

    layers: all of a model in order, with ``edit`` still None
    """
    read = [*(layer.resid_pre for layer in layers[1:]), layers[-1].resid_post]
    return [_with_edit(layer, x.to(layer.resid_mid.device)) for layer, x in zip(layers, read, strict=True)]


def _with_edit(layer: Layer, read: Tensor) -> Layer:
    edit = read.float() - layer.resid_mid.float() - layer.mlp_out.float()
    size = layer.mlp_out.float().abs().sum(-1) + closure_floor(layer) * read.float().abs().sum(-1)
    rounding = edit.abs().sum(-1) <= closure_tolerance(layer.resid_mid.dtype) * size
    if bool(rounding.all()):
        return layer
    return replace(layer, resid_post=read, edit=edit.masked_fill(rounding[:, None], 0.0))


def unedited(layer: Layer, rho: Tensor) -> Tensor:
    """Weights on a layer's output, less the share of the edits in it. rho and result: [rows]"""
    if layer.edit is None:
        return rho
    u = layer.resid_post.float()
    edit, rest = proximity(layer.edit, u), proximity(u - layer.edit, u)
    return rho * rest / (edit + rest).clamp_min(1e-30)

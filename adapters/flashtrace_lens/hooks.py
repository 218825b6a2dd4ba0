"""Hooks that users have put on a bridge, and whether what they change can be divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashtrace_lens.blocks import BridgeBlock
from flashtrace_plugin.core.flow.closure import closure, closure_tolerance
from flashtrace_plugin.core.flow.edits import with_edits
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.errors import ClosureError
from flashtrace_plugin.models.user_hooks import of_a_library

_DIVISIBLE = ("resid_pre", "resid_post", "v", "mlp_out")
"""Parts of a layer whose hook points may change values: the record holds what is really there."""


def users_hooks(bridge: Any) -> list[str]:
    """Names of the hook points that carry a hook of the user; TransformerLens wires some models with its own."""
    points = bridge.hook_dict.values()
    return sorted({p.name for p in points if not all(of_a_library(handle.user_hook) for handle in p.fwd_hooks)})


def check_edits(bridge: Any, blocks: Sequence[BridgeBlock], layers: Sequence[Layer], hooked: Sequence[str]) -> None:
    """Raises ClosureError, naming the hook point, where a hook changes what lies between heads and stream.

    hooked: names of the hook points that carry a hook of the user
    """
    for block, layer in zip(blocks, with_edits(layers), strict=True):
        divisible = {bridge.hook_dict[block.hooks[part]].name for part in _DIVISIBLE}
        names = [n for n in hooked if n.startswith(f"blocks.{block.index}.") and n not in divisible]
        if not names:
            continue
        gap, _ = closure([layer], torch.ones(len(layer.resid_pre), dtype=torch.float32))
        bound = closure_tolerance(layer.resid_mid.dtype)
        if not gap <= bound:
            which = f"the hook at {names[0]}" if len(names) == 1 else f"one of the hooks at {', '.join(names)}"
            raise ClosureError(
                f"layer {block.index}: {which} changes what lies between the heads and the residual stream (relative "
                f"gap {gap:.1e}, bound {bound:.0e}), and nothing says which source that belongs to; remove it, or "
                "edit hook_v, hook_mlp_out or the stream (hook_resid_pre, hook_resid_post), which can be attributed"
            )

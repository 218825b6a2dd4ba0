"""Layers of a running bridge, reduced inside its hooks.

A bridge makes every attention pattern whole, H N² numbers per layer, and none outlives its layer: a hook takes the
rows that may carry weight and lets the rest go. Where even these are many, only the last ones are taken, where the
target is; each layer remembers what its attention was given, [N, d], and attention runs again for a hop that asks for
more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashtrace_lens.blocks import BridgeBlock, blocks_of
from flashtrace_lens.hooks import check_edits, users_hooks
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.errors import InputError, UnsupportedModelError
from flashtrace_plugin.models.view import view_of

KEPT_BYTES = 64 << 20
"""Rows of all layers' patterns are kept up to this size, or that of one whole pattern, whichever is more: the bridge
holds that for a moment anyway. Measured in docs/transformer-lens.md."""


_Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of a module."""


@dataclass
class _Notes:
    """What the hooks of one block have seen, and what its attention was given."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    call: _Call = ((), {})


@dataclass(frozen=True)
class _HookedPattern:
    """Rows of a pattern, the last ones kept; for others the block's attention runs again.

    positions: [rows]         query positions, increasing
    A:         [H, kept, N]   the last ``kept`` rows
    """

    positions: Tensor
    A: Tensor
    bridge: Any
    block: BridgeBlock
    call: _Call

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
        """See :class:`flashtrace_plugin.core.flow.pattern.Pattern`."""
        wanted, first_kept = self.positions[rows], len(self.positions) - self.A.shape[1]
        A = self.A[:, rows - first_kept] if rows[0] >= first_kept else self._again(wanted)
        yield slice(0, len(rows)), 0, A[..., : int(wanted[-1]) + 1].float()

    def _again(self, wanted: Tensor) -> Tensor:
        """Rows of the pattern [H, wanted, N] from a second run of this block's attention alone."""
        seen: list[Tensor] = []

        def take(pattern: Tensor, hook: Any) -> None:
            seen.append(self.block.pick("pattern", pattern, wanted))

        args, kwargs = self.call
        with torch.no_grad(), self.bridge.hooks(fwd_hooks=[(self.block.hooks["pattern"], take)]):
            self.block.module.attn(*args, **kwargs)
        return seen[0]


def capture_bridge(bridge: Any, input_ids: Tensor, rows: Tensor) -> list[Layer]:
    """Runs a bridge once and returns its layers, ready for :mod:`flashtrace_plugin.core`.

    input_ids: [1, N]
    rows:      [r]     positions that may carry weight, increasing

    The user's own hooks are seen by the attribution; ours are on a view of the bridge, which is what runs. Raises
    ClosureError for a hook that changes what cannot be divided.
    """
    hooked = users_hooks(bridge)
    bridge = view_of(bridge)
    blocks = blocks_of(bridge)
    kept = rows[len(rows) - _kept_rows(bridge, len(blocks), input_ids.shape[1], len(rows)) :]
    notes = [_Notes() for _ in blocks]
    hooks = [hook for block, note in zip(blocks, notes, strict=True) for hook in _hooks(block, note, rows, kept)]
    with torch.no_grad(), _attention_calls(blocks, notes), bridge.hooks(fwd_hooks=hooks):
        _check_finite(_last_logits(bridge, input_ids))
    layers = [_layer(bridge, block, note, rows) for block, note in zip(blocks, notes, strict=True)]
    check_edits(bridge, blocks, layers, hooked)
    return layers


def _kept_rows(bridge: Any, n_layers: int, length: int, n_rows: int) -> int:
    row = 4 * bridge.cfg.n_heads * length
    return min(n_rows, max(KEPT_BYTES, row * length) // (row * n_layers))


def _hooks(block: BridgeBlock, notes: _Notes, rows: Tensor, kept: Tensor) -> list[tuple[str, Callable[..., None]]]:
    def note(part: str) -> Callable[..., None]:
        def hook(activation: Tensor, hook: Any) -> None:
            notes.parts[part] = block.pick(part, activation, kept if part == "pattern" else rows)

        return hook

    return [(name, note(part)) for part, name in block.hooks.items()]


@contextmanager
def _attention_calls(blocks: list[BridgeBlock], notes: list[_Notes]) -> Iterator[None]:
    """Notes what every attention module is given."""

    def note(notes: _Notes) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            notes.call = args, kwargs

        return hook

    with ExitStack() as stack:
        for block, own in zip(blocks, notes, strict=True):
            stack.callback(block.module.attn.register_forward_pre_hook(note(own), with_kwargs=True).remove)
        yield


def _last_logits(bridge: Any, input_ids: Tensor) -> Tensor:
    """Logits of the last position [vocabulary]; the others are never computed where the model can skip them."""
    known = inspect.signature(bridge.original_model.forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    return bridge(input_ids, use_cache=False, **options)[0, -1]


def _check_finite(logits: Tensor) -> None:
    """Raises InputError for NaN or infinity."""
    if not bool(torch.isfinite(logits).all()):
        raise InputError(
            "the model's activations are not finite (NaN or infinity in the logits); "
            "check the weights and your hooks, or boot the model in bfloat16 or float32"
        )


def _layer(bridge: Any, block: BridgeBlock, notes: _Notes, rows: Tensor) -> Layer:
    silent = [name for part, name in block.hooks.items() if part not in notes.parts]
    if silent:
        raise UnsupportedModelError(
            f"{silent[0]} did not fire; if the model was loaded with another attention kernel, "
            "boot it with attn_implementation='eager'"
        )
    A = notes.parts.pop("pattern")
    return block.layer(notes.parts, _HookedPattern(rows.to(A.device), A, bridge, block, notes.call))

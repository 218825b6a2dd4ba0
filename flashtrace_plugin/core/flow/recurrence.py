"""Token mixers without softmax: linear attention, state space models and convolutions are linear in their values.

What head h reads at position i is ``o^h_i = sum_j c^h_ij v^h_j`` with coefficients c that depend on the text but not
on v: a number per head (gated delta rule, Mamba-2) or one per channel (Mamba-1, convolutions). They may be negative
and need not sum to 1. The weighted flow is therefore a vector-Jacobian product of the recurrence::

    flow[j] = sum_i w_i c_ij = d <w, o> / d v_j

which costs about two runs of the recurrence, O(N), and never forms the coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.pattern import ChannelFlow, Pattern, channel_flow
from flashtrace_plugin.errors import UnsupportedModelError


@dataclass(frozen=True)
class Recurrence:
    """A token mixer given by what it makes of values, all else being as it was in the forward pass.

    positions: [rows]  query positions that may carry weight, increasing
    read:      v [n, H, d_h] -> o [n, H, d_h], linear, for the first n positions; float32
    """

    positions: Tensor
    read: Callable[[Tensor], Tensor]

    def channel_flow(self, weights: Tensor, length: int) -> Tensor:
        """See :func:`~flashtrace_plugin.core.flow.pattern.channel_flow`. weights: [H, rows, d_h]"""
        heads, _, width = weights.shape
        positions = self.positions.to(weights.device)
        with torch.inference_mode(False), torch.enable_grad():
            w = weights.new_zeros(length, heads, width, dtype=torch.float32)
            seen = positions < length
            w[positions[seen]] = weights[:, seen].transpose(0, 1).float()
            v = torch.zeros_like(w, requires_grad=True)
            (flow,) = torch.autograd.grad(self.read(v), v, w)
        return flow.transpose(0, 1)


@dataclass(frozen=True)
class SideBySide:
    """Two mixers that write to the stream at once, as one: their heads one after the other, as wide as the widest.

    parts:  their patterns
    shapes: [(heads, width)]  of each
    """

    parts: tuple[Pattern | ChannelFlow, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def positions(self) -> Tensor:
        return self.parts[0].positions

    def channel_flow(self, weights: Tensor, length: int) -> Tensor:
        """See :func:`~flashtrace_plugin.core.flow.pattern.channel_flow`. weights: [H, rows, d_h]"""
        each = weights.split([heads for heads, _ in self.shapes])
        flows = [
            channel_flow(part, w[..., :width], length)
            for part, w, (_, width) in zip(self.parts, each, self.shapes, strict=True)
        ]
        return torch.cat([torch.nn.functional.pad(f, (0, weights.shape[-1] - f.shape[-1])) for f in flows])


@dataclass(frozen=True)
class NoFlow:
    """No mixer at all: a layer that is nothing but an MLP. It has one head, which reads nothing."""

    positions: Tensor

    def channel_flow(self, weights: Tensor, length: int) -> Tensor:
        """See :func:`~flashtrace_plugin.core.flow.pattern.channel_flow`. weights: [1, rows, d_h]"""
        return weights.new_zeros(1, length, weights.shape[-1], dtype=torch.float32)


def softmax_pattern(pattern: Pattern | ChannelFlow) -> Pattern:
    """The pattern itself. Raises UnsupportedModelError for what has no softmax."""
    if isinstance(pattern, ChannelFlow):
        raise UnsupportedModelError(
            "this model mixes tokens by recurrences, too, whose coefficients may be negative and do not sum to 1, so "
            "they are no shares of attention that could be handed down as such"
        )
    return pattern


def softmax_patterns(pattern: Pattern | ChannelFlow) -> list[Pattern]:
    """The patterns in it whose rows are shares of attention: none in a recurrence."""
    if isinstance(pattern, SideBySide):
        return [found for part in pattern.parts for found in softmax_patterns(part)]
    return [] if isinstance(pattern, ChannelFlow) else [pattern]

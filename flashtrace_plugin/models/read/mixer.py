"""What one token mixer of a block tells while the model runs: attention, or a recurrence that has no pattern."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashtrace_plugin.core.flow.pattern import ChannelFlow, Pattern, QKPattern
from flashtrace_plugin.core.flow.recurrence import NoFlow, Recurrence, SideBySide
from flashtrace_plugin.errors import UnsupportedModelError
from flashtrace_plugin.models.read.attention import AttentionCall, MaskReader
from flashtrace_plugin.models.read.layouts import Layout
from flashtrace_plugin.models.read.projection import by_head
from flashtrace_plugin.models.read.recurrence import RecurrenceCall
from flashtrace_plugin.models.read.texts import Texts

_Part = Callable[[str], nn.Module]
"""A part of the block by its path; raises UnsupportedModelError if it is not there."""


@dataclass(frozen=True)
class Heads:
    """What a mixer adds to a :class:`~flashtrace_plugin.core.flow.layer.Layer`, named as there."""

    pattern: Pattern | ChannelFlow
    v: Tensor
    W_O: Tensor
    b_O: Tensor | None
    z_gate: Tensor | None


class MixerRecorder:
    """Notes what one mixer works with: at all positions what is read there, at rows what they read with.

    layout: of the block, or of the mixer beside its first
    part:   gives a part of the block
    texts:  the sequences that are run together, and their rows; a recurrence has one, since padding would go into its
            state where a kernel runs over it backwards in chunks
    name:   family and layer, for errors
    flip:   signs of channels are turned between a recurrence and its output projection, see :meth:`_see_z`
    """

    flip = False

    def __init__(self, layout: Layout, part: _Part, texts: Texts, name: str, masks: MaskReader) -> None:
        assert layout.attn is not None and layout.W_O is not None
        self.layout, self.part, self.texts, self.name, self.masks = layout, part, texts, name, masks
        self.attn = part(layout.attn)
        if isinstance(getattr(self.attn, "indexer", None), nn.Module):
            raise UnsupportedModelError(
                f"{name} has sparse attention: its {type(self.attn.indexer).__name__} chooses the keys that are read, "
                "which is not recorded, so the model is refused"
            )
        self.read: list[tuple[QKPattern | Recurrence, Tensor]] = []
        self.o: Tensor | None = None
        self.z: Tensor | None = None

    def watch(self, stack: ExitStack) -> None:
        """Opens the layout's reader on the module, which is one of a view, until the stack closes."""
        if self.layout.reader is None:
            return
        assert self.layout.W_O is not None
        stack.callback(self.part(self.layout.W_O).register_forward_pre_hook(self._see_z).remove)
        try:
            stack.enter_context(self.layout.reader(self.attn, self.note))
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{self.name}: {type(self.attn).__name__} is not what its layout's reader reads: {error}"
            ) from error

    def note(self, module: nn.Module, call: AttentionCall | RecurrenceCall) -> Tensor | None:
        if isinstance(call, AttentionCall):
            self._attention(call)
            return None
        (rows,) = self.texts.rows
        self.o = call.o[rows.to(call.o.device)]
        self.read = [(Recurrence(rows.to(call.v.device), call.read), call.v.transpose(0, 1).clone())]
        return _signs(self.o) if self.flip else None

    def _attention(self, call: AttentionCall) -> None:
        mask = self.masks.read(call)
        k, v = call.k.detach().clone(), call.v.detach().clone()
        each = enumerate(zip(self.texts.rows, self.texts.lengths, strict=True))
        self.read = [
            (_pattern(call, i, rows.to(call.q.device), k[i, :, :length], mask), v[i, :, :length])
            for i, (rows, length) in each
        ]

    def _see_z(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Notes what enters the output projection.

        What stands between a recurrence and it may only multiply, with factors that know magnitudes at most, as a norm
        does. Then turned signs of what was read can be turned back here, and nothing has changed.
        """
        if self.o is None:
            return None
        z, *others = args
        if z.shape[-1] != self.o[0].numel():
            raise UnsupportedModelError(
                f"{self.name}, {self.layout.W_O!r} reads {z.shape[-1]} channels, where what the recurrence gives has "
                f"{self.o[0].numel()}; its layout is wrong"
            )
        self.z = z.detach().reshape(-1, z.shape[-1])[self.texts.flat_rows.to(z.device)]
        return (z * _signs(self.o).flatten().to(z), *others) if self.flip else None

    def check_complete(self) -> None:
        if self.o is not None and self.z is None:
            raise UnsupportedModelError(
                f"{self.name}: {self.layout.W_O!r} is not run after the recurrence of {type(self.attn).__name__}, so "
                "it is not its output projection; its layout is wrong"
            )
        if not self.read:
            raise UnsupportedModelError(
                f"{self.name}: {type(self.attn).__name__} does not hand its queries and keys to transformers' "
                "attention interface; load the model with attn_implementation='eager' or 'sdpa', or give its Layout "
                "a reader"
            )

    @property
    def gate_widths(self) -> tuple[int, int]:
        """Channels of a projection that gives every head a query and a gate, or one number."""
        pattern, v = self.read[0]
        assert isinstance(pattern, QKPattern)
        return 2 * len(pattern.q) * v.shape[-1], len(pattern.q)

    def heads(self, width: int, multiplier: float, gate: Tensor | None) -> list[Heads]:
        """The record of this mixer for every text.

        width: channels of the stream; multiplier: of what is written to it; gate: what the layout's gate gave
        """
        pattern, v = self.read[0]
        heads = len(pattern.q) if isinstance(pattern, QKPattern) else len(v)
        W_O, b_O = self._output(heads, v, width)
        if multiplier != 1.0:
            W_O, b_O = W_O.float() * multiplier, None if b_O is None else b_O.float() * multiplier
        gates = self.texts.of_each(self._gate(heads, W_O.shape[1], gate), 1)
        # Flash attention is given MLA's values padded to the width of its keys.
        each = zip(self.read, gates, strict=True)
        return [Heads(pattern, v[..., : W_O.shape[1]], W_O, b_O, z_gate) for (pattern, v), z_gate in each]

    def _gate(self, heads: int, width: int, logits: Tensor | None) -> Tensor | None:
        """What multiplies the heads where all texts read. [H, r, d_h]"""
        if self.o is not None:
            assert self.z is not None
            return _ratio(self.z.unflatten(-1, self.o.shape[1:]), self.o).transpose(0, 1)
        return None if self.layout.gate is None or logits is None else _logits_gate(logits, heads, width)

    def _output(self, heads: int, v: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
        """The output projection by head, which must fit what the heads have read and the stream they write to."""
        path = self.layout.W_O
        assert path is not None
        W_O, b_O = by_head(self.part(path), heads, v, self.name)
        if W_O.shape[1] > v.shape[-1] or W_O.shape[2] != width:
            raise UnsupportedModelError(
                f"{self.name}, {path!r} maps {heads} heads of {W_O.shape[1]} channels to {W_O.shape[2]}, which is no "
                f"output projection from {heads} heads of {v.shape[-1]} channels to {width}; its layout is wrong"
            )
        return W_O, b_O


def _pattern(call: AttentionCall, text: int, rows: Tensor, k: Tensor, mask: Sequence[Tensor | None]) -> QKPattern:
    """The pattern of one of the texts; without padding that it could see, masks are those of every text."""
    first_key, last_key, bias = mask
    return QKPattern(
        positions=rows,
        q=call.q.detach()[text, :, rows],
        k=k,
        scaling=call.options.get("scaling") or call.q.shape[-1] ** -0.5,
        first_key=first_key,
        last_key=last_key,
        softcap=call.options.get("softcap"),
        sinks=_detached(call.options.get("s_aux")),
        bias=bias if bias is None or bias.shape[1] == 1 else bias[:, rows],
    )


def joined(parts: Sequence[Heads], rows: Tensor, like: Tensor, length: int) -> Heads:
    """The heads of all mixers of a block as those of one. like: [rows, d] the stream"""
    if not parts:
        v, W_O, gate = (like.new_zeros(1, n, m) for n, m in ((length, 1), (1, like.shape[-1]), (len(rows), 1)))
        return Heads(NoFlow(rows.to(like.device)), v, W_O, None, gate)
    if len(parts) == 1:
        return parts[0]
    width = max(part.W_O.shape[1] for part in parts)
    biases = [part.b_O for part in parts if part.b_O is not None]
    return Heads(
        SideBySide(tuple(part.pattern for part in parts), tuple((len(part.W_O), part.W_O.shape[1]) for part in parts)),
        torch.cat([_padded(part.v, width).repeat_interleave(len(part.W_O) // len(part.v), 0) for part in parts]),
        torch.cat([F.pad(part.W_O, (0, 0, 0, width - part.W_O.shape[1])) for part in parts]),
        torch.stack(biases).sum(0) if biases else None,
        torch.cat([_padded(_gate_of(part, len(rows)), width) for part in parts]),
    )


def _signs(o: Tensor) -> Tensor:
    """1 or -1 for every head and channel, in no order. o: [r, H, d_h]; result: [H, d_h]"""
    generator = torch.Generator().manual_seed(0)
    return (2.0 * torch.randint(2, o.shape[1:], generator=generator) - 1).to(o.device)


def _padded(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1]))


def _gate_of(part: Heads, rows: int) -> Tensor:
    heads, width, _ = part.W_O.shape
    return part.z_gate if part.z_gate is not None else part.v.new_ones(heads, rows, width)


def _ratio(z: Tensor, o: Tensor) -> Tensor:
    """What stands between a recurrence and the output projection, by channel: a norm's frozen scale, gains, gates.

    It multiplies only, which :meth:`MixerRecorder._see_z` has checked.
    Where nothing was read there is nothing to multiply.
    """
    z, o = z.float(), o.float()
    return torch.where(o == 0, 0.0, z / torch.where(o == 0, 1.0, o))


def _logits_gate(projected: Tensor, heads: int, width: int) -> Tensor:
    """The gate of a projection that gives each head its query and then its gate's logits, or one logit.

    result: [H, r, d_h]
    """
    if projected.shape[-1] == heads:
        return projected.sigmoid().T[:, :, None].expand(-1, -1, width)
    return projected.unflatten(-1, (heads, 2, -1))[:, :, 1].sigmoid().transpose(0, 1)


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()

"""What one block tells while the model runs, noted by plain hooks: O(N d) numbers, no attention pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from flashtrace_plugin.core.flow.closure import closure_tolerance
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.flow.pattern import QKPattern
from flashtrace_plugin.errors import ClosureError, UnsupportedModelError
from flashtrace_plugin.models.read.attention import AttentionCall, MaskReader
from flashtrace_plugin.models.read.layouts import Layout, Reader
from flashtrace_plugin.models.read.projection import by_head


class Texts:
    """Sequences that run in one forward pass, the shorter ones padded at the right, where causal models never look.

    ids:  of each sequence, [n]
    rows: [r] of each, positions that may carry weight, increasing
    """

    def __init__(self, ids: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        self.rows, self.lengths = list(rows), [len(one) for one in ids]
        # A token of the text itself, because models warn of padding ids, and some compute otherwise for them.
        longest = max(self.lengths)
        self.input_ids = torch.stack([torch.cat([one, one[-1:].expand(longest - len(one))]) for one in ids])
        self.flat_rows = torch.cat([i * longest + one for i, one in enumerate(self.rows)])

    def of_each(self, values: Tensor | None, dim: int = 0) -> Sequence[Tensor | None]:
        """Values at all rows as those of every text."""
        return [None] * len(self.rows) if values is None else values.split([len(one) for one in self.rows], dim)


class BlockRecorder:
    """Notes the parts of one block at the rows that may carry weight, and keys and values at all positions.

    name:  family and layer, for errors
    texts: the sequences that are run together, and their rows
    """

    def __init__(self, block: nn.Module, layout: Layout, texts: Texts, name: str, masks: MaskReader) -> None:
        self.block, self.layout, self.texts, self.name, self.masks = block, layout, texts, name, masks
        self.attn = self.submodule(layout.attn)
        if isinstance(getattr(self.attn, "indexer", None), nn.Module):
            raise UnsupportedModelError(
                f"{name} has sparse attention: its {type(self.attn.indexer).__name__} chooses the keys that are read, "
                "which is not recorded, so the model is refused"
            )
        self.post_gain = None if layout.post_norm is None else self._gain(layout.post_norm)
        self.seen: dict[str, Tensor] = {}
        self.read: list[tuple[QKPattern, Tensor]] = []

    def submodule(self, path: str) -> nn.Module:
        """A part of the block. Raises UnsupportedModelError, saying what the block has instead."""
        try:
            return self.block.get_submodule(path)
        except AttributeError:
            parts = ", ".join(name for name, _ in self.block.named_children())
            raise UnsupportedModelError(
                f"{self.name} has no {path!r}, only {parts}. A layer without softmax attention (linear attention, a "
                "state space model, convolution) has no attention pattern that could say which token was read, and "
                "leaving it out would lose what flows through it, so the model is refused"
            ) from None

    def watched(self) -> list[tuple[str, nn.Module]]:
        """The modules that are noted, by their paths in the block."""
        paths = dict.fromkeys([*(path for path, _, _ in self._taps()), self.layout.attn])
        return [(path, self.submodule(path)) for path in paths]

    def watch(self, stack: ExitStack) -> None:
        """Places hooks on the block, which is one of a view, and opens the layout's reader, until the stack closes."""
        for path, side, name in self._taps():
            module = self.submodule(path)
            place = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            # The block's own result is seen before the user's hooks change it, all else after.
            stack.callback(place(self._note(side, name), with_kwargs=True, prepend=name == "written").remove)
        if self.layout.reader is not None:
            self._open(self.layout.reader, stack)

    def _open(self, reader: Reader, stack: ExitStack) -> None:
        try:
            stack.enter_context(reader(self.attn, self.attention))
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{self.name}: {type(self.attn).__name__} is not what its layout's reader reads: {error}"
            ) from error

    def _taps(self) -> Iterator[tuple[str, str, str]]:
        """(module, its input or output, name)"""
        yield "", "input", "resid_pre"
        yield "", "output", "written"
        yield "", "output", "resid_post"
        if self.layout.mid is not None:
            yield self.layout.mid, "input", "resid_mid"
        else:
            yield self.layout.attn, "output", "attn_out"
        for i, path in enumerate(self._mlp):
            yield path, "output", f"mlp_out.{i}"
        if self.layout.post_norm is not None:
            yield self.layout.post_norm, "input", "norm_in"
            yield self.layout.post_norm, "output", "norm_out"
        if self.layout.gate is not None:
            yield self.layout.gate, "output", "gate"

    def _note(self, side: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
            values = output if side == "output" else args or (kwargs["hidden_states"],)
            self.seen[name] = self._pick(values[0])
            if name == "norm_out":
                before, after = self.seen.pop("norm_in"), self.seen.pop("norm_out")
                self.seen["post_scale"] = _scale(self.post_gain, before, after)

        return hook

    def _pick(self, value: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The rows of a [B, N, d] or [B N, d] activation, copied because some families go on to write in place."""
        resid = (value if isinstance(value, Tensor) else value[0]).detach()
        return resid.reshape(-1, resid.shape[-1])[self.texts.flat_rows.to(resid.device)]

    def attention(self, module: nn.Module, call: AttentionCall) -> None:
        """Notes what the block's attention module works with."""
        mask = self.masks.read(call)
        k, v = call.k.detach().clone(), call.v.detach().clone()
        each = enumerate(zip(self.texts.rows, self.texts.lengths, strict=True))
        self.read = [
            (self._pattern(call, b, rows.to(call.q.device), k[b, :, :length], mask), v[b, :, :length])
            for b, (rows, length) in each
        ]

    def _pattern(
        self, call: AttentionCall, text: int, rows: Tensor, k: Tensor, mask: Sequence[Tensor | None]
    ) -> QKPattern:
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

    def layers(self) -> list[Layer]:
        """The block's record of every text. Raises UnsupportedModelError or ClosureError if its layout is wrong."""
        heads, seen = self._complete(), self.seen
        multiplier = self._multiplier(seen["resid_post"])
        out_scale = 1.0 if self.layout.out_scale is None else self._number(self.layout.out_scale)
        if out_scale != 1.0:
            seen.update({name: seen[name] / out_scale for name in ("written", "resid_post")})
        mid, mlp_out = self._branches(multiplier)
        W_O, b_O = self._output(heads)
        gate = None if self.layout.gate is None else _gate(seen["gate"], heads)
        of_each = self.texts.of_each
        parts = zip(
            self.read,
            *map(of_each, (seen["resid_pre"], mid, seen["resid_post"], mlp_out, self._post_scale())),
            of_each(gate, 1),
            strict=True,
        )
        return [
            Layer(
                pattern=pattern,
                # Flash attention is given MLA's values padded to the width of its keys.
                v=v[..., : W_O.shape[1]],
                W_O=W_O,
                b_O=b_O,
                resid_pre=resid_pre,
                resid_mid=resid_mid,
                resid_post=resid_post,
                mlp_out=mlp,
                post_gain=multiplier if self.post_gain is None else self.post_gain,
                post_scale=post_scale,
                z_gate=z_gate,
                out_scale=out_scale,
            )
            for (pattern, v), resid_pre, resid_mid, resid_post, mlp, post_scale, z_gate in parts
        ]

    def _post_scale(self) -> Tensor | None:
        """s_i of the norm after attention, times what its branch is multiplied by behind it. [r]"""
        scale, times = self.seen.get("post_scale"), self.layout.multiplier
        return scale if scale is None or times is None else scale * self._number(times)

    def _complete(self) -> int:
        """The number of heads, once everything that the layout names has been seen."""
        if not self.read:
            raise UnsupportedModelError(
                f"{self.name}: {type(self.attn).__name__} does not hand its queries and keys to transformers' "
                "attention interface; load the model with attn_implementation='eager' or 'sdpa', or give its Layout "
                "a reader"
            )
        missing = [name for _, _, name in self._taps() if name not in self.seen and not name.startswith("norm_")]
        if missing:
            raise UnsupportedModelError(f"{self.name} never showed its {', '.join(missing)}; its layout is wrong")
        pattern, v = self.read[0]
        self._check_widths(2 * len(pattern.q) * v.shape[-1])
        return len(pattern.q)

    def _check_widths(self, gate: int) -> None:
        width = self.seen["resid_pre"].shape[-1]
        for path, side, name in self._taps():
            wanted, what = (gate, "queries and gates") if name == "gate" else (width, "the stream")
            if name in self.seen and self.seen[name].shape[-1] != wanted:
                raise UnsupportedModelError(
                    f"{self._told(path)}: its {side} has {self.seen[name].shape[-1]} channels, where {what} need "
                    f"{wanted}; its layout is wrong"
                )

    def _told(self, path: str) -> str:
        """A part of the block, for errors."""
        return f"{self.name}, {path!r}"

    def _gain(self, path: str) -> Tensor:
        """The gain of an RMS norm up to a factor, from what it makes of ones: w mostly, 1 + w in Gemma. [d]"""
        norm = self.submodule(path)
        weight = next(norm.parameters(), None)
        if weight is None or weight.dim() != 1:
            raise UnsupportedModelError(
                f"{self._told(path)}, a {type(norm).__name__}, has no gain, so it is not the norm that its layout says"
            )
        ones = torch.ones(1, weight.shape[-1], dtype=torch.float32, device=weight.device)
        with torch.no_grad():
            return norm(ones)[0].float()

    def _output(self, heads: int) -> tuple[Tensor, Tensor | None]:
        """The output projection by head, which must fit what the heads have read and the stream they write to."""
        v, path = self.read[0][1], self.layout.W_O
        W_O, b_O = by_head(self.submodule(path), heads, v, self.name)
        width = self.seen["resid_pre"].shape[-1]
        if W_O.shape[1] > v.shape[-1] or W_O.shape[2] != width:
            raise UnsupportedModelError(
                f"{self._told(path)} maps {heads} heads of {W_O.shape[1]} channels to {W_O.shape[2]}, which is no "
                f"output projection from {heads} heads of {v.shape[-1]} channels to {width}; its layout is wrong"
            )
        return W_O, b_O

    @property
    def _mlp(self) -> tuple[str, ...]:
        """Paths of the modules that make up the MLP branch."""
        return (self.layout.mlp,) if isinstance(self.layout.mlp, str) else self.layout.mlp

    def _branches(self, multiplier: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stream after attention and output of the MLP [r, d], once the block is known to add the two."""
        written, pre = self.seen["written"], self.seen["resid_pre"].float()
        mlp = torch.stack([self.seen[f"mlp_out.{i}"].float() for i in range(len(self._mlp))]).sum(0)
        mlp = mlp if multiplier is None else mlp * multiplier.float()
        mid = self.seen["resid_mid"].float() if self.layout.mid is not None else pre + self.seen["attn_out"].float()
        size = pre.abs() + (mid - pre).abs() + mlp.abs()
        gap = float(((written.float() - mid - mlp).abs().sum(-1) / size.sum(-1)).max())
        bound = closure_tolerance(written.dtype)
        if not gap <= bound:
            raise ClosureError(
                f"{self.name}: the block's output is not the stream after attention plus MLP (relative gap {gap:.1e}, "
                f"bound {bound:.0e}). Its layout is wrong: other modules add to the stream (`mlp`), or it is read "
                "elsewhere (`mid`); or a hook or a replaced method inside the block changes what it adds up"
            )
        mid = mid.to(written.dtype)
        # What is left is the MLP's up to rounding, so only an edit can come between this and the next layer.
        return mid, written.float() - mid.float()

    def _multiplier(self, like: Tensor) -> Tensor | None:
        if self.layout.multiplier is None:
            return None
        return like.new_full(like.shape[-1:], self._number(self.layout.multiplier))

    def _number(self, name: str) -> float:
        value = getattr(self.block, name, None)
        if isinstance(value, Tensor) and value.numel() == 1:
            return float(value)
        if not isinstance(value, (int, float)):
            raise UnsupportedModelError(f"{self._told(name)} is no number to multiply by: {type(value).__name__}")
        return value


def _scale(gain: Tensor | None, before: Tensor, after: Tensor) -> Tensor:
    """s_i of ``after_i = s_i * gain ⊙ before_i`` (Eq. 13), by least squares. result: [r] float32"""
    unscaled = before.float() if gain is None else gain * before.float()
    return (unscaled * after.float()).sum(-1) / unscaled.square().sum(-1)


def _gate(projected: Tensor, heads: int) -> Tensor:
    """The gate of a projection that gives each head its query and then its gate's logits. result: [H, r, d_h]"""
    return projected.unflatten(-1, (heads, 2, -1))[:, :, 1].sigmoid().transpose(0, 1)


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()

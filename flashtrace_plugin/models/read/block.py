"""What one block tells while the model runs, noted by plain hooks: O(N d) numbers, no attention pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashtrace_plugin.core.flow.closure import closure_tolerance
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.errors import ClosureError, UnsupportedModelError
from flashtrace_plugin.models.read.attention import MaskReader
from flashtrace_plugin.models.read.layouts import Layout
from flashtrace_plugin.models.read.mixer import MixerRecorder, joined
from flashtrace_plugin.models.read.texts import Texts


class BlockRecorder:
    """Notes the parts of one block at the rows that may carry weight, and keys and values at all positions.

    layout: of the family, of which that of the block is taken
    texts:  the sequences that are run together, and their rows
    name:   family and layer, for errors
    """

    def __init__(self, block: nn.Module, layout: Layout, texts: Texts, name: str, masks: MaskReader) -> None:
        self.block, self.layout, self.texts, self.name = block, layout.of(block), texts, name
        # Of the block alone: a recorder that its mixers hold keeps what was read until the garbage collector comes.
        self.submodule = partial(_part, block, name)
        self.mixers = [MixerRecorder(one, self.submodule, texts, name, masks) for one in self.layout.mixers]
        self.post_gain = None if self.layout.post_norm is None else self._gain(self.layout.post_norm)
        self.seen: dict[str, Tensor] = {}

    def watched(self) -> list[tuple[str, nn.Module]]:
        """The modules that are noted, by their paths in the block."""
        mixers = self.layout.mixers
        own = [path for one in mixers for path in (one.attn, one.reader and one.W_O) if path is not None]
        paths = dict.fromkeys([*(path for path, _, _ in self._taps()), *own])
        return [(path, self.submodule(path)) for path in paths]

    def watch(self, stack: ExitStack) -> None:
        """Places hooks on the block, which is one of a view, and opens the layout's reader, until the stack closes."""
        for path, side, name in self._taps():
            module = self.submodule(path)
            place = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            # The block's own result is seen before the user's hooks change it, all else after.
            stack.callback(place(self._note(side, name), with_kwargs=True, prepend=name == "written").remove)
        for mixer in self.mixers:
            mixer.watch(stack)

    def _taps(self) -> Iterator[tuple[str, str, str]]:
        """(module, its input or output, name)"""
        yield "", "input", "resid_pre"
        yield "", "output", "written"
        yield "", "output", "resid_post"
        if self.layout.mid is not None:
            yield self.layout.mid, "input", "resid_mid"
        else:
            for i, mixer in enumerate(self.layout.mixers):
                yield mixer.attn or "", "output", f"attn_out.{i}"
        for i, path in enumerate(self._mlp):
            yield path, "output", f"mlp_out.{i}"
        if self.layout.post_norm is not None:
            yield self.layout.post_norm, "input", "norm_in"
            yield self.layout.post_norm, "output", "norm_out"
        for mixer in self.layout.mixers:
            if mixer.gate is not None:
                yield mixer.gate, "output", "gate"

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

    def layers(self) -> list[Layer]:
        """The block's record of every text. Raises UnsupportedModelError or ClosureError if its layout is wrong."""
        self._check_complete()
        seen, width = self.seen, self.seen["resid_pre"].shape[-1]
        multiplier = self._multiplier(seen["resid_post"])
        out_scale = 1.0 if self.layout.out_scale is None else self._number(self.layout.out_scale)
        if out_scale != 1.0:
            seen.update({name: seen[name] / out_scale for name in ("written", "resid_post")})
        mid, mlp_out = self._branches(multiplier)
        mixers = [mixer.heads(width, self._written(mixer.layout), seen.get("gate")) for mixer in self.mixers]
        stream = (seen["resid_pre"], mid, seen["resid_post"], mlp_out, self._post_scale())
        parts = zip(*map(self.texts.of_each, stream), strict=True)
        return [
            Layer(
                **vars(joined([mixer[i] for mixer in mixers], self.texts.rows[i], resid_pre, self.texts.lengths[i])),
                resid_pre=resid_pre,
                resid_mid=resid_mid,
                resid_post=resid_post,
                mlp_out=mlp,
                post_gain=multiplier if self.post_gain is None else self.post_gain,
                post_scale=post_scale,
                out_scale=out_scale,
            )
            for i, (resid_pre, resid_mid, resid_post, mlp, post_scale) in enumerate(parts)
        ]

    def _post_scale(self) -> Tensor | None:
        """s_i of the norm after attention, times what its branch is multiplied by behind it. [r]"""
        scale, times = self.seen.get("post_scale"), self.layout.multiplier
        return scale if scale is None or times is None else scale * self._number(times)

    def _check_complete(self) -> None:
        """Raises UnsupportedModelError if what the layout names has not been seen, or is as wide as something else."""
        for mixer in self.mixers:
            mixer.check_complete()
        missing = [name for _, _, name in self._taps() if name not in self.seen and not name.startswith("norm_")]
        if missing:
            raise UnsupportedModelError(f"{self.name} never showed its {', '.join(missing)}; its layout is wrong")
        self._check_widths()

    def _check_widths(self) -> None:
        width = self.seen["resid_pre"].shape[-1]
        gates = [mixer.gate_widths for mixer in self.mixers if mixer.layout.gate is not None]
        for path, side, name in self._taps():
            wanted, what = (gates[0], "queries and gates") if name == "gate" else ((width,), "the stream")
            if name in self.seen and self.seen[name].shape[-1] not in wanted:
                raise UnsupportedModelError(
                    f"{self._told(path)}: its {side} has {self.seen[name].shape[-1]} channels, where {what} need "
                    f"{' or '.join(map(str, wanted))}; its layout is wrong"
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

    @property
    def _mlp(self) -> tuple[str, ...]:
        """Paths of the modules that make up the MLP branch."""
        return (self.layout.mlp,) if isinstance(self.layout.mlp, str) else self.layout.mlp

    def _branches(self, multiplier: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stream after attention and output of the MLP [r, d], once the block is known to add the two."""
        written, pre = self.seen["written"], self.seen["resid_pre"].float()
        mlp = self._sum([self.seen[f"mlp_out.{i}"].float() for i in range(len(self._mlp))])
        mlp = mlp if multiplier is None else mlp * multiplier.float()
        mid = self.seen["resid_mid"].float() if self.layout.mid is not None else pre + self._attn_out()
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

    def _attn_out(self) -> Tensor:
        outs = [self.seen[f"attn_out.{i}"].float() * self._written(m.layout) for i, m in enumerate(self.mixers)]
        return self._sum(outs)

    def _sum(self, parts: Sequence[Tensor]) -> Tensor:
        return sum(parts, torch.zeros_like(self.seen["resid_pre"], dtype=torch.float32))

    def _written(self, mixer: Layout) -> float:
        return 1.0 if mixer.written is None else self._number(mixer.written)

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


def _part(block: nn.Module, name: str, path: str) -> nn.Module:
    """A part of the block. Raises UnsupportedModelError, saying what the block has instead."""
    try:
        return block.get_submodule(path)
    except AttributeError:
        parts = ", ".join(name for name, _ in block.named_children())
        raise UnsupportedModelError(
            f"{name} has no {path!r}, only {parts}. If it mixes tokens by something else than the layout's "
            "attention (linear attention, a state space model, a convolution), its Layout must say so: leaving it "
            "out would lose what flows through it, so the model is refused"
        ) from None


def _scale(gain: Tensor | None, before: Tensor, after: Tensor) -> Tensor:
    """s_i of ``after_i = s_i * gain ⊙ before_i`` (Eq. 13), by least squares. result: [r] float32"""
    unscaled = before.float() if gain is None else gain * before.float()
    return (unscaled * after.float()).sum(-1) / unscaled.square().sum(-1)

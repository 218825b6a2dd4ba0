"""What one block tells while the model runs, noted by plain hooks: O(N d) numbers, no attention pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flashtrace_plugin.core.flow.closure import closure_tolerance
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.flow.pattern import QKPattern
from flashtrace_plugin.errors import ClosureError, UnsupportedModelError
from flashtrace_plugin.models.read.attention import AttentionCall, MaskReader
from flashtrace_plugin.models.read.layouts import Layout
from flashtrace_plugin.models.read.projection import by_head


class BlockRecorder:
    """Notes the parts of one block at the rows that may carry weight, and keys and values at all positions.

    name: family and layer, for errors
    rows: [r] positions that may carry weight, increasing
    """

    def __init__(self, block: nn.Module, layout: Layout, rows: Tensor, name: str, masks: MaskReader) -> None:
        self.block, self.layout, self.rows, self.name, self.masks = block, layout, rows, name, masks
        self.attn = self.submodule(layout.attn)
        self.post_gain = None if layout.post_norm is None else _gain(self.submodule(layout.post_norm))
        self.seen: dict[str, Tensor] = {}
        self.pattern: QKPattern | None = None

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

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are in place inside the context and gone after it, also after an error."""
        with ExitStack() as stack:
            for path, side, name in self._taps():
                module = self.submodule(path)
                place = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
                stack.callback(place(self._note(side, name), with_kwargs=True).remove)
            if self.layout.reader is not None:
                stack.enter_context(self.layout.reader(self.attn, self.attention))
            yield

    def _taps(self) -> Iterator[tuple[str, str, str]]:
        """(module, its input or output, name)"""
        yield "", "input", "resid_pre"
        yield "", "output", "resid_post"
        if self.layout.mid is not None:
            yield self.layout.mid, "input", "resid_mid"
        else:
            yield self.layout.attn, "output", "attn_out"
            yield self.layout.mlp, "output", "mlp_out"
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
        """The rows of a [1, N, d] or [N, d] activation, copied because some families go on to write in place."""
        resid = (value if isinstance(value, Tensor) else value[0]).detach()
        return resid.reshape(-1, resid.shape[-1])[self.rows.to(resid.device)]

    def attention(self, module: nn.Module, call: AttentionCall) -> None:
        """Notes what the block's attention module works with; others are not asked for."""
        if module is not self.attn:
            return
        rows = self.rows.to(call.q.device)
        first_key, bias = self.masks.read(call)
        self.seen["v"] = call.v.detach()[0].clone()
        self.pattern = QKPattern(
            positions=rows,
            q=call.q.detach()[0, :, rows],
            k=call.k.detach()[0].clone(),
            scaling=call.options.get("scaling") or call.q.shape[-1] ** -0.5,
            first_key=first_key,
            softcap=call.options.get("softcap"),
            sinks=_detached(call.options.get("s_aux")),
            bias=bias if bias is None or bias.shape[1] == 1 else bias[:, rows],
        )

    def layer(self) -> Layer:
        """The record of this block. Raises UnsupportedModelError or ClosureError if the layout does not fit it."""
        pattern, seen = self._complete(), self.seen
        W_O, b_O = by_head(self.submodule(self.layout.W_O), pattern.q.shape[0], seen["v"], self.name)
        return Layer(
            pattern=pattern,
            # Flash attention is given MLA's values padded to the width of its keys.
            v=seen["v"][..., : W_O.shape[1]],
            W_O=W_O,
            b_O=b_O,
            resid_pre=seen["resid_pre"],
            resid_mid=seen["resid_mid"] if self.layout.mid is not None else self._parallel_mid(),
            resid_post=seen["resid_post"],
            post_gain=self._multiplier(W_O) if self.post_gain is None else self.post_gain,
            post_scale=seen.get("post_scale"),
            z_gate=None if self.layout.gate is None else _gate(seen["gate"], pattern.q.shape[0]),
        )

    def _complete(self) -> QKPattern:
        """The pattern, once everything that the layout names has been seen."""
        if self.pattern is None:
            raise UnsupportedModelError(
                f"{self.name}: {type(self.attn).__name__} does not hand its queries and keys to transformers' "
                "attention interface; load the model with attn_implementation='eager' or 'sdpa', or give its Layout "
                "a reader"
            )
        missing = [name for _, _, name in self._taps() if name not in self.seen and not name.startswith("norm_")]
        if missing:
            raise UnsupportedModelError(f"{self.name} never showed its {', '.join(missing)}; its layout is wrong")
        return self.pattern

    def _parallel_mid(self) -> Tensor:
        """resid_pre + attention branch, once the block is known to add its two branches to the stream."""
        pre, attn, mlp = (self.seen[name].float() for name in ("resid_pre", "attn_out", "mlp_out"))
        post = self.seen["resid_post"]
        size = sum(part.abs().sum(-1) for part in (pre, attn, mlp))
        gap = float(((post.float() - pre - attn - mlp).abs().sum(-1) / size).max())
        bound = closure_tolerance(post.dtype)
        if not gap <= bound:
            raise ClosureError(
                f"{self.name}: the block's output is not its input plus attention plus MLP (relative gap {gap:.1e}, "
                f"bound {bound:.0e}), so it is not the parallel block that its layout says"
            )
        return (pre + attn).to(post.dtype)

    def _multiplier(self, W_O: Tensor) -> Tensor | None:
        if self.layout.multiplier is None:
            return None
        return W_O.new_full(W_O.shape[-1:], getattr(self.block, self.layout.multiplier))


def _gain(norm: nn.Module) -> Tensor:
    """The gain of an RMS norm up to a factor, from what it makes of ones: w in most families, 1 + w in Gemma. [d]"""
    weight = next(norm.parameters())
    ones = torch.ones(1, weight.shape[-1], dtype=torch.float32, device=weight.device)
    with torch.no_grad():
        return norm(ones)[0].float()


def _scale(gain: Tensor | None, before: Tensor, after: Tensor) -> Tensor:
    """s_i of ``after_i = s_i * gain ⊙ before_i`` (Eq. 13), by least squares. result: [r] float32"""
    unscaled = before.float() if gain is None else gain * before.float()
    return (unscaled * after.float()).sum(-1) / unscaled.square().sum(-1)


def _gate(projected: Tensor, heads: int) -> Tensor:
    """The gate of a projection that gives each head its query and then its gate's logits. result: [H, r, d_h]"""
    return projected.unflatten(-1, (heads, 2, -1))[:, :, 1].sigmoid().transpose(0, 1)


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()

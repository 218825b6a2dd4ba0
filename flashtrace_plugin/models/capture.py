"""Streaming capture: one forward pass of the untouched model, noting what attribution needs and no more.

Kept per layer: queries and residual stream at the rows that may carry weight, keys and values at all
positions. That is O(N d); no attention pattern is ever stored.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashtrace_plugin.core.layer import Layer
from flashtrace_plugin.core.pattern import QKPattern
from flashtrace_plugin.errors import ClosureError, InputError, UnsupportedModelError
from flashtrace_plugin.models.attention import AttentionCall, first_keys, recording
from flashtrace_plugin.models.guard import evaluating
from flashtrace_plugin.models.layouts import Layout, layout_for
from flashtrace_plugin.models.projection import by_head

CHECKED_TOKENS = 128
"""The first run of a model compares its logits with and without recording on this many tokens."""

_verified: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass
class _Notes:
    """What the hooks of one block have seen."""

    resid_pre: Tensor | None = None
    resid_mid: Tensor | None = None
    resid_post: Tensor | None = None
    pattern: QKPattern | None = None
    v: Tensor | None = None


@dataclass
class _Recorder:
    """Fills one _Notes per block. ``rows`` [r] are the positions that may carry weight, increasing."""

    rows: Tensor
    notes: list[_Notes]
    index: dict[nn.Module, int] = field(default_factory=dict)
    masks: dict[int, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)

    def pick(self, resid: Tensor) -> Tensor:
        """Rows of a [1, N, d] activation, cloned because some families go on to write in place."""
        return resid.detach()[0, self.rows.to(resid.device)]

    def attention(self, module: nn.Module, call: AttentionCall) -> None:
        if module not in self.index:
            return
        notes, rows = self.notes[self.index[module]], self.rows.to(call.q.device)
        first_key, bias = self._mask(call)
        notes.v = call.v.detach()[0].clone()
        notes.pattern = QKPattern(
            positions=rows,
            q=call.q.detach()[0, :, rows],
            k=call.k.detach()[0].clone(),
            scaling=call.options.get("scaling") or call.q.shape[-1] ** -0.5,
            first_key=first_key,
            softcap=call.options.get("softcap"),
            sinks=call.options.get("s_aux"),
            bias=None if bias is None else bias[:, rows],
        )

    def _mask(self, call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
        key = id(call.mask)
        if call.mask is None:
            return first_keys(call)
        if key not in self.masks:  # one mask serves every layer of its kind
            self.masks[key] = first_keys(call)
        return self.masks[key]


def capture(model: PreTrainedModel, input_ids: Tensor, rows: Tensor) -> list[Layer]:
    """Runs the model once and returns its layers, ready for :mod:`flashtrace_plugin.core`.

    input_ids: [1, N]
    rows:      [r]     positions that may carry weight, increasing

    Raises UnsupportedModelError for a family that is not in the table, InputError for activations that are
    not finite, ClosureError when recording changes the model's logits. The model is left as it was found.
    """
    layout = layout_for(model.config.get_text_config().model_type)
    with torch.no_grad(), evaluating(model):
        if model not in _verified:
            _verify_logits(model, layout, input_ids[:, :CHECKED_TOKENS])
        recorder, _ = _record(model, layout, input_ids, rows)
        blocks = model.get_submodule(layout.blocks)
        return [_layer(block, layout, notes) for block, notes in zip(blocks, recorder.notes, strict=True)]


def _record(model: PreTrainedModel, layout: Layout, input_ids: Tensor, rows: Tensor) -> tuple[_Recorder, Tensor]:
    blocks = list(model.get_submodule(layout.blocks))
    recorder = _Recorder(rows, [_Notes() for _ in blocks])
    recorder.index = {block.get_submodule(layout.attn): i for i, block in enumerate(blocks)}
    with recording(model, recorder.attention), _hooks(blocks, layout, recorder):
        logits = _last_logits(model, input_ids)
    if not bool(torch.isfinite(logits).all()):
        raise InputError(
            "the model's activations are not finite (NaN or infinity in the logits); "
            "check the weights, or load the model in bfloat16 or float32"
        )
    return recorder, logits


@contextmanager
def _hooks(blocks: list[nn.Module], layout: Layout, recorder: _Recorder) -> Iterator[None]:
    with ExitStack() as stack:
        for block, notes in zip(blocks, recorder.notes, strict=True):
            mid = block.get_submodule(layout.mid)
            handles = (
                block.register_forward_pre_hook(_note_input(recorder, notes, "resid_pre"), with_kwargs=True),
                mid.register_forward_pre_hook(_note_input(recorder, notes, "resid_mid"), with_kwargs=True),
                block.register_forward_hook(_note_output(recorder, notes)),
            )
            for handle in handles:
                stack.callback(handle.remove)
        yield


def _note_input(recorder: _Recorder, notes: _Notes, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        setattr(notes, name, recorder.pick(args[0] if args else kwargs["hidden_states"]))

    return hook


def _note_output(recorder: _Recorder, notes: _Notes) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        notes.resid_post = recorder.pick(output if isinstance(output, Tensor) else output[0])

    return hook


def _last_logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits of the last position [vocabulary]; the others are never computed where the model can skip them."""
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=input_ids, use_cache=False, **options).logits[0, -1]


def _verify_logits(model: PreTrainedModel, layout: Layout, input_ids: Tensor) -> None:
    """Closure cannot see a recording that changes the computation, so the logits are compared once per model."""
    plain = _last_logits(model, input_ids)
    _, recorded = _record(model, layout, input_ids, torch.tensor([input_ids.shape[1] - 1]))
    gap = float((plain - recorded).abs().max() / plain.abs().max())
    if gap > 1e-5:
        raise ClosureError(
            f"{type(model).__name__} gives other logits while it is recorded (relative gap {gap:.1e}, bound 1e-5); "
            "load it with attn_implementation='eager' or 'sdpa'"
        )
    _verified.add(model)


def _layer(block: nn.Module, layout: Layout, notes: _Notes) -> Layer:
    if notes.pattern is None or notes.v is None:
        raise UnsupportedModelError(
            f"{type(block).__name__} does not hand its queries and keys to transformers' attention interface"
        )
    if notes.resid_pre is None or notes.resid_mid is None or notes.resid_post is None:
        raise UnsupportedModelError(f"{type(block).__name__} did not run {layout.mid!r}; its layout is wrong")
    W_O, b_O = by_head(block.get_submodule(layout.W_O), notes.pattern.q.shape[0])
    return Layer(notes.pattern, notes.v, W_O, b_O, notes.resid_pre, notes.resid_mid, notes.resid_post)

"""Streaming capture: one forward pass of a view of the model, noting what attribution needs and no more.

Kept per layer: queries and residual stream at the rows that may carry weight, keys and values at all
positions. That is O(N d); no attention pattern is ever stored.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.errors import ClosureError, InputError, UnsupportedModelError
from flashtrace_plugin.models.read.attention import MaskReader, recording
from flashtrace_plugin.models.read.block import BlockRecorder
from flashtrace_plugin.models.read.layouts import Layout, layout_of, transformer_blocks
from flashtrace_plugin.models.user_hooks import whole_text
from flashtrace_plugin.models.view import view_of

_CHECKED_TOKENS = 128
"""The first run of a model with a kernel compares its logits with and without recording on this many tokens."""

_LOGIT_TOLERANCE = 1e-5

_verified: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Models whose logits were compared, and the kernel of attention that they had then."""


def capture(model: PreTrainedModel, input_ids: Tensor, rows: Tensor) -> list[Layer]:
    """Runs the model once and returns its layers, ready for :mod:`flashtrace_plugin.core`.

    input_ids: [1, N]
    rows:      [r]     positions that may carry weight, increasing

    Raises UnsupportedModelError for a family that is not in the table or a block that its layout does not fit,
    InputError for activations that are not finite, ClosureError when recording changes the model's logits or a
    parallel block does not add up. A view of the model is run, so the model is never touched.
    """
    layout = layout_of(model)
    with torch.no_grad():
        if _verified.get(model) != _kernel_name(model):
            _verify_logits(model, input_ids if whole_text(model) else input_ids[:, :_CHECKED_TOKENS])
        recorders, _ = _record(view_of(model), layout, input_ids, rows)
        return [recorder.layer() for recorder in recorders]


def _record(
    view: PreTrainedModel, layout: Layout, input_ids: Tensor, rows: Tensor
) -> tuple[list[BlockRecorder], Tensor]:
    masks, family = MaskReader(), _family_name(view)
    recorders = [
        BlockRecorder(block, layout, rows, f"{family}, layer {i}", masks)
        for i, block in enumerate(transformer_blocks(view))
    ]
    _check_apart(recorders)
    with ExitStack() as stack:
        if layout.reader is None:
            stack.enter_context(recording(view, {recorder.attn: recorder.attention for recorder in recorders}))
        for recorder in recorders:
            recorder.watch(stack)
        stack.callback(view.get_input_embeddings().register_forward_pre_hook(_same_ids(input_ids)).remove)
        logits = _last_logits(view, input_ids)
    if not bool(torch.isfinite(logits).all()):
        raise InputError(
            "the model's activations are not finite (NaN or infinity in the logits); "
            "check the weights, or load the model in bfloat16 or float32"
        )
    return recorders, logits


def _same_ids(input_ids: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that refuses to embed other tokens than those that scores are given to."""

    def check(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args and not torch.equal(args[0].to(input_ids.device), input_ids):
            raise InputError(
                "a hook changes the token ids before they are embedded, so scores would be given to tokens that the "
                "model does not read; remove it, and pass the ids that it makes"
            )

    return check


def _check_apart(recorders: Sequence[BlockRecorder]) -> None:
    """Raises UnsupportedModelError for a module of two layers, whose second call would be noted for both."""
    owners: dict[nn.Module, int] = {}
    for i, recorder in enumerate(recorders):
        for path, module in recorder.watched():
            if owners.setdefault(module, i) != i:
                raise UnsupportedModelError(
                    f"{recorder.name} shares its {path or 'block'!r} with layer {owners[module]}, so what the two "
                    "compute cannot be told apart; give each a module of its own, such as copy.deepcopy makes"
                )


def _family_name(model: PreTrainedModel) -> str:
    """The family as the table of layouts spells it: the text model's ``model_type``."""
    return model.config.get_text_config().model_type


def _kernel_name(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config()._attn_implementation)


def _last_logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits of the last position [vocabulary]; the others are never computed where the model can skip them."""
    # As a position: told how many, Gemma 4 computes its last layers for those rows only.
    keep = {"logits_to_keep": torch.tensor([input_ids.shape[1] - 1])}
    options = keep if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=input_ids, use_cache=False, **options).logits[0, -1]


def logit_gap(model: PreTrainedModel, input_ids: Tensor) -> float:
    """Largest difference between the last logits with and without recording, relative to the largest logit."""
    view = view_of(model)
    with torch.no_grad():
        plain = _last_logits(view, input_ids)
        last = torch.tensor([input_ids.shape[1] - 1])
        _, recorded = _record(view, layout_of(model), input_ids, last)
    return float((plain - recorded).abs().max() / plain.abs().max())


def _verify_logits(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Closure cannot see a recording that changes the computation, so the logits are compared once per model."""
    gap = logit_gap(model, input_ids)
    if not gap <= _LOGIT_TOLERANCE:
        raise ClosureError(
            f"{_family_name(model)}: {type(model).__name__} gives other logits while it is recorded (relative gap "
            f"{gap:.1e}, bound {_LOGIT_TOLERANCE:.0e}); load it with attn_implementation='eager' or 'sdpa'"
        )
    _verified[model] = _kernel_name(model)

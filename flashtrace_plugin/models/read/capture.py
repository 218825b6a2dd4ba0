"""Streaming capture: one forward pass of a view of the model, noting what attribution needs and no more.

Kept per layer: queries and residual stream at the rows that may carry weight, keys and values at all
positions. That is O(N d); no attention pattern is ever stored.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.errors import ClosureError, InputError, UnsupportedModelError
from flashtrace_plugin.models.inputs import placeholders, run_with
from flashtrace_plugin.models.read.attention import MaskReader, recording
from flashtrace_plugin.models.read.block import BlockRecorder
from flashtrace_plugin.models.read.layouts import Layout, layout_of, transformer_blocks
from flashtrace_plugin.models.read.recurrence import keeps_state
from flashtrace_plugin.models.read.texts import Texts
from flashtrace_plugin.models.user_hooks import hooked, whole_text
from flashtrace_plugin.models.view import view_of

_CHECKED_TOKENS = 128
"""The first run of a model with a kernel compares its logits with and without recording on this many tokens."""

_LOGIT_TOLERANCE = 1e-5

_verified: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Models whose logits were compared, and the kernel of attention that they had then."""

_together: weakref.WeakKeyDictionary[nn.Module, tuple[str, bool]] = weakref.WeakKeyDictionary()
"""Models that were run on two texts at once, the kernel of attention then, and whether a text had its own logits."""

_multiplying: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()
"""Models where nothing but multiplication was found behind the recurrences, and the layout by which they were read."""


def capture(
    model: PreTrainedModel, input_ids: Tensor, rows: Tensor, inputs: Mapping[str, Any] | None = None
) -> list[Layer]:
    """Runs the model once and returns its layers, ready for :mod:`flashtrace_plugin.core`.

    input_ids: [1, N]
    rows:      [r]     positions that may carry weight, increasing
    inputs:    what else the model is given: images and what belongs to them

    Raises UnsupportedModelError for a family that is not in the table or a block that its layout does not fit,
    InputError for activations that are not finite, ClosureError when recording changes the model's logits or a
    parallel block does not add up. A view of the model is run, so the model is never touched.
    """
    layout, given = layout_of(model), inputs or {}
    with torch.no_grad():
        some = input_ids if given or whole_text(model) else input_ids[:, :_CHECKED_TOKENS]
        if _verified.get(model) != _checked_as(model, given):
            _verify_logits(model, some, given)
        recorders, _ = _record(view_of(model), layout, Texts([input_ids[0]], [rows]), given)
        divides = any(mixer.o is not None for recorder in recorders for mixer in recorder.mixers)
        if divides and (_multiplying.get(model) != layout or hooked(model)):
            _verify_gates(model, some, layout, given)
        (layers,) = _layers(recorders)
        return layers


def capture_together(model: PreTrainedModel, texts: Sequence[Tensor], rows: Sequence[Tensor]) -> list[list[Layer]]:
    """:func:`capture` of several texts in one forward pass, or in one each where that would change the numbers.

    texts: ids [n] of each;  rows: [r] of each

    Texts after a row cannot change it, except where :func:`whole_text` says so, so the shorter ones are padded at the
    right. That this is so for the model and its kernel is looked at once, by its logits, before it is relied upon.
    Recurrences are run apart.
    """
    layout = layout_of(model)
    apart = whole_text(model) or keeps_state(model) or len(texts) == 1 or not _runs_together(model, texts)
    if apart:
        return [capture(model, ids[None], own) for ids, own in zip(texts, rows, strict=True)]
    with torch.no_grad():
        return _layers(_record(view_of(model), layout, Texts(texts, rows), {})[0])


def _layers(recorders: Sequence[BlockRecorder]) -> list[list[Layer]]:
    """The layers of every text."""
    return [list(layers) for layers in zip(*(recorder.layers() for recorder in recorders), strict=True)]


def _record(
    view: PreTrainedModel, layout: Layout, texts: Texts, inputs: Mapping[str, Any], *, flip: bool = False
) -> tuple[list[BlockRecorder], Tensor]:
    masks, family, input_ids = MaskReader(), _family_name(view), texts.input_ids
    recorders = [
        BlockRecorder(block, layout, texts, f"{family}, layer {i}", masks)
        for i, block in enumerate(transformer_blocks(view))
    ]
    _check_apart(recorders)
    for mixer in (mixer for recorder in recorders for mixer in recorder.mixers):
        mixer.flip = flip
    with ExitStack() as stack:
        own = [mixer for recorder in recorders for mixer in recorder.mixers if mixer.layout.reader is None]
        if own:
            stack.enter_context(recording(view, {mixer.attn: mixer.note for mixer in own}))
        for recorder in recorders:
            recorder.watch(stack)
        same = _same_ids(input_ids, placeholders(view.config) if inputs else [])
        stack.callback(view.get_input_embeddings().register_forward_pre_hook(same).remove)
        logits = _last_logits(view, input_ids, texts.lengths, inputs)
    if not bool(torch.isfinite(logits).all()):
        raise InputError(
            "the model's activations are not finite (NaN or infinity in the logits); "
            "check the weights, or load the model in bfloat16 or float32"
        )
    return recorders, logits


def _same_ids(input_ids: Tensor, placeholders: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that refuses to embed other tokens than those that scores are given to.

    placeholders: ids in whose place the model puts an image, so that what it embeds there is lost
    """
    free = torch.isin(input_ids, torch.tensor(placeholders, dtype=torch.long, device=input_ids.device))

    def check(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args and not torch.equal(args[0].to(input_ids.device).where(~free, input_ids), input_ids):
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


def _last_logits(
    model: PreTrainedModel, input_ids: Tensor, lengths: Sequence[int], inputs: Mapping[str, Any]
) -> Tensor:
    """Logits of each last position [B, vocabulary]; others are never computed where the model can skip them."""
    ends = sorted(set(lengths))
    at = [ends.index(length) for length in lengths]
    # As positions: told how many, Gemma 4 computes its last layers for those rows only.
    keep = torch.tensor(ends) - 1
    options = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = run_with(model, input_ids, inputs, **options).logits
    return (logits if options else logits[:, keep])[range(len(at)), at]


def _checked_as(model: PreTrainedModel, inputs: Mapping[str, Any]) -> str:
    """What the logits of a model are checked for once: its kernel, and the kinds of its inputs."""
    return " ".join([_kernel_name(model), *sorted(inputs)])


def logit_gap(
    model: PreTrainedModel, input_ids: Tensor, inputs: Mapping[str, Any] | None = None, *, flip: bool = False
) -> float:
    """Largest difference between the last logits with and without recording, relative to the largest logit.

    flip: with signs turned between recurrences and their output projections
    """
    view, length, given = view_of(model), input_ids.shape[1], inputs or {}
    with torch.no_grad():
        plain = _last_logits(view, input_ids, [length], given)
        last = torch.tensor([length - 1])
        _, recorded = _record(view, layout_of(model), Texts([input_ids[0]], [last]), given, flip=flip)
    return _gap(plain, recorded)


def _gap(plain: Tensor, other: Tensor) -> float:
    return float((plain - other).abs().max() / plain.abs().max())


def _verify_logits(model: PreTrainedModel, input_ids: Tensor, inputs: Mapping[str, Any]) -> None:
    """Closure cannot see a recording that changes the computation, so the logits are compared once per model."""
    gap = logit_gap(model, input_ids, inputs)
    if not gap <= _LOGIT_TOLERANCE:
        raise ClosureError(
            f"{_family_name(model)}: {type(model).__name__} gives other logits while it is recorded (relative gap "
            f"{gap:.1e}, bound {_LOGIT_TOLERANCE:.0e}); load it with attn_implementation='eager' or 'sdpa'"
        )
    _verified[model] = _checked_as(model, inputs)


def _runs_together(model: PreTrainedModel, texts: Sequence[Tensor]) -> bool:
    """Whether texts padded at the right have the logits that they have alone: looked at once per model and kernel.

    Half precision rounds differently in larger products, so that its texts are mostly run apart.
    """
    known = _together.get(model)
    if known is None or known[0] != _kernel_name(model):
        known = _together[model] = _kernel_name(model), together_gap(model, texts) <= _LOGIT_TOLERANCE
    return known[1]


def together_gap(model: PreTrainedModel, texts: Sequence[Tensor]) -> float:
    """Largest difference between the last logits of a text alone and beside a longer one, as :func:`logit_gap`."""
    shorter = min(texts, key=len)[:_CHECKED_TOKENS]
    longer = torch.cat([shorter.flip(0), shorter[: max(1, len(shorter) // 2)]])
    view, lengths = view_of(model), [len(shorter), len(longer)]
    with torch.no_grad():
        alone = _last_logits(view, shorter[None], lengths[:1], {})
        texts_of = Texts([shorter, longer], [torch.tensor([n - 1]) for n in lengths])
        _, beside = _record(view, layout_of(model), texts_of, {})
    return _gap(alone, beside[:1])


def _verify_gates(model: PreTrainedModel, input_ids: Tensor, layout: Layout, inputs: Mapping[str, Any]) -> None:
    """Nor can it see what adds to what a recurrence has read, or mixes it, since what it becomes is divided by it."""
    gap = logit_gap(model, input_ids, inputs, flip=True)
    if not gap <= _LOGIT_TOLERANCE:
        raise ClosureError(
            f"{_family_name(model)}: between a recurrence of {type(model).__name__} and its output projection stands "
            f"what does not only multiply (relative gap of the logits {gap:.1e}, bound {_LOGIT_TOLERANCE:.0e}), so "
            "that what a token writes is not known; its layout is wrong, or a hook is there"
        )
    _multiplying[model] = layout

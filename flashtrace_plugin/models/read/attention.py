"""Queries, keys and values as attention really reads them, from the model's own kernel.

Transformers hands every attention module's ``q, k, v`` (after rotary embedding and norms), mask, scaling,
soft cap and sinks to a function chosen by name. For each kernel a second name is registered, ``recorded_<kernel>``,
which notes these and then calls the kernel itself, so the forward pass computes what it always computes. A view of the
model chooses that name; the user's model keeps its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flashtrace_plugin.errors import UnsupportedModelError

_PREFIX = "recorded_"

_NOTE = "flashtrace_note"
"""Attribute of an attention module that is recorded."""

Note = Callable[[nn.Module, "AttentionCall"], Any]


@dataclass(frozen=True)
class AttentionCall:
    """What one attention module handed to its kernel.

    kernel: "sdpa", "eager", ...
    q: [1, H, N, d_k];  k: [1, H_kv, N, d_k];  v: [1, H_kv, N, d_h];  mask: the kernel's own form, or None
    """

    kernel: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    options: dict[str, Any]


def kernel(module: nn.Module, name: str) -> Callable[..., Any]:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    # Each modelling file has its own eager function; a subclass defined elsewhere inherits that of its parent.
    files = (inspect.getmodule(cls) for cls in type(module).__mro__)
    return next(f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward"))  # type: ignore


def _recorded(name: str) -> Callable[..., Any]:
    # Some families pass these by name, so the names are transformers'.
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **options: Any
    ) -> Any:
        note = vars(module).get(_NOTE)
        if note is not None:
            told = options | {"is_causal": _is_causal(module, name, options)}
            note(module, AttentionCall(name, query, key, value, attention_mask, told))
        return kernel(module, name)(module, query, key, value, attention_mask, *args, **options)

    return attention


def _is_causal(module: nn.Module, name: str, options: Mapping[str, Any]) -> bool:
    """Whether a call without a mask is causal; eager attention then hides nothing, and others ask the module."""
    given = options.get("is_causal")
    return name != "eager" and bool(getattr(module, "is_causal", True) if given is None else given)


def _register(name: str) -> str:
    recorded = _PREFIX + name
    AttentionInterface.register(recorded, _recorded(name))
    # The mask depends on the kernel's name, so the recorded name must build the same one.
    AttentionMaskInterface.register(recorded, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return recorded


@contextmanager
def recording(view: PreTrainedModel, notes: Mapping[nn.Module, Note]) -> Iterator[None]:
    """While active, each note sees what its attention module of a view hands to its kernel."""
    # A module may have a configuration of its own, as one that was copied from another layer has.
    known = [getattr(module, "config", None) for module in view.modules()]
    configs = {id(config): config for config in known if isinstance(config, PretrainedConfig)}
    names = {key: _register(config._attn_implementation or "eager") for key, config in configs.items()}
    for key, config in configs.items():  # only now, since a configuration hands its choice on to those inside it
        config._attn_implementation = names[key]
    for module, note in notes.items():
        vars(module)[_NOTE] = note
    try:
        yield
    finally:
        for module in notes:  # a note that stays would hold its layer's activations in a circle
            vars(module).pop(_NOTE, None)


class MaskReader:
    """Reads masks once: one serves every layer of its kind, and N x N comparisons cost as much as attention itself."""

    def __init__(self) -> None:
        self._known: list[tuple[Any, _Mask]] = []

    def read(self, call: AttentionCall) -> _Mask:
        """The mask as one interval of keys per query, and what else is added to the scores.

        Causal masks, sliding windows, chunks, left padding, and images or prefixes that are read as a whole are
        intervals, so 2 N numbers replace an N x N tensor.

        result: first_key [N] or None (from the first), last_key [N] or None (up to the query itself),
                bias [H or 1, N or 1, N] or None
        """
        first, last, bias = self._mask(call)
        extra = call.options.get("position_bias")
        if extra is None:
            return first, last, bias
        return first, last, extra[0].detach() if bias is None else bias + extra[0].detach()

    def _mask(self, call: AttentionCall) -> _Mask:
        if call.mask is None:
            return *_keys(call), None
        for mask, parts in self._known:
            if mask is call.mask:
                return parts
        parts = *_keys(call), _mask_bias(call)
        self._known.append((call.mask, parts))
        return parts


_Mask = tuple[Tensor | None, Tensor | None, Tensor | None]
_Keys = tuple[Tensor | None, Tensor | None]
"""First and last key that each query reads, [N] each; None for the first of all, and for the query itself."""


def _keys(call: AttentionCall) -> _Keys:
    """The keys that each query reads.

    Raises UnsupportedModelError if they are anything but an interval that holds the query itself.
    """
    mask, length = call.mask, call.q.shape[-2]
    if isinstance(mask, BlockMask):
        return _interval(length, lambda rows, keys: mask.mask_mod(*_zeros(rows), rows, keys), call.q.device)
    if mask is None and not call.options.get("is_causal", True):
        return None, torch.full((length,), length - 1, dtype=torch.long, device=call.q.device)
    if "flash" in call.kernel:
        return _flash_start(call), None
    if mask is None:
        return None, None
    seen = mask[0, 0, :length, :length]
    if seen.dtype != torch.bool:
        seen = seen > torch.finfo(seen.dtype).min / 2
    return _interval(length, lambda rows, keys: seen[rows[:, 0]], seen.device)


def _mask_bias(call: AttentionCall) -> Tensor | None:
    """What a float mask adds where it lets through: [H or 1, N, N], or None."""
    if not isinstance(call.mask, Tensor) or not call.mask.is_floating_point():
        return None
    length = call.q.shape[-2]
    added = call.mask[0, :, :length, :length]
    biased = any(bool((rows * (rows > torch.finfo(rows.dtype).min / 2)).any()) for rows in added.split(_ROWS, 1))
    return added.detach() if biased else None


def _flash_start(call: AttentionCall) -> Tensor | None:
    if call.mask is not None:
        raise UnsupportedModelError(
            "flash attention was given a padding mask; pass one sequence at a time, without padding"
        )
    window = call.options.get("sliding_window")
    if window is None:
        return None
    return (torch.arange(call.q.shape[-2], device=call.q.device) - window + 1).clamp_min(0)


def _zeros(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Batch and head for which flex attention's mask is read."""
    return rows.new_zeros(()), rows.new_zeros(())


_ROWS = 256


def _interval(length: int, seen: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> _Keys:
    """First and last allowed key per query. ``seen(rows [r, 1], keys [N])`` is [r, N] bool."""
    keys = torch.arange(length, device=device)
    edges = [_edges(seen, rows[:, None], keys) for rows in keys.split(_ROWS)]
    first, last = (torch.cat(each) for each in zip(*edges, strict=True))
    return None if bool((first == 0).all()) else first, None if bool((last == keys).all()) else last


def _edges(seen: Callable[[Tensor, Tensor], Tensor], queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    visible = seen(queries, keys).expand(len(queries), len(keys))
    # A query that may see nothing (padding) is given itself, so that its softmax stays finite.
    blind, rows = ~visible.any(-1), visible.to(torch.uint8)
    first = torch.where(blind, queries[:, 0], rows.argmax(-1))
    last = torch.where(blind, queries[:, 0], len(keys) - 1 - rows.flip(-1).argmax(-1))
    inside = (first <= queries[:, 0]) & (queries[:, 0] <= last) & (rows.sum(-1) == last - first + 1)
    if not bool((inside | blind).all()):
        raise UnsupportedModelError(
            "the attention mask is not one interval of keys around each query; only causal masks (also with a window, "
            "chunks or padding), and images and prefixes that are read as a whole, can be attributed"
        )
    return first, last

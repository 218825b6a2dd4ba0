"""Queries, keys and values as attention really reads them, from the untouched model and its own kernel.

Transformers hands every attention module's ``q, k, v`` (after rotary embedding and norms), mask, scaling,
soft cap and sinks to a function chosen by name. For each kernel a second name is registered, ``recorded_<kernel>``,
which notes these and then calls the kernel itself, so the forward pass computes what it always computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flashtrace_plugin.errors import UnsupportedModelError

PREFIX = "recorded_"

Note = Callable[[nn.Module, "AttentionCall"], None]
_note: ContextVar[Note | None] = ContextVar("flashtrace_attention_note", default=None)


@dataclass(frozen=True)
class AttentionCall:
    """What one attention module handed to its kernel.

    q: [1, H, N, d_k];  k: [1, H_kv, N, d_k];  v: [1, H_kv, N, d_h];  mask: kernel's own form or None
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    options: dict[str, Any]


def _kernel(module: nn.Module, name: str) -> Callable[..., Any]:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    return inspect.getmodule(type(module)).eager_attention_forward  # type: ignore[union-attr]


def _recorded(name: str) -> Callable[..., Any]:
    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **options: Any) -> Any:
        note = _note.get()
        if note is not None:
            note(module, AttentionCall(q, k, v, mask, options))
        return _kernel(module, name)(module, q, k, v, mask, *args, **options)

    return attention


def _register(name: str) -> str:
    recorded = PREFIX + name
    AttentionInterface.register(recorded, _recorded(name))
    # The mask depends on the kernel's name, so the recorded name must build the same one.
    AttentionMaskInterface.register(recorded, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return recorded


@contextmanager
def recording(model: PreTrainedModel, note: Note) -> Iterator[None]:
    """While active, ``note`` sees what every attention module of ``model`` hands to its kernel.

    The attention implementation of every configuration in the model is put back on leaving, also after an error.
    """
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    token = _note.set(note)
    try:
        for key, config in configs.items():
            config._attn_implementation = _register(before[key] or "eager")
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        _note.reset(token)


def first_keys(call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
    """The mask as one interval of keys per query, ``first_key[i]..i``, plus what is left of it as a bias.

    Causal masks, sliding windows, chunks and left padding are intervals, so N numbers replace an N x N tensor.

    result: (first_key [N] or None, bias [H or 1, N, N] or None); (None, None) is plain causal attention
    """
    mask, length = call.mask, call.q.shape[-2]
    if not isinstance(mask, Tensor):
        window = call.options.get("sliding_window")
        return (None if window is None else _window_start(length, window, call.q.device)), None
    if mask.dim() == 2:  # flash attention: the padding mask itself
        raise UnsupportedModelError(
            "a padded batch with flash attention is not supported; pass one sequence at a time"
        )
    mask = mask[0, :, :length, :length]
    if mask.dtype == torch.bool:
        return _interval(mask[0]), None
    open_ = mask > torch.finfo(mask.dtype).min / 2
    if bool((mask * open_ == 0).all()):
        return _interval(open_[0]), None
    return _interval(open_[0]), mask


def _window_start(length: int, window: int, device: torch.device) -> Tensor:
    return (torch.arange(length, device=device) - window + 1).clamp_min(0)


def _interval(allowed: Tensor) -> Tensor | None:
    """allowed: [N, N] bool -> first allowed key per query [N]; None when it is 0 everywhere (plain causal)."""
    first = torch.cat([_block_start(allowed, begin) for begin in range(0, len(allowed), _ROWS)])
    return None if bool((first == 0).all()) else first


_ROWS = 256


def _block_start(allowed: Tensor, begin: int) -> Tensor:
    rows = allowed[begin : begin + _ROWS]
    keys = torch.arange(rows.shape[1], device=rows.device)
    queries = begin + torch.arange(len(rows), device=rows.device)
    # A query that may see nothing (padding) is given itself, so that its softmax stays finite.
    blind = ~rows.any(-1)
    first = torch.where(blind, queries, rows.to(torch.uint8).argmax(-1))
    interval = (keys >= first[:, None]) & (keys <= queries[:, None])
    if not bool(((interval == rows).all(-1) | blind).all()):
        raise UnsupportedModelError(
            "the attention mask is not one interval of keys ending at each query; only causal masks "
            "(also with a window, chunks or padding) can be attributed"
        )
    return first

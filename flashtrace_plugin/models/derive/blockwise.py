"""Attention by blocks of queries that keeps no pattern for its derivatives, first or second.

Differentiating twice through plain attention keeps three [H, N, N] tensors per layer. Here a layer keeps its queries,
keys, values and the gradient of its output, and forms the patterns again, one block of queries at a time, when they
are needed. A block runs the model's own eager kernel on the keys that its mask lets through, so a causal layer does
half of the work of the plain kernel, and the temporaries of a block stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from flashtrace_plugin.core.flow.pattern import BLOCK_BYTES, MIN_BLOCK_ROWS, block_bytes
from flashtrace_plugin.models.read.attention import kernel
from flashtrace_plugin.models.read.layouts import Reader, layout_for, supported_families
from flashtrace_plugin.models.read.own_attention import inner_attn, shadowed

NAME = "blockwise_eager"

_Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""The model's own attention of a block's q, k, v and mask. result: [1, rows, H, d]"""


@dataclass(frozen=True)
class _Block:
    """Consecutive queries with the keys that they read, and where both are in the layer's tensors.

    grad: in the output's gradient [1, N, H, d]
    q:    in the queries [1, H, N, d]
    k:    in keys and values
    mask: in the mask
    """

    rows: slice
    keys: slice

    @property
    def grad(self) -> tuple[Any, ...]:
        return slice(None), self.rows

    @property
    def q(self) -> tuple[Any, ...]:
        return ..., self.rows, slice(None)

    @property
    def k(self) -> tuple[Any, ...]:
        return ..., self.keys, slice(None)

    @property
    def mask(self) -> tuple[Any, ...]:
        return ..., self.rows, self.keys

    @property
    def qkv(self) -> tuple[tuple[Any, ...], ...]:
        return self.q, self.k, self.k


class BlockedLayer:
    """One layer's attention, cut into blocks of queries.

    mask: [1, 1 or H, queries, keys] as eager kernels take it, or None for none
    """

    def __init__(self, attend: _Attend, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        self._attend, self.mask = attend, mask
        queries, self.length = q.shape[-2], k.shape[-2]
        size = max(MIN_BLOCK_ROWS, block_bytes(q.device, BLOCK_BYTES) // (4 * q.shape[1] * self.length))
        parts = [slice(a, min(a + size, queries)) for a in range(0, queries, size)]
        self.blocks = [_Block(rows, self._keys(rows)) for rows in parts]

    def _keys(self, rows: slice) -> slice:
        """From the first key to the last that these queries may read; all of them if they may read none."""
        if self.mask is None:
            return slice(0, self.length)
        mask = self.mask[..., rows, : self.length]
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        read = allowed.flatten(0, -2).any(0).nonzero()
        return slice(int(read[0]), int(read[-1]) + 1) if len(read) else slice(0, self.length)

    def attend(self, block: _Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output of a block's queries, from its own parts of q, k and v. result: [1, rows, H, d]"""
        return self._attend(q, k, v, None if self.mask is None else self.mask[block.mask])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: BlockedLayer, *qkv: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*qkv)
        return torch.cat([layer.attend(block, *_parts(qkv, block.qkv)) for block in layer.blocks], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Gradient.apply(ctx.layer, *grads, *ctx.saved_tensors)


class _Gradient(torch.autograd.Function):
    """Gradients by q, k and v as a function of the output's gradient and q, k, v."""

    @staticmethod
    def forward(ctx: Any, layer: BlockedLayer, grad: Tensor, *qkv: Tensor) -> tuple[Tensor, ...]:
        ctx.layer = layer
        ctx.save_for_backward(grad, *qkv)
        sums = _Sums(*qkv)
        for block in layer.blocks:
            leaves = _leaves(qkv, block.qkv)
            with torch.enable_grad():
                parts = torch.autograd.grad(layer.attend(block, *leaves), leaves, grad[block.grad])
            sums.add(parts, block.qkv)
        return sums.totals()

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives of the gradients times ``vectors``, which are shaped like q, k and v."""
        layer, inputs = ctx.layer, ctx.saved_tensors
        sums = _Sums(*inputs)
        for block in layer.blocks:
            places = block.grad, *block.qkv
            grad, *qkv = leaves = _leaves(inputs, places)
            with torch.enable_grad():
                first = torch.autograd.grad(layer.attend(block, *qkv), qkv, grad, create_graph=True)
            sums.add(torch.autograd.grad(first, leaves, _parts(vectors, block.qkv)), places)
        return None, *sums.totals()


_Places = tuple[tuple[Any, ...], ...]


def _parts(tensors: tuple[Tensor, ...], places: _Places) -> list[Tensor]:
    return [tensor[place] for tensor, place in zip(tensors, places, strict=True)]


def _leaves(tensors: tuple[Tensor, ...], places: _Places) -> list[Tensor]:
    return [part.detach().requires_grad_() for part in _parts(tensors, places)]


class _Sums:
    """Sums of the blocks' parts, each shaped like one of the layer's tensors; at least float32 while they grow."""

    def __init__(self, *like: Tensor) -> None:
        self.dtypes = [x.dtype for x in like]
        self.sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in like]

    def add(self, parts: tuple[Tensor, ...], places: _Places) -> None:
        for total, part, place in zip(self.sums, parts, places, strict=True):
            total[place] += part

    def totals(self) -> tuple[Tensor, ...]:
        return tuple(total.to(dtype) for total, dtype in zip(self.sums, self.dtypes, strict=True))


def _kernel(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **options: Any
) -> tuple[Tensor, None]:
    """The kernel of modules that call transformers' attention interface."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return kernel(module, "eager")(module, q, k, v, mask, *args, **options)[0]

    return _Attention.apply(BlockedLayer(attend, q, k, mask), q, k, v), None


def _method(attn: Callable[..., Any]) -> Callable[..., Any]:
    """``_attn`` of GPT-J, CodeGen and GPT-Neo. The last reads positions off the numbers of queries and keys."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attn(q, k, v, mask)[0].transpose(1, 2)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
        if mask is None:
            return attn(q, k, v)
        return _Attention.apply(BlockedLayer(attend, q, k, mask), q, k, v).transpose(1, 2), None

    return run


def register_blockwise() -> str:
    """The name under which a model's configuration chooses this attention."""
    AttentionInterface.register(NAME, _kernel)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return NAME


@contextmanager
def blockwise_methods(model: PreTrainedModel) -> Iterator[None]:
    """While active, modules of ``model`` that have attention as a method of their own run it by blocks."""
    with ExitStack() as stack:
        if _reader(model) is inner_attn:
            for module in model.modules():
                if hasattr(module, "_attn"):
                    stack.enter_context(shadowed(module, "_attn", _method))
        yield


def applies(model: PreTrainedModel) -> bool:
    """Whether the model's attention can be cut into blocks: it is a function that is called by name, or a method."""
    return _reader(model) in (None, inner_attn)


def _reader(model: PreTrainedModel) -> Reader | None:
    """None where attention goes through transformers' interface, as in families without a layout."""
    types = {model.config.model_type, model.config.get_text_config().model_type}
    return layout_for(model.config).reader if types & set(supported_families()) else None

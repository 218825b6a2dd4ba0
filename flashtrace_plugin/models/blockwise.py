"""Attention by blocks of queries that keeps no pattern for its derivatives, first or second.

Differentiating twice through plain attention keeps three [H, N, N] tensors per layer. Here a layer keeps its queries,
keys, values and the gradient of its output, and forms the patterns again, one block of queries at a time, when they
are needed. A block runs the model's own eager kernel on the keys that its mask lets through, so a causal layer does
half of the work of the plain kernel, and the temporaries of a block stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from flashtrace_plugin.core.pattern import BLOCK_BYTES, MIN_BLOCK_ROWS, block_bytes
from flashtrace_plugin.models.attention import kernel
from flashtrace_plugin.models.layouts import layout_for
from flashtrace_plugin.models.own_attention import inner_attn, shadowed

NAME = "blockwise_eager"

Attend = Callable[[Tensor, Tensor, Tensor, "_Block"], Tensor]
"""The model's own attention of a block's q, k and v. result: [1, rows, H, d]"""


class _Block:
    """Consecutive queries of one layer with the keys that they read.

    grads, q, k, v index the tensors of the whole layer: output gradients [1, N, H, d], queries, keys and values.
    """

    def __init__(self, layer: Layer, rows: slice) -> None:
        self.layer, self.rows, self.keys = layer, rows, layer.keys(rows)
        everything = slice(None)
        self.grads = (everything, rows)
        self.q = (..., rows, everything)
        self.k = self.v = (..., self.keys, everything)

    @property
    def mask(self) -> Tensor | None:
        return None if self.layer.mask is None else self.layer.mask[..., self.rows, self.keys]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output of the block's queries. result: [1, rows, H, d]"""
        return self.layer.attend(q, k, v, self)

    def leaves(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """The block's parts of the layer's tensors, to differentiate by."""
        return [x[part].detach().requires_grad_() for x, part in zip((q, k, v), (self.q, self.k, self.v), strict=True)]


class Layer:
    """One layer's attention, cut into blocks of queries.

    mask: [1, 1 or H, queries, keys] as eager kernels take it, or None for none
    """

    def __init__(self, attend: Attend, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        self.attend, self.mask = attend, mask
        self.length = k.shape[-2]
        per_row = 4 * q.shape[1] * self.length
        size = max(MIN_BLOCK_ROWS, block_bytes(q.device, BLOCK_BYTES) // per_row)
        queries = q.shape[-2]
        self.blocks = [_Block(self, slice(a, min(a + size, queries))) for a in range(0, queries, size)]

    def keys(self, rows: slice) -> slice:
        """From the first key to the last that these queries may read; all of them if they may read none."""
        if self.mask is None:
            return slice(0, self.length)
        mask = self.mask[..., rows, : self.length]
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        read = allowed.flatten(0, -2).any(0).nonzero()
        return slice(int(read[0]), int(read[-1]) + 1) if len(read) else slice(0, self.length)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(q, k, v)
        return torch.cat([block.attend(q[block.q], k[block.k], v[block.v]) for block in layer.blocks], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Gradient.apply(ctx.layer, *grads, *ctx.saved_tensors)


class _Gradient(torch.autograd.Function):
    """Gradients by q, k and v as a function of the output's gradient and q, k, v."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, grad: Tensor, *qkv: Tensor) -> tuple[Tensor, ...]:
        ctx.layer = layer
        ctx.save_for_backward(grad, *qkv)
        sums = _Sums(*qkv)
        for block in layer.blocks:
            leaves = block.leaves(*qkv)
            with torch.enable_grad():
                parts = torch.autograd.grad(block.attend(*leaves), leaves, grad[block.grads])
            sums.add(parts, (block.q, block.k, block.v))
        return tuple(sums.totals)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        grad, *qkv = ctx.saved_tensors
        sums = _Sums(grad, *qkv)
        for block in ctx.layer.blocks:
            places = block.q, block.k, block.v
            inputs = [grad[block.grads].detach().requires_grad_(), *block.leaves(*qkv)]
            with torch.enable_grad():
                first = torch.autograd.grad(block.attend(*inputs[1:]), inputs[1:], inputs[0], create_graph=True)
            vectors = [whole[part] for whole, part in zip(cotangents, places, strict=True)]
            sums.add(torch.autograd.grad(first, inputs, vectors), (block.grads, *places))
        return None, *sums.totals


class _Sums:
    """Sums of the blocks' parts, each shaped like one of the layer's tensors."""

    def __init__(self, *like: Tensor) -> None:
        self.totals = [torch.zeros_like(tensor) for tensor in like]

    def add(self, parts: tuple[Tensor, ...], places: tuple[Any, ...]) -> None:
        for total, part, place in zip(self.totals, parts, places, strict=True):
            total[place] += part


def _kernel(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **options: Any
) -> tuple[Tensor, None]:
    """The kernel of modules that call transformers' attention interface."""
    bias = options.pop("position_bias", None)

    def attend(q: Tensor, k: Tensor, v: Tensor, block: _Block) -> Tensor:
        added = {} if bias is None else {"position_bias": bias[..., block.rows, block.keys]}
        return kernel(module, "eager")(module, q, k, v, block.mask, *args, **options, **added)[0]

    return _Attention.apply(Layer(attend, q, k, mask), q, k, v), None


def _method(attn: Callable[..., Any]) -> Callable[..., Any]:
    """``_attn`` of GPT-J, CodeGen and GPT-Neo. The last reads positions off the numbers of queries and keys."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
        if mask is None:
            return attn(q, k, v)

        def attend(q: Tensor, k: Tensor, v: Tensor, block: _Block) -> Tensor:
            return attn(q, k, v, block.mask)[0].transpose(1, 2)

        return _Attention.apply(Layer(attend, q, k, mask), q, k, v).transpose(1, 2), None

    return run


def register() -> str:
    """The name under which a model's configuration chooses this attention."""
    AttentionInterface.register(NAME, _kernel)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return NAME


@contextmanager
def methods(model: PreTrainedModel) -> Iterator[None]:
    """While active, modules of ``model`` that have attention as a method of their own run it by blocks."""
    with ExitStack() as stack:
        if layout_for(model.config).reader is inner_attn:
            for module in model.modules():
                if hasattr(module, "_attn"):
                    stack.enter_context(shadowed(module, "_attn", _method))
        yield

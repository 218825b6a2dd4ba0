"""Attention that keeps no pattern for its derivatives, first or second, and recomputes it instead.

Differentiating twice through plain attention keeps three [H, N, N] tensors per layer. Here a layer keeps its queries,
keys, values and the gradient of its output, and forms the patterns again, one layer at a time, when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from flashtrace_plugin.models.attention import _kernel

NAME = "recomputed_eager"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v) -> output"""


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attend: Attend, *qkv: Tensor) -> Tensor:
        ctx.attend = attend
        ctx.save_for_backward(*qkv)
        return attend(*qkv)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Gradient.apply(ctx.attend, *grads, *ctx.saved_tensors)


class _Gradient(torch.autograd.Function):
    """Gradients by q, k and v as a function of the output's gradient and q, k, v."""

    @staticmethod
    def forward(ctx: Any, attend: Attend, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.attend = attend
        ctx.save_for_backward(*inputs)
        grad, *qkv = _leaves(inputs)
        with torch.enable_grad():
            return torch.autograd.grad(attend(*qkv), qkv, grad.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = _leaves(ctx.saved_tensors)
        with torch.enable_grad():
            first = torch.autograd.grad(ctx.attend(*inputs[1:]), inputs[1:], inputs[0], create_graph=True)
        return None, *torch.autograd.grad(first, inputs, grads)


def _leaves(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _recomputed(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **options: Any
) -> tuple[Tensor, None]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _kernel(module, "eager")(module, q, k, v, mask, *args, **options)[0]

    return _Attention.apply(attend, q, k, v), None


def register() -> str:
    """The name under which a model's configuration chooses this attention."""
    AttentionInterface.register(NAME, _recomputed)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return NAME

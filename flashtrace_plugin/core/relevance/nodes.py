"""Steps of a linearised graph: each has the value that the model computes and the derivative that a rule asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_PROBE = 1e-8
"""Where phi(u) / u is read for its limit at 0."""


class Frozen(Function):
    """y = phi(u), seen as u * (phi(u) / u) with the bracket frozen (AttnLRP, Eq. 9; Ali et al. 2022).

    u, y: any shape. Keeps the ratio alone.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, phi: Callable[[Tensor], Tensor], ratio: Callable[[Tensor, Tensor], Tensor]
    ) -> Any:
        y = phi(u)
        frozen = ratio(u, y)
        ctx.save_for_backward(frozen)
        ctx.mark_non_differentiable(frozen)
        return y, frozen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        return grad * ctx.saved_tensors[0], None, None


def frozen(
    u: Tensor, phi: Callable[[Tensor], Tensor], ratio: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """phi(u) with the ratio phi(u) / u frozen.

    ratio: computes it from u and phi(u) where that is cheaper than the division, which also needs a limit at 0
    """
    y, kept = Frozen.apply(u, phi, ratio or _quotient(phi))
    y.frozen_from = (u, kept)  # a product that follows at once then keeps less, see `product`
    return y


def _quotient(phi: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def ratio(u: Tensor, y: Tensor) -> Tensor:
        probe = torch.full((1,), _PROBE, dtype=torch.float64, device=u.device)
        return (y / u).nan_to_num_(nan=float(phi(probe).flatten()[0]) / _PROBE)

    return ratio


class Scaled(Function):
    """The value itself; its gradient times a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor, None


def scaled(x: Tensor, factor: float) -> Tensor:
    return Scaled.apply(x, factor)


class Product(Function):
    """a * b with half of the gradient to each factor (AttnLRP, Eq. 13, elementwise)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        half = grad * 0.5
        return (half * b).sum_to_size(a.shape), (half * a).sum_to_size(b.shape)


class GatedProduct(Function):
    """phi(u) * b, half of the gradient to each factor and phi(u) / u frozen: keeps two tensors instead of three.

    u, b, y = phi(u), ratio = phi(u) / u: one shape
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, b: Tensor, y: Tensor, ratio: Tensor) -> Tensor:
        ctx.save_for_backward(b * ratio, y)
        return y * b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        to_u, to_b = ctx.saved_tensors
        half = grad * 0.5
        return half * to_u, half.mul_(to_b), None, None


def product(a: Tensor, b: Tensor) -> Tensor:
    """a * b of two tensors that both carry relevance.

    Half goes to each, unless one is a function of the other: u * f(u) is an activation, whose f(u) = phi(u) / u is
    frozen. Activations written out in Python (x * 0.5 * (1 + tanh(...))) are such products.
    """
    for gate, other in ((a, b), (b, a)):
        made = getattr(gate, "frozen_from", None)
        if made is not None and made[0] is not other and made[0].shape == other.shape:
            return GatedProduct.apply(made[0], other, gate.detach(), made[1])
    if _derived(b, a):
        return a * b.detach()
    if _derived(a, b):
        return a.detach() * b
    return Product.apply(a, b)


_ELEMENTWISE = {"MulBackward0", "AddBackward0", "SubBackward0", "RsubBackward1", "DivBackward0", "NegBackward0"} | {
    "ToCopyBackward0",
    "FrozenBackward",
}
_LINEAR = _ELEMENTWISE - {"AddBackward0", "SubBackward0", "FrozenBackward"}
_STEPS = 24
"""How many elementwise steps an activation written out in Python may have."""

_Edge = tuple[Any, int]


def _derived(b: Tensor, a: Tensor) -> bool:
    """Whether b was computed elementwise from what a is a multiple of."""
    multiples = set(_edges(a, _LINEAR))
    return any(edge in multiples for edge in _edges(b, _ELEMENTWISE))


def _edges(x: Tensor, through: set[str]) -> list[_Edge]:
    """What x was computed from, as edges of the graph, going through the named steps only."""
    found: list[_Edge] = []
    todo: list[_Edge] = [(x.grad_fn, x.output_nr)]
    while todo and len(found) < _STEPS:
        node, number = todo.pop()
        found.append((node, number))
        if node is not None and node.name() in through:
            todo += [edge for edge in node.next_functions if edge[0] is not None]
    return found


class FrozenLayerNorm(Function):
    """Layer norm with its scale frozen: y = (x - mean) * s * gain + bias (FlashTrace, Eq. 13; Ali et al. 2022).

    x, y: [..., *shape];  gain, bias: [*shape] or None. Keeps s [..., 1].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int], gain: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, _, scale = torch.native_layer_norm(x, shape, gain, bias, eps)
        ctx.save_for_backward(scale, gain)
        ctx.dims = list(range(-len(shape), 0))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        scale, gain = ctx.saved_tensors
        inner = grad * scale.to(grad.dtype) if gain is None else grad * gain * scale.to(grad.dtype)
        return inner - inner.mean(ctx.dims, keepdim=True), None, None, None, None

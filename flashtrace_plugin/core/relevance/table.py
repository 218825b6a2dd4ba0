"""The rule of every torch function that is not linear as it stands, one line per rule at the end of this file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashtrace_plugin.core.relevance.attention import frozen_attention, shared_attention
from flashtrace_plugin.core.relevance.nodes import FrozenLayerNorm, frozen, product, scaled

if TYPE_CHECKING:
    from flashtrace_plugin.core.relevance.rules import Rules

Rule = Callable[..., Any]
"""``rule(mode, function, *args, **kwargs)``, called when gradients are recorded and parameters are constants."""


def _live(value: Any) -> bool:
    """Whether relevance can reach it."""
    return isinstance(value, Tensor) and value.requires_grad


# --------------------------------------------------------------------------------------------------- elementwise


def _activation(mode: Rules, func: Any, u: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs.pop("inplace", None)
    return frozen(u, lambda x: func(x, *args, **kwargs)) if _live(u) else func(u, *args, **kwargs)


def _silu(mode: Rules, func: Any, u: Tensor, inplace: bool = False) -> Tensor:
    return frozen(u, func, lambda u, y: torch.sigmoid(u)) if _live(u) else func(u)


def _power(mode: Rules, func: Any, base: Any, exponent: Any) -> Tensor:
    if _live(exponent) or isinstance(exponent, Tensor) or not exponent >= 1:
        return _scale(mode, func, base, exponent)  # a root or an inverse is a scale
    return base * func(base.detach(), exponent - 1) if _live(base) else func(base, exponent)


def _square(mode: Rules, func: Any, u: Tensor) -> Tensor:
    return u * u.detach()


def _scale(mode: Rules, func: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return func(*args, **kwargs)


def _multiply(mode: Rules, func: Any, a: Any, b: Any, **kwargs: Any) -> Tensor:
    return product(a, b) if _live(a) and _live(b) else func(a, b, **kwargs)


def _divide(mode: Rules, func: Any, a: Any, b: Any, **kwargs: Any) -> Tensor:
    return func(a, b.detach() if _live(b) else b, **kwargs)


def _inverse(mode: Rules, func: Any, a: Tensor, b: Any) -> Tensor:
    """``Tensor.__rdiv__(a, b)`` is b / a."""
    return func(a.detach(), b)


def _add(mode: Rules, func: Any, a: Any, b: Any, *, alpha: float = 1, **kwargs: Any) -> Tensor:
    return _sum(mode, func, a, b, (1.0, alpha), alpha, kwargs)


def _subtract(mode: Rules, func: Any, a: Any, b: Any, *, alpha: float = 1, **kwargs: Any) -> Tensor:
    return _sum(mode, func, a, b, (1.0, -alpha), alpha, kwargs)


def _subtract_from(mode: Rules, func: Any, a: Any, b: Any, *, alpha: float = 1, **kwargs: Any) -> Tensor:
    return _sum(mode, func, a, b, (-alpha, 1.0), alpha, kwargs)


def _sum(mode: Rules, func: Any, a: Any, b: Any, signs: tuple[float, float], alpha: float, kwargs: Any) -> Tensor:
    out = func(a, b, **kwargs) if alpha == 1 else func(a, b, alpha=alpha, **kwargs)
    if _live(a) == _live(b):
        return out
    constant, sign = (b, signs[1]) if _live(a) else (a, signs[0])
    if mode.rule == "attn" and isinstance(constant, Tensor) and constant.dim() >= 4:
        return out  # a mask on the scores, whose share nobody asks for
    return mode.added(out, constant, sign)


def _in_place(rule: Rule, plain: Any) -> Rule:
    """The rule of ``x.function_(...)``, from that of ``x.function(...)``."""
    if rule in (_add, _subtract, _divide):
        return rule  # nothing of what they overwrite is kept

    def apply(mode: Rules, func: Any, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _live(target) and not any(map(_live, args)):
            return func(target, *args, **kwargs)
        # What a step keeps of its input must not be overwritten by its result.
        return target.copy_(rule(mode, plain, target.clone(), *args, **kwargs))

    return apply


# ------------------------------------------------------------------------------------------------- linear algebra


def _halved(func: Any, a: Tensor, b: Tensor) -> Tensor:
    """Half the gradient to each factor of a product, scaled where there are fewer numbers."""
    out_size = math.prod(a.shape[:-1]) * b.shape[-1]
    if out_size < a.numel() + b.numel():
        return scaled(func(a, b), 0.5)
    return func(scaled(a, 0.5), scaled(b, 0.5))


def _matmul(mode: Rules, func: Any, a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
    return _halved(func, a, b) if _live(a) and _live(b) else func(a, b, **kwargs)


def _added_matmul(mode: Rules, func: Any, c: Tensor, *factors: Tensor, **kwargs: Any) -> Tensor:
    """``beta c + alpha a b`` (addmm, baddbmm): with a constant c, the bias of GPT-2's projections or ALiBi."""
    pair = list(factors) + [kwargs.pop(name) for name in ("mat1", "batch1", "mat2", "batch2") if name in kwargs]
    a, b = pair
    if _live(a) and _live(b):
        a, b = scaled(a, 0.5), scaled(b, 0.5)
    out = func(c, a, b, **kwargs)
    if _live(c) or (mode.rule == "attn" and c.dim() >= 3):
        return out
    return mode.added(out, c, kwargs.get("beta", 1))


def _linear(mode: Rules, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if mode.head is not None and mode.head == (weight.data_ptr(), weight.shape):
        z = func(x.detach(), weight, bias)
        mode.head_called(x, weight, bias, z)
        return z
    if _live(x) and _live(weight):
        x, weight = scaled(x, 0.5), scaled(weight, 0.5)
    return mode.added(func(x, weight, bias), bias)


def _convolution(
    mode: Rules, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kw: Any
) -> Tensor:
    out = func(x, weight, bias, *args, **kw)
    return out if bias is None else mode.added(out, bias.reshape(-1, *(1,) * (weight.dim() - 2)))


def _einsum(mode: Rules, func: Any, equation: str, *operands: Any) -> Tensor:
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    factors = sum(map(_live, tensors))
    out = func(equation, *operands)
    return out if factors < 2 else scaled(out, 1 / factors)


# ---------------------------------------------------------------------------------------- norms, softmax, attention


def _layer_norm(
    mode: Rules,
    func: Any,
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *args: Any,
) -> Tensor:
    if not _live(x):
        return func(x, shape, weight, bias, eps)
    return mode.added(FrozenLayerNorm.apply(x, list(shape), weight, bias, eps), bias)


def _rms_norm(
    mode: Rules, func: Any, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    with torch.no_grad():
        dims = list(range(-len(shape), 0))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        frozen_scale = (wide.square().mean(dims, keepdim=True) + (eps or torch.finfo(x.dtype).eps)).rsqrt()
    y = (x * frozen_scale).to(x.dtype)
    return y if weight is None else y * weight


def _normalize(mode: Rules, func: Any, x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Tensor:
    return x / x.detach().norm(p, dim, keepdim=True).clamp_min(eps)


def _softmax(mode: Rules, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention scores are [batch, heads, queries, keys]; what a router or a gate normalises has fewer dimensions."""
    if mode.rule == "attn" and x.dim() == 4:
        return func(x, *args, **kwargs)
    return _scale(mode, func, x, *args, **kwargs)


def _gated_linear(mode: Rules, func: Any, x: Tensor, dim: int = -1) -> Tensor:
    a, b = x.chunk(2, dim)
    return a * b.detach().sigmoid()


def _attention(
    mode: Rules,
    func: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    options |= {"attn_mask": attn_mask, "is_causal": is_causal}
    if mode.rule == "attn":
        return shared_attention(q, k, v, options)
    if _live(v):
        return frozen_attention(q, k, v, options, mode.masks, next(mode.known, None))
    return _scale(mode, func, q, k, v, **options)


def _embedding(mode: Rules, func: Any, ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What another table than that of the tokens gives stands for positions, and is a source of its own."""
    out = func(ids, weight, *args, **kwargs)
    if weight.data_ptr() == mode.table:
        return out
    mode.positions.append(out.detach().requires_grad_())
    return mode.positions[-1].clone()


# -------------------------------------------------------------------------------------------------------- the table

_SPACES = (torch.Tensor, torch, F, torch.special, torch.linalg, torch._C._nn)

_RULES: dict[Rule, str] = {
    _activation: "gelu tanh erf expm1 log1p mish elu selu celu hardswish relu6 hardtanh softsign tanhshrink "
    "softshrink hardshrink rrelu atan arctan asinh arcsinh sinh clamp clip clamp_min clamp_max",
    _silu: "silu",
    _power: "pow __pow__ float_power",
    _square: "square",
    _scale: "sigmoid hardsigmoid expit softplus logsigmoid log_sigmoid exp exp2 rsqrt sqrt reciprocal norm "
    "vector_norm matrix_norm log_softmax logsumexp std var __rpow__ cumprod softmin",
    _multiply: "mul multiply __mul__ __rmul__",
    _divide: "div divide true_divide __truediv__ __div__",
    _inverse: "__rdiv__ __rtruediv__",
    _add: "add __add__ __radd__",
    _subtract: "sub subtract __sub__",
    _subtract_from: "rsub __rsub__",
    _matmul: "matmul bmm mm mv inner dot outer __matmul__",
    _added_matmul: "addmm baddbmm",
    _linear: "linear",
    _convolution: "conv1d conv2d",
    _einsum: "einsum",
    _layer_norm: "layer_norm",
    _rms_norm: "rms_norm",
    _normalize: "normalize",
    _gated_linear: "glu",
    _softmax: "softmax",
    _attention: "scaled_dot_product_attention",
}


def _named(name: str) -> Iterator[Any]:
    for space in _SPACES:
        function = getattr(space, name, None)
        if callable(function):
            yield function


def _table() -> dict[Any, Rule]:
    table: dict[Any, Rule] = {}
    for rule, names in _RULES.items():
        for name in names.split():
            table |= dict.fromkeys(_named(name), rule)
            plain = next(_named(name), None)
            for inplace in (f"{name}_", f"__i{name.strip('_')}__"):
                table |= dict.fromkeys(_named(inplace), _in_place(rule, plain))
    return table | {F.embedding: _embedding}  # torch.embedding has its arguments the other way round


TABLE: dict[Any, Rule] = _table()
"""Rule of every torch function, tensor method and in-place method that is not linear as it stands."""

FROZEN = {func for func, rule in TABLE.items() if rule in (_scale, _softmax)}
"""Functions whose result is a constant on purpose."""

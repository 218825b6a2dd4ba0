"""The rules by which a model's own computation is linearised, as a table from torch functions to derivatives.

A model is run as it is, inside a :class:`Rules` mode. Whatever torch function it calls gives its own value; where the
function is not linear, its derivative becomes that of the linearisation at this very forward pass:

===========================  ==================================================================================
activation phi(u)            u * (phi(u) / u), the bracket frozen
scale, gate, routing         frozen: sigmoid, rsqrt, exp, the softmax of a router, every divisor
norm                         its scale frozen
product of two activations   half to each factor
attention                    rule "cp": the pattern frozen; "attn": softmax by its gradient, half to each factor
parameters, buffers          constants, whatever their ``requires_grad``; their additive part is counted
===========================  ==================================================================================

All else is taken as linear. What is neither linear nor in the table therefore shows: relevance is not conserved.
The mode belongs to the thread that entered it. It places no hook and leaves no state on the model.

Sources: Ali et al. 2022 ("XAI for Transformers", rule "cp"); Achtibat et al. 2024 ("AttnLRP", rule "attn").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from flashtrace_plugin.core.relevance.attention import FrozenPattern, Masks
from flashtrace_plugin.core.relevance.nodes import Frozen, FrozenLayerNorm, GatedProduct, Product, Scaled, frozen
from flashtrace_plugin.core.relevance.severed import mark, mixed_in, tensors
from flashtrace_plugin.core.relevance.table import FROZEN, TABLE

AttentionRule = Literal["cp", "attn"]


@dataclass
class _Constants:
    """What the constants of the linearised model contribute to the objective: sum of gradient times constant.

    terms:  one number per added constant that the backward pass met, float32 or double
    """

    terms: list[Tensor] = field(default_factory=list)

    def met(self, constant: Tensor | float, factor: float, grad: Tensor) -> None:
        """A hook: ``factor * constant`` was added where the gradient is ``grad``."""
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if isinstance(constant, Tensor):
            self.terms.append((grad.sum_to_size(constant.shape) * constant).sum() * factor)
        else:
            self.terms.append(grad.sum() * (constant * factor))

    def take(self) -> float:
        """The sum of all terms since it was taken last."""
        total = math.fsum(float(term) for term in self.terms)
        self.terms.clear()
        return total


@dataclass
class HeadCall:
    """The language-model head's projection, which is taken out of the graph: ``z = hidden W^T + bias``.

    hidden: [..., d] in the graph;  weight: [V, d];  bias: [V] or None;  z: [..., V] a constant, None once compared
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    z: Tensor | None


class Rules(TorchFunctionMode):
    """While active, what this thread computes with gradients is linearised.

    rule:      "cp" or "attn"
    table:     the token embeddings; what other tables give (learned positions) is a source of its own
    head:      weight of the language-model head, whose calls are noted and cut off; None: it is left alone

    constants: shares of what is added (biases)
    positions: [leaf]  results of other embedding tables, as leaves of the graph
    heads:     calls of the head
    custom:    names of autograd functions that the model brought along, which no rule is known for
    severed:   functions that relevance should have gone through, and that ran without gradients
    note:      told the results of fused attention while no graph is recorded
    known:     these results, in their order, when the same is run again with a graph
    """

    def __init__(self, rule: AttentionRule, table: Tensor | None = None, head: Tensor | None = None) -> None:
        super().__init__()
        self.rule, self.masks, self.constants = rule, Masks(), _Constants()
        self.table = None if table is None else table.data_ptr()
        self.head = None if head is None else (head.data_ptr(), head.shape)
        self.positions: list[Tensor] = []
        self.heads: list[HeadCall] = []
        self.custom: set[str] = set()
        self.severed: set[str] = set()
        self.note: Callable[[Tensor], Any] | None = None
        self.known: Iterator[Tensor] = iter(())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return self._watched(func, args, kwargs, self._noted(func, func(*args, **kwargs)))
        if func in _UNTOUCHED:
            return func(*args, **kwargs)
        args = tuple([self._seen(a) for a in args])
        if kwargs:
            kwargs = {name: self._seen(a) for name, a in kwargs.items()}
        rule = TABLE.get(func)
        result = func(*args, **kwargs) if rule is None else rule(self, func, *args, **kwargs)
        return self._watched(func, args, kwargs, result)

    def _watched(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Looks for numbers that come from the text without a graph, see :mod:`.severed`."""
        operands, name = tensors(*args, *kwargs.values()), getattr(func, "__name__", "")
        mark(name, operands, result, frozen=func in FROZEN)
        for y, origin in mixed_in(operands, result):
            y.register_hook(partial(self._met, origin))
        return result

    def _met(self, origin: str, grad: Tensor) -> None:
        self.severed.add(origin)

    def _noted(self, func: Any, result: Any) -> Any:
        """Under rule "cp" the result of fused attention is all that its graph needs beyond q and k."""
        if self.note is not None and func is F.scaled_dot_product_attention and self.rule == "cp":
            self.note(result)
        return result

    def _seen(self, value: Any) -> Any:
        """The value; leaves that require gradients are taken as constants: parameters are leaves, sources are not."""
        if not isinstance(value, Tensor):
            return type(value)(map(self._seen, value)) if type(value) in (list, tuple) else value
        if not value.requires_grad:
            return value
        if value.is_leaf:
            return value.detach()
        node = value.grad_fn
        return self._custom(value, node) if isinstance(node, BackwardCFunction) else value

    def _custom(self, value: Tensor, node: Any) -> Tensor:
        """What an autograd function gave, which no mode can see at work; an activation gets its rule afterwards."""
        name = node.name().removesuffix("Backward")
        if name in _CUSTOM_ACTIVATIONS:
            return frozen(node.saved_tensors[0], lambda _: value.detach(), lambda u, y: (y / u).nan_to_num_(nan=0.5))
        if name not in _OWN:
            self.custom.add(name)
        return value

    def head_called(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> None:
        self.heads.append(HeadCall(hidden, weight, bias, z))

    def added(self, out: Tensor, constant: Tensor | float | None, factor: float = 1.0) -> Tensor:
        """Notes that ``factor * constant`` is part of the sum ``out``; returns ``out``."""
        if constant is not None and out.requires_grad:
            out.register_hook(partial(self.constants.met, constant, factor))
        return out


_UNTOUCHED = {
    *(vars(torch._C.TensorBase)[name].__set__ for name in ("data", "grad", "requires_grad")),
    torch.Tensor.requires_grad_,
}
"""Functions that are about the parameter itself, not about its value."""


_CUSTOM_ACTIVATIONS = {"GeLUFunction"}
"""Activations that a model computes in an autograd function of its own, saving its input alone (BLOOM)."""

_OWN = {cls.__name__ for cls in (Frozen, Scaled, Product, GatedProduct, FrozenLayerNorm, FrozenPattern)}

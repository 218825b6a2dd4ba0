"""Whether automatic second derivatives are complete.

PyTorch's own operations either have a second derivative or raise. A hand-written ``autograd.Function`` may do
neither: if its backward pass is not differentiable itself, the Hessian lacks a part and nothing says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flashtrace_plugin.core.hessian.curvature import HessianProducts, TailFunction

SECOND_DERIVATIVE_TOLERANCE = 0.01
"""Largest relative difference to finite differences that rounding and truncation explain."""

_STEPS = (1e-1, 1e-2, 1e-3, 1e-4)
"""Step sizes relative to the typical entry: large ones truncate, small ones round, so the best one counts."""


def second_derivative_gap(g: TailFunction, X: Tensor) -> float:
    """|H v - (∇g(X + εv) - ∇g(X - εv)) / 2ε| / |H v| for one v of random signs; 0 without functions to distrust.

    In half precision differences drown in rounding, so nothing is checked there and the result is 0.
    """
    if X.dtype not in (torch.float32, torch.float64) or not _has_custom_functions(g, X):
        return 0.0
    v = torch.randint(0, 2, X.shape, generator=torch.Generator().manual_seed(0)).to(X) * 2 - 1
    product = HessianProducts(g, X, 0)(v[None])[0]
    size = X.square().mean().sqrt()
    steps = [_difference(g, X, v, float(step * size)) for step in _STEPS]
    scale = max(float(product.norm()), min(float(d.norm()) for d in steps))
    return min(float((product - d).norm()) for d in steps) / scale if scale > 0 else 0.0


def _difference(g: TailFunction, X: Tensor, v: Tensor, step: float) -> Tensor:
    return (_gradient(g, X + step * v) - _gradient(g, X - step * v)) / (2 * step)


def _gradient(g: TailFunction, X: Tensor) -> Tensor:
    with torch.enable_grad():
        point = X.detach().clone().requires_grad_()
        return torch.autograd.grad(g(point, 0), point)[0]


def _has_custom_functions(g: TailFunction, X: Tensor) -> bool:
    with torch.enable_grad():
        value = g(X.detach().clone().requires_grad_(), 0)
    return any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in _graph(value.grad_fn))


def _graph(root: Any) -> Iterator[Any]:
    """All nodes of an autograd graph."""
    seen, stack = set(), [root]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)

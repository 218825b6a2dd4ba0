"""HETA's curvature term: how strongly the target's log-probability bends along each token (HETA, Eq. 2 and 3).

    S_i = 1/m sum_k | Π_i H Π_i r_k |_1      H = Hessian of g with respect to X [N, d], r_k random signs

H is never formed. Its products with vectors come from differentiating the gradient once more; the graph of the
gradient is built once and many vectors are pushed through it together. A token's block of H depends only on
the positions from that token on, so the graph covers the tail and what precedes it enters as constants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashtrace_plugin.core.batches import Batches

TailFunction = Callable[[Tensor, int], Tensor]
"""``g(tail, start)``: a number as a function of the vectors [N - start, d] from position ``start`` on, up to a
constant; what stands before them is the sequence itself."""

PRODUCTS_PER_GRAPH = 64
"""Neighbouring tokens share a graph until it serves this many products: building it costs about two of them."""

OVERSAMPLING = 8
"""Probes of the range finder beyond the rank (Halko, Martinsson & Tropp 2011 recommend 5 to 10)."""


def rademacher(*shape: int, generator: torch.Generator) -> Tensor:
    """Random signs, the same on every device. result: [*shape], int8 on the CPU"""
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1


class HessianProducts:
    """Products of the Hessian of g at X[start:] with vectors."""

    def __init__(self, g: TailFunction, X: Tensor, start: int) -> None:
        with torch.enable_grad():
            self.tail = X[start:].detach().clone().requires_grad_()
            (self.gradient,) = torch.autograd.grad(g(self.tail, start), self.tail, create_graph=True)

    def __call__(self, vectors: Tensor) -> Tensor:
        """H v for each vector. vectors, result: [B, tail, d]"""
        if not self.gradient.requires_grad:  # g is linear
            return torch.zeros_like(vectors)
        batched = len(vectors) > 1
        (products,) = torch.autograd.grad(
            self.gradient,
            self.tail,
            (vectors if batched else vectors[0]).to(self.tail),
            retain_graph=True,
            is_grads_batched=batched,
            allow_unused=True,
            materialize_grads=True,
        )
        return products if batched else products[None]


def block_curvature(g: TailFunction, X: Tensor, probes: Tensor, *, batches: Batches) -> Tensor:
    """The block estimator: one product per token and probe (Eq. 3).

    X:       [N, d]
    probes:  [m, n, d]  signs; tokens 0..n are estimated
    result:  [n]        float32, or float64 for a float64 X
    """
    each, n, _ = probes.shape
    group = max(1, PRODUCTS_PER_GRAPH // each)
    parts = [_group_curvature(g, X, probes[:, s : s + group], s, batches) for s in range(0, n, group)]
    return torch.cat(parts)


def _group_curvature(g: TailFunction, X: Tensor, probes: Tensor, start: int, batches: Batches) -> Tensor:
    """S of neighbouring tokens start, start + 1, … ; probes: [m, tokens, d]; result: [tokens]"""
    products = HessianProducts(g, X, start)
    each, tokens, width = probes.shape
    flat = probes.reshape(-1, width)
    owner = torch.arange(tokens).repeat(each)

    def norms(part: slice) -> Tensor:
        rows = torch.arange(part.stop - part.start)
        vectors = X.new_zeros(len(rows), *products.tail.shape)
        vectors[rows, owner[part]] = flat[part].to(X)
        return accumulated(products(vectors)[rows, owner[part]]).abs().sum(-1)

    return batches.run(norms, each * tokens).view(each, tokens).mean(0)


def low_rank_curvature(
    g: TailFunction, X: Tensor, omega: Tensor, probes: Tensor, *, start: int = 0, batches: Batches
) -> Tensor:
    """The estimator on a randomised low-rank Hessian: 2 k products, however many tokens there are.

    Y = H Ω, Q = orth(Y), B = Qᵀ H Q, H ≈ Q B Qᵀ, and S_i = 1/m sum_k | Q_i B Q_iᵀ r_k |_1. H is the Hessian with
    respect to the n tokens from ``start`` on.

    X:       [N, d]
    omega:   [k, n, d]  test vectors of the range finder, rank + oversampling of them
    probes:  [m, n, d]  signs
    result:  [n]        float32, or float64 for a float64 X
    """
    products = HessianProducts(g, X, start)
    k, n, width = omega.shape

    def apply(vectors: Tensor) -> Tensor:
        """H of the n tokens times columns. vectors, result: [n·d, columns]"""

        def work(part: slice) -> Tensor:
            inside = vectors[:, part].T.reshape(-1, n, width).to(X)
            padded = torch.nn.functional.pad(inside, (0, 0, 0, len(products.tail) - n))
            return accumulated(products(padded)[:, :n]).flatten(1)

        return batches.run(work, vectors.shape[1]).T

    Y = apply(omega.reshape(k, -1).T)
    Q = torch.linalg.qr(Y).Q
    B = Q.T @ apply(Q)
    return _factored_curvature(Q.view(n, width, -1), (B + B.T) / 2, probes)


def _factored_curvature(Q: Tensor, B: Tensor, probes: Tensor) -> Tensor:
    """S_i = 1/m sum_k | Q_i B Q_iᵀ r_k |_1. Q: [n, d, k]; B: [k, k]; probes: [m, n, d]; result: [n]"""
    total = Q.new_zeros(len(Q))
    for signs in probes:
        inner = torch.einsum("ndk,nd->nk", Q, signs.to(Q)) @ B
        total += torch.einsum("ndk,nk->nd", Q, inner).abs().sum(-1)
    return total / len(probes)


def gradient_squared(g: TailFunction, X: Tensor) -> Tensor:
    """S_i = | (∂g/∂x_i)² |_1: the first-order stand-in for curvature (HETA-GS). X: [N, d]; result: [N]"""
    with torch.enable_grad():
        tail = X.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(g(tail, 0), tail)
    return accumulated(gradient).square().sum(-1)


def accumulated(values: Tensor) -> Tensor:
    """At least float32, so that sums over the width keep their digits."""
    return values if values.dtype == torch.float64 else values.float()

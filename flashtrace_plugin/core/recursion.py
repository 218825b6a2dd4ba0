"""Recursion through the reasoning, for any method that turns weights into importance (Eq. 11/12, 22-24)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recursion:
    """Result of :func:`recurse`.

    scores:         [N]          accumulated importance, sum_k (prod_{m<k} rho_m) alpha_k
    hop_scores:     [hops+1, N]  alpha_k over all positions
    reasoning_mass: [hops+1]     rho_k, share of hop k's mass that lies on the reasoning
    """

    scores: Tensor
    hop_scores: Tensor
    reasoning_mass: Tensor


def recurse(
    step: Callable[[Tensor], Tensor], initial: Tensor, through: Tensor, hops: int, shift: int = 0
) -> Recursion:
    """Follows importance from the target through the reasoning, hop by hop.

    hop 0: ``alpha_0 = step(initial)``;  hop k: ``alpha_k = step(alpha_{k-1} on through)``;
    ``rho_k = sum_through alpha_k / sum alpha_k`` (Eq. 11/23);
    ``scores = sum_k (prod_{m<k} rho_m) alpha_k`` (Eq. 12/24).

    step:    weights [N] -> importance [N]
    initial: [N]          weights of the target
    through: [N] bool     positions that mass is followed through
    shift:   0 or 1       with 1 the mass on token j weighs position j-1, where the token was decided

    Without mass on ``through`` there is nothing to follow: the remaining hops stay zero.
    """
    alpha = step(initial)
    hop_scores = alpha.new_zeros(hops + 1, len(alpha))
    rho = alpha.new_zeros(hops + 1)
    scores, carried = torch.zeros_like(alpha), 1.0
    for k in range(hops + 1):
        hop_scores[k] = alpha
        rho[k] = _mass(alpha, through)
        scores += carried * alpha
        carried *= float(rho[k])
        if k == hops or carried == 0:
            break
        alpha = step(_shifted(alpha * through, shift))
    return Recursion(scores, hop_scores, rho)


def _mass(alpha: Tensor, through: Tensor) -> Tensor:
    total = alpha.sum()
    return (alpha * through).sum() / total if total > 0 else total


def _shifted(weights: Tensor, shift: int) -> Tensor:
    if shift == 0:
        return weights
    return torch.nn.functional.pad(weights[shift:], (0, shift))

"""HETA's information term: how far the target's distribution moves when a token is masked (HETA, Eq. 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashtrace_plugin.core.batches import Batches

_LogProbs = Callable[[Tensor, int], Tensor]
"""``log_probs(tails, start)``: log P(· | x_<=p) as a function of the vectors from position ``start`` on.

tails:  [B, N - start, d]  what stands before them is the sequence itself
result: [B, r, V]          for the last r predicting positions, those that are not before ``start``
"""


def information(
    log_probs: _LogProbs, X: Tensor, replacement: Tensor, weights: Tensor, *, length: int, batches: Batches
) -> Tensor:
    """I_i = sum_p w_p KL( P_p || P_p with x_i masked ), in nats.

    Positions before i do not change, so every batch of neighbours runs only the tail from its first token on.

    X:           [N, d]  the sequence up to the last predicting position
    replacement: [d]     what a masked token becomes
    weights:     [r]     of the predicting positions, which are the last r of the N
    length:      n       tokens 0..n are masked, one at a time
    result:      [n]     float32, or float64 for a float64 model
    """
    log_p = log_probs(X[None], 0)[0]

    def divergences(part: slice) -> Tensor:
        log_q = log_probs(_masked_tails(X, part, replacement), part.start)
        rows = log_q.shape[1]
        return kl(log_p[-rows:], log_q) @ weights[-rows:].to(log_q)

    return batches.run(divergences, length)


def _masked_tails(X: Tensor, part: slice, replacement: Tensor) -> Tensor:
    """Copies of X[part.start:], the b-th with token part.start + b replaced. result: [B, N - part.start, d]"""
    count = part.stop - part.start
    tails = X[part.start :].expand(count, -1, -1).clone()
    each = torch.arange(count, device=X.device)
    tails[each, each] = replacement.to(tails)
    return tails


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q) along the last axis of log-probabilities; rounding never makes it negative."""
    return (
        torch.nn.functional.kl_div(log_q, log_p.expand_as(log_q), reduction="none", log_target=True)
        .sum(-1)
        .clamp_min(0)
    )

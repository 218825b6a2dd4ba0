"""What relevance is propagated from: weighted logits of some rows, as a cotangent on the last hidden state.

The head is linear up to a factor per logit (soft cap, logit scale), so its step back needs the columns of W_U that
carry weight, not a matrix of rows x vocabulary with a graph::

    g = sum_r seed[r] . logits[r]       logits[r, t] = f[r, t] (hidden[r] . W_U[t] + b_U[t])      f frozen
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Objective = Literal["logit", "centered", "log_probability", "contrast"]
_ROWS = 64
"""Rows of the vocabulary's size that are in memory at a time."""


_Seeds = Callable[[slice], Tensor]
"""Gives the rows ``part`` of a seed [r, V], so that the whole need not be in memory."""


@dataclass(frozen=True)
class Pull:
    """One objective, pulled back through the head.

    cotangent: [r, d]  gradient at the hidden state of the rows asked for
    value:     g;  bias: the share of b_U in it
    """

    cotangent: Tensor
    value: float
    bias: float

    def __add__(self, other: Pull) -> Pull:
        return Pull(self.cotangent + other.cotangent, self.value + other.value, self.bias + other.bias)


@dataclass(frozen=True)
class Head:
    """The language-model head at some rows.

    hidden: [R, d]  what it reads
    logits: [R, V]  what the model says in the end
    weight: [V, d]  W_U; None: ``hidden`` are the logits themselves
    bias:   [V] or None
    plain:  whether nothing comes after the projection, f = 1
    """

    hidden: Tensor
    logits: Tensor
    weight: Tensor | None
    bias: Tensor | None
    plain: bool

    def pull(
        self, rows: Tensor, weights: Tensor, ids: Tensor, objective: Objective, foils: Tensor | None = None
    ) -> Pull:
        """Pulls back ``g = sum_r w_r s_r``, with s_r the objective for the token ids[r] at a row.

        rows, weights, ids, foils: [r]
        """
        if objective == "logit":
            return self.columns(rows, ids, weights)
        if objective == "contrast":
            if foils is None:
                raise ValueError("objective='contrast' needs foils")
            return self.columns(rows, ids, weights) + self.columns(rows, foils, -weights)
        return self.dense(rows, lambda part: _seed(self.logits[rows[part]], weights[part], ids[part], objective))

    def columns(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Pull:
        """One logit per row. rows, ids, weights: [r]"""
        logits = _wide(self.logits[rows, ids])
        weights = weights.to(logits)
        value = float((weights * logits).sum())
        if self.weight is None:
            seed = torch.zeros_like(_wide(self.logits[rows])).scatter_(1, ids[:, None], weights[:, None])
            return Pull(seed, value, 0.0)
        W = _wide(self.weight[ids].detach())
        bias = torch.zeros_like(weights) if self.bias is None else _wide(self.bias[ids].detach())
        if not self.plain:
            weights = weights * _factor(logits, (_wide(self.hidden[rows].detach()) * W).sum(-1) + bias)
        return Pull(weights[:, None] * W, value, float((weights * bias).sum()))

    def dense(self, rows: Tensor, seed: _Seeds) -> Pull:
        """Any seed. rows: [r]; seed: gives the rows ``part`` of it, [len(part), V]"""
        parts = [slice(i, min(i + _ROWS, len(rows))) for i in range(0, len(rows), _ROWS)]
        pulls = [self._dense(rows[part], seed(part)) for part in parts]
        return Pull(torch.cat([p.cotangent for p in pulls]), sum(p.value for p in pulls), sum(p.bias for p in pulls))

    def _dense(self, rows: Tensor, seed: Tensor) -> Pull:
        value = float((seed * _wide(self.logits[rows])).sum())
        if self.weight is None:
            return Pull(seed, value, 0.0)
        if not self.plain:
            z = F.linear(self.hidden[rows].detach(), self.weight, self.bias)
            seed = seed * _factor(_wide(self.logits[rows]), _wide(z))
        bias = 0.0 if self.bias is None else float((seed * self.bias).sum())
        return Pull(seed.to(self.weight.dtype) @ self.weight, value, bias)


def _seed(logits: Tensor, weights: Tensor, ids: Tensor, objective: Objective) -> Tensor:
    """[r, V]: the logit less the mean logit, or the gradient of the log-probability."""
    logits = _wide(logits)
    weights = weights.to(logits)[:, None]
    others = logits.softmax(-1) if objective == "log_probability" else torch.full_like(logits, 1 / logits.shape[-1])
    return (-weights * others).scatter_add_(1, ids[:, None], weights)


def _factor(logits: Tensor, z: Tensor) -> Tensor:
    """What the model makes of a projection z, as a factor. At z = 0 it does not matter."""
    return (logits / z).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

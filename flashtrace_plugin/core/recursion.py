"""Recursion through the reasoning, for any method that turns weights into importance (Eq. 11/12, 22-24)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from flashtrace_plugin.errors import InputError


@dataclass(frozen=True)
class Hop:
    """What one step of a method finds: importance over all positions, and what else it can tell.

    alpha:           [N]      importance >= 0; 0 after the last weighted position
    head_shares:     [L, H]   share of each head, or None
    residual_shares: [L]      share of the residual bypass, or None
    mlp_shares:      [L]      share of the MLP in the layer's output (Eq. 21), or None
    edit_shares:     [L]      share of what something else put into the layer's output; None: nothing did, in any hop
    closure_error:   largest relative gap between the parts read from the model and the whole; None: not measured
    components:      parts of alpha by name, or numbers beside it; those of hop 0 are kept in the result
    facts:           what the run took, noted in the result's settings
    """

    alpha: Tensor
    head_shares: Tensor | None = None
    residual_shares: Tensor | None = None
    mlp_shares: Tensor | None = None
    edit_shares: Tensor | None = None
    closure_error: float | None = None
    components: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recursion:
    """Result of :func:`recurse` and :func:`solve`.

    scores:         [N]          accumulated importance, sum_k (prod_{m<k} rho_m) alpha_k
    hop_scores:     [hops+1, N]  alpha_k over all positions
    reasoning_mass: [hops+1]     rho_k, share of hop k's mass that lies on the reasoning
    left:           how much importance another hop would have followed, prod_k rho_k
    """

    scores: Tensor
    hop_scores: Tensor
    reasoning_mass: Tensor
    left: float


ENOUGH = 1e-3
"""Hops chosen by themselves stop when less importance than this share would be followed further."""

_MOST_HOPS = 64
"""Hops chosen by themselves stop here in any case; where each keeps 90 %, a thousandth is left."""


_Question = TypeVar("_Question")
_Answer = TypeVar("_Answer")
_Result = TypeVar("_Result")


def conducted(asking: Generator[_Question, _Answer, _Result], answer: Callable[[_Question], _Answer]) -> _Result:
    """What a generator returns whose questions are all conducted by one function."""
    reply: Any = None
    while True:
        try:
            question = asking.send(reply)
        except StopIteration as end:
            return end.value
        reply = answer(question)


def recurse(
    step: Callable[[Tensor], Tensor], initial: Tensor, through: Tensor, hops: int | None, shift: int = 0
) -> Recursion:
    """Follows importance from the target through the reasoning, hop by hop.

    hop 0: ``alpha_0 = step(initial)``;  hop k: ``alpha_k = step(alpha_{k-1} on through)``;
    ``rho_k = sum_through alpha_k / sum alpha_k`` (Eq. 11/23);
    ``scores = sum_k (prod_{m<k} rho_m) alpha_k`` (Eq. 12/24).

    step:    weights [N] -> importance [N]
    initial: [N]          weights of the target
    through: [N] bool     positions that mass is followed through
    hops:    how many; None: until a thousandth is left to follow
    shift:   0 or 1       with 1 the mass on token j weighs position j-1, where the token was decided

    Without mass on ``through`` there is nothing to follow: the remaining of a given number of hops stay zero.
    """
    return conducted(recursing(initial, through, hops, shift), step)


def recursing(
    initial: Tensor, through: Tensor, hops: int | None, shift: int = 0
) -> Generator[Tensor, Tensor, Recursion]:
    """:func:`recurse` for who makes steps of several texts at once: asks for the importance of weights, one by one."""
    most, enough = (_MOST_HOPS, ENOUGH) if hops is None else (hops, 0.0)
    alphas, rhos, carried = [(yield initial)], [], 1.0
    scores = torch.zeros_like(alphas[0])
    while True:
        scores += carried * alphas[-1]
        rhos.append(_mass_share(alphas[-1], through))
        carried *= float(rhos[-1])
        if len(alphas) > most or carried <= enough:
            break
        alphas.append((yield _shifted(alphas[-1] * through, shift)))
    missing = 0 if hops is None else hops + 1 - len(alphas)
    pad = torch.nn.functional.pad
    return Recursion(
        scores, pad(torch.stack(alphas), (0, 0, 0, missing)), pad(torch.stack(rhos), (0, missing)), carried
    )


def _mass_share(alpha: Tensor, inside: Tensor) -> Tensor:
    """Share of the importance that lies inside a mask; 0 where there is none. alpha, inside: [N]; result: []"""
    total = alpha.sum()
    return (alpha * inside).sum() / total if total > 0 else total


def _shifted(weights: Tensor, shift: int) -> Tensor:
    """Weights moved ``shift`` positions to the left, [N]."""
    if shift == 0:
        return weights
    return torch.nn.functional.pad(weights[shift:], (0, shift))


@dataclass(frozen=True)
class Rows:
    """The importance of every single token that may carry weight, a lower-triangular matrix: all a recursion needs.

    positions: [r]     where the tokens that have a row stand, increasing
    alpha:     [r, N]  their importance >= 0
    detail:    what else a mixture of rows tells: weights [r], sum 1 -> Hop; its alpha is replaced
    """

    positions: Tensor
    alpha: Tensor
    detail: Callable[[Tensor], Hop] | None = None

    @cached_property
    def normalised(self) -> Tensor:
        """The rows brought to sum 1, because rho already carries how much mass is passed on (Eq. 12). [r, N]"""
        total = self.alpha.sum(1, keepdim=True)
        return self.alpha / torch.where(total > 0, total, 1.0)

    def step(self, weights: Tensor) -> Hop:
        """The weighted mean of the normalised rows as one hop. weights: [N]"""
        w = weights[self.positions] / weights[self.positions].sum()
        alpha = w @ self.normalised
        return Hop(alpha) if self.detail is None else replace(self.detail(w), alpha=alpha)


def solve(rows: Rows, initial: Tensor, through: Tensor, shift: int = 0) -> Recursion:
    """All hops at once, the limit of :func:`recurse` for many hops::

        x = w R_T ( I - R_TT )^-1        total mass that ever stands on the reasoning T
        scores = w R + x R

    with w the target's weights, R the normalised rows and R_TT those of T on T, which is lower triangular.

    result: two hops, the target's own and all further ones together, weighted like any others. What a token keeps
    to itself for ever (a row with all its mass on its own token) leads nowhere and is left out.
    """
    first = rows.step(initial).alpha
    inside = through[rows.positions + shift].nonzero()[:, 0]
    tokens = rows.positions[inside] + shift
    R = rows.normalised[inside].double()
    if bool(R[:, tokens].triu(1).any()):
        raise InputError(
            "hops=inf cannot follow mass through positions that read what comes after them, as those of an image that "
            "is read as a whole; pass a number of hops"
        )
    R_TT = R[:, tokens].tril()
    kept = R_TT.diagonal().clamp(max=1 - 1e-9)
    system = torch.eye(len(tokens), dtype=torch.float64) - R_TT.tril(-1) - torch.diag(kept)
    mass = first[tokens].double()
    x = torch.linalg.solve_triangular(system.T, mass[:, None], upper=True)[:, 0]
    later = (x @ R).to(first)
    rho = _mass_share(first, through)
    second = later / rho if rho > 0 else torch.zeros_like(first)
    return Recursion(first + later, torch.stack([first, second]), torch.stack([rho, torch.zeros_like(rho)]), 0.0)

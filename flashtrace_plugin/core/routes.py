"""Nodes that rest on earlier ones: what they rest on by all routes together, and by the widest ones.

S sources, then R steps in their order, then one answer. ``shares`` [R+1, S+R] holds what each step and the answer rest
on directly; a step rests on sources and on steps before it, so its columns of steps are strictly lower triangular.
"""

from __future__ import annotations

import torch
from torch import Tensor


def all_routes(shares: Tensor) -> Tensor:
    """What each step and the answer rest on among the sources, by all routes::

        G_RP' = (I - G_RR)^-1 G_RP        for the steps
        G_aP' = G_aP + G_aR G_RP'         for the answer

    result: [R+1, S]
    """
    to_sources, to_steps = _parts(shares)
    steps = torch.linalg.solve_triangular(_system(to_steps), to_sources[:-1], upper=False, unitriangular=True)
    return torch.cat([steps, to_sources[-1:] + to_steps[-1:] @ steps])


def passing(shares: Tensor) -> Tensor:
    """How much of the answer passes through each step on its way to the sources, G_aR (I - G_RR)^-1. result: [R]"""
    _, to_steps = _parts(shares)
    return torch.linalg.solve_triangular(_system(to_steps).T, to_steps[-1, :, None], upper=True, unitriangular=True)[
        :, 0
    ]


def widest_routes(shares: Tensor, k: int) -> list[list[tuple[float, tuple[int, ...]]]]:
    """The k routes to sources with the largest product of shares, from each step and the answer, widest first.

    result: R+1 lists of (product, nodes); nodes count sources, steps and answer, and begin with the node itself

    Routes without mass are left out. Every node takes its best from the best of those before it, which is exact.
    """
    sources = shares.shape[1] - len(shares) + 1
    widths = shares.new_zeros(len(shares), k)
    routes: list[list[tuple[float, tuple[int, ...]]]] = []
    for v, row in enumerate(shares):
        onward = row[sources : sources + v, None] * widths[:v]
        best = torch.cat([row[:sources], onward.flatten()]).sort(descending=True, stable=True)
        found = []
        for width, i in zip(best.values[:k].tolist(), best.indices[:k].tolist(), strict=True):
            step, rank = divmod(i - sources, k)
            tail = (i,) if i < sources else routes[step][rank][1] if width > 0 else ()
            found.append((width, (sources + v, *tail)))
        routes.append([route for route in found if route[0] > 0])
        widths[v, : len(found)] = best.values[:k]
    return routes


def _parts(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the sources and of the steps."""
    steps = len(shares) - 1
    return shares.tensor_split([shares.shape[1] - steps], dim=1)  # type: ignore[return-value]


def _system(to_steps: Tensor) -> Tensor:
    return torch.eye(to_steps.shape[1], dtype=to_steps.dtype) - to_steps[:-1]

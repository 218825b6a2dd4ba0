"""Information flow routes, token by token: the baseline that FlashTrace aggregates away."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from flashtrace_plugin.core.recursion import Hop
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.driver import Step
from flashtrace_plugin.methods.options import driven
from flashtrace_plugin.methods.task import Task


class IFR(Method):
    """Information flow routes, token by token (Ferrando & Voita 2024; Eq. 30/31): FlashTrace's baseline.

    Every target token is attributed by itself and the results are averaged, at M times the cost. The columns are
    kept in ``components["per_token"]`` [M, N]; those of ignored target tokens are 0. It follows no reasoning.
    """

    name = "ifr"
    drives = driven(positions="token", ignore=())
    renormalises = True

    def start(self, task: Task) -> Step:
        """One forward pass; the one step attributes every target position by itself."""
        recorded = task.record()

        def step(weights: Tensor) -> Hop:
            rows = weights.nonzero()[:, 0]
            each = recorded.each(rows)
            per_token = each.alpha.new_zeros(task.length, task.length)
            per_token[rows + task.shift] = each.alpha * task.kept
            mean = each.mixed(weights[rows] / weights[rows].sum())
            return replace(mean, components={"per_token": per_token[task.target.slice]})

        return step

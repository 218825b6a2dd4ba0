"""Information flow routes, token by token: the baseline that FlashTrace aggregates away."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from flashtrace_plugin.core.recursion import Hop
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.driver import Step
from flashtrace_plugin.methods.options import driven
from flashtrace_plugin.methods.task import Task

ROW_COST = 0.04
"""Forward passes that the flow of one row takes: the contribution of every source, compared with the row's own stream.
Measured: .02 at N = 2048 and d = 512, .03 at N = 512, .1 at N = 256 and d = 256."""


class IFR(Method):
    """Information flow routes, token by token (Ferrando & Voita 2024; Eq. 30/31): FlashTrace's baseline.

    Every target token is attributed by itself and the results are averaged, at M times the cost. The columns are
    kept in ``components["per_token"]`` [M, N]; those of ignored target tokens are 0. It follows no reasoning.
    """

    name = "ifr"
    reads_images = True
    drives = driven(positions="token", ignore=())
    renormalises = True
    cost_of = "a flow for every token of the target; the method flashtrace takes one for all of them"

    def cost(self, task: Task) -> float:
        """One forward pass, and a part of one for every row."""
        return 1 + ROW_COST * len(task.target_rows)

    def recorded(self, task: Task) -> Tensor:
        """The positions of the target."""
        return task.rows

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

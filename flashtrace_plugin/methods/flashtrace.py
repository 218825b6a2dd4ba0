"""FlashTrace: one hop for a whole span, followed through the reasoning (arXiv 2602.01914, Eq. 5-24)."""

from __future__ import annotations

from torch import Tensor

from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.driver import Step
from flashtrace_plugin.methods.options import driven
from flashtrace_plugin.methods.task import FlowStep, Task


class FlashTrace(Method):
    """Span-wise, recursive attribution (arXiv 2602.01914): one forward pass, one pass per hop, any span length.

    The span's positions are summed into one vector; in every layer, the share of a source is how much of that vector
    disappears without it (Eq. 5-8, 16-21). The defaults are the paper's.

    Where an answer is one token, they are at chance: with two such answers in one generation, 46 % of the mass on
    the evidence lies on that of the right one, chance being 50 %, because a token's own position is already about the
    next token. ``positions="predicting"`` with four hops has .80 there, ``Recommended`` .99; docs/recommended.md says
    where else the latter finds the evidence better.
    """

    name = "flashtrace"
    reads_images = True
    drives = driven(hops=1, recursion="reasoning", positions="token", ignore=(), sinks="keep")
    hop_cost = 0.15  # the product with W_O, and a few rows of every pattern; .1 to .3 by the shape

    def start(self, task: Task) -> Step:
        """One forward pass; a hop is one pass over the recorded layers."""
        return FlowStep(task.record())

    def recorded(self, task: Task) -> Tensor:
        """The positions that may carry weight."""
        return task.rows

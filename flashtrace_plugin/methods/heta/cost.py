"""What HETA takes, counted before it runs: gradients, products with the Hessian and masked texts, in forward passes.

A masked text and a product run from their token on, so each counts with the share of the text that it covers.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashtrace_plugin.core.hessian.curvature import OVERSAMPLING
from flashtrace_plugin.core.hessian.windows import windows
from flashtrace_plugin.methods.heta.options import HETAOptions
from flashtrace_plugin.methods.task import Task
from flashtrace_plugin.models.read.recurrence import keeps_state

_PREPARED = 5.0
"""The gate's pass, the prefix, and the checks that it may be reused and that eager attention computes the same."""

_GRADIENT = 3.0
"""A pass forward and back without a fused kernel."""

_PRODUCT = 2.2
"""A product with the Hessian goes back through a pass and its gradient; its graph is shared by many."""

_PATTERNS = 1.2
"""What attention without a fused kernel adds to a product, times N / d. Measured on llama shapes of 2 to 8 layers: 2.9
in all at N = d / 2, 4 to 6 at N = d, 3 to 7 from there to N = 4 d, where patterns are formed by blocks."""


@dataclass(frozen=True)
class HopCost:
    """The terms for one weighted target: positions 0..n are scored, and the text runs up to ``stop``.

    depth: share of the layers that is differentiated
    width: d, of the hidden states
    """

    options: HETAOptions
    task: Task
    n: int
    stop: int
    depth: float
    width: int

    def total(self) -> float:
        """Forward passes of the whole text."""
        information = 0.0 if self.options.mask is None else self.n * self._mean_share()
        return _PREPARED + information + self._curvature()

    def _curvature(self) -> float:
        options = self.options
        product = self.depth * (_PRODUCT + _PATTERNS * self.stop / self.width)
        if options.curvature == "gradient_squared":
            return _GRADIENT * self._share(0)
        if options.curvature == "full":
            return product * options.probes * self.n * self._mean_share()
        if options.curvature == "low_rank":
            spans = [(0, self.n)] if options.window is None else windows(self.n, options.window, options.overlap)
            rank = options.rank + OVERSAMPLING
            return product * sum(2 * min(rank, (b - a) * self.width) * self._share(a) for a, b in spans)
        return 0.0

    def _share(self, start: int) -> float:
        """Share of the text that runs for a change at a position.

        All of it where hooks may look at positions, and where what precedes is handed on as a state.
        """
        whole = self.task.source.whole_text() or keeps_state(self.task.source.language_model)
        return 1.0 if whole else (self.stop - start) / self.task.length

    def _mean_share(self) -> float:
        return (self._share(0) + self._share(self.n)) / 2

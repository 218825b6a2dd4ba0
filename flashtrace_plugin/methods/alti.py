"""Span-wise rollout (ALTI) as a method: paths through all layers, with forward passes only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.rollout import attention_sinks, span_rollout
from flashtrace_plugin.core.recursion import Hop
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.driver import Step
from flashtrace_plugin.methods.options import Options, driven, option
from flashtrace_plugin.methods.task import Task


@dataclass(frozen=True)
class _ALTIOptions(Options):
    parked: str = option(
        "drop",
        "positions on which attention parks, often the first token: passed over inside the layers, or kept, where "
        "they end up with nearly all the mass",
        choices=("drop", "keep"),
    )


class ALTI(Method):
    """Span-wise rollout of attention contributions (ALTI, Ferrando et al. 2022), recursed through the reasoning.

    The span's weights go down layer by layer, to the positions in whose contributions the stream is found, so what a
    position had read before is credited to its sources. One forward pass, and per hop one weighted flow and one
    projection per layer for all positions. ``settings["parked_positions"]`` names what was passed over.
    """

    name = "alti"
    reads_images = True
    Options = _ALTIOptions
    drives = driven(hops="auto", recursion="reasoning", positions="predicting", ignore=())
    hop_cost = 0.35  # as FlashTrace's, with a projection of all positions; .3 to .4
    options: _ALTIOptions

    def recorded(self, task: Task) -> Tensor:
        """Every position up to the last that may carry weight."""
        return torch.arange(int(task.rows[-1]) + 1)

    def start(self, task: Task) -> Step:
        """One forward pass that records every position."""
        layers, stop = task.record_all().layers, int(task.rows[-1]) + 1
        length = len(layers[0].resid_pre)
        sinks = attention_sinks(layers, stop) & (self.options.parked == "drop")
        facts = {"parked_positions": sinks.nonzero()[:, 0].tolist()}

        def step(weights: Tensor) -> Hop:
            rho = span_rollout(layers, weights[:length], sinks)
            return Hop(torch.nn.functional.pad(rho, (0, task.length - length)), facts=facts)

        return step

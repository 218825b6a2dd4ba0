"""Attention as an explanation: the mean pattern, and rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.pattern import weighted_flow
from flashtrace_plugin.core.flow.recurrence import softmax_pattern, softmax_patterns
from flashtrace_plugin.errors import UnsupportedModelError
from flashtrace_plugin.evaluation.baselines.base import Baseline, fixed
from flashtrace_plugin.models.read.source import source_for

if TYPE_CHECKING:
    from flashtrace_plugin.evaluation.cases import Case


@torch.no_grad()
def _mean(model: Any, case: Case) -> Tensor:
    """Mean over layers, heads and the positions that predict the target."""
    source = source_for(model)
    rows = torch.arange(case.target.start - 1, case.target.stop - 1)
    layers = source.layers(source.check_ids(case.input_ids), rows)
    weights = torch.ones(len(rows), dtype=torch.float32, device=layers[0].v.device)
    patterns = [pattern for layer in layers for pattern in softmax_patterns(layer.pattern)]
    if not patterns:
        raise UnsupportedModelError("this model has no attention whose mean could be taken")
    flows = [weighted_flow(pattern, weights, len(case.input_ids)).mean(0).cpu() for pattern in patterns]
    return torch.stack(flows).mean(0)[: case.prompt_length]


@torch.no_grad()
def _rollout(model: Any, case: Case) -> Tensor:
    """rho^(l-1) = (rho^(l) + rho^(l) A_l) / 2 from the target's predicting positions down, A_l the mean of heads."""
    source = source_for(model)
    stop = case.target.stop - 1
    layers = source.layers(source.check_ids(case.input_ids)[:, :stop], torch.arange(stop))
    rho = torch.zeros(stop, dtype=torch.float32, device=layers[0].v.device)
    rho[case.target.start - 1 :] = 1 / len(case.target)
    for layer in reversed(layers):
        rho = (rho + weighted_flow(softmax_pattern(layer.pattern), rho, stop).mean(0)) / 2
    return rho[: case.prompt_length].cpu()


ATTENTION = {
    "attention": Baseline(_mean, fixed(1), "mean attention of the positions that predict the target"),
    "attention_rollout": Baseline(_rollout, fixed(1.2), "attention rollout (Abnar and Zuidema 2020) from the target"),
}

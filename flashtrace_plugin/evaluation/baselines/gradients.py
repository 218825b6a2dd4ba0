"""Gradients of the target's log-probability with respect to the embeddings.

The span counts as a sum over its tokens, which for a linear rule is the average over tokens of FlashTrace, Eq. 30, but
for a factor; the scores of the prompt alone are kept (Eq. 31).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashtrace_plugin.evaluation.baselines.base import Baseline, fixed
from flashtrace_plugin.models.guard import evaluating

if TYPE_CHECKING:
    from flashtrace_plugin.evaluation.cases import Case

_STEPS = 16
"""Points on the path of integrated gradients."""


def _times_input(gradient: Tensor, embedded: Tensor) -> Tensor:
    return (gradient * embedded).sum(-1).abs()


def _norm(gradient: Tensor, embedded: Tensor) -> Tensor:
    return gradient.norm(dim=-1)


def _with(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Case], Tensor]:
    def explain(model: Any, case: Case) -> Tensor:
        embedded = _embedded(model, case)
        return _scores(case, combine(_gradient(model, case, embedded), embedded))

    return explain


def _integrated(model: Any, case: Case) -> Tensor:
    """Along the straight line from a prompt of zero vectors, at the middles of equal steps; generation unchanged."""
    embedded = _embedded(model, case)
    start = embedded.clone()
    start[: case.prompt_length] = 0
    total = torch.zeros_like(embedded)
    for step in range(_STEPS):
        at = start + (embedded - start) * (step + 0.5) / _STEPS
        total += _gradient(model, case, at) / _STEPS
    return _scores(case, _times_input(total, embedded - start))


def _embedded(model: Any, case: Case) -> Tensor:
    """[N, d]"""
    return model.get_input_embeddings()(case.input_ids.to(model.device)[None])[0].detach()


def _gradient(model: Any, case: Case, embedded: Tensor) -> Tensor:
    """Of the sum of log P over the target's tokens. embedded, result: [N, d]"""
    at, stop = embedded.detach().requires_grad_(), case.target.stop - 1
    wanted = case.input_ids.to(model.device)[case.target.slice, None]
    with evaluating(model), torch.enable_grad():
        logits = model(inputs_embeds=at[None, :stop], use_cache=False).logits[0, case.target.start - 1 :].float()
        (gradient,) = torch.autograd.grad(logits.log_softmax(-1).gather(-1, wanted).sum(), at)
    return gradient


def _scores(case: Case, values: Tensor) -> Tensor:
    return values.detach()[: case.prompt_length].float().cpu()


GRADIENTS = {
    "gradient_x_input": Baseline(_with(_times_input), fixed(3), "| gradient · embedding |"),
    "gradient_norm": Baseline(_with(_norm), fixed(3), "L2 norm of the gradient at each embedding"),
    "integrated_gradients": Baseline(
        _integrated,
        fixed(3 * _STEPS),
        f"integrated gradients from zero vectors, {_STEPS} steps (Sundararajan 2017)",
    ),
}

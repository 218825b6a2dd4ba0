"""What a run will take, told before it does: its estimate in forward passes of the text, and the bound on that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from math import ceil, floor, inf, log10
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashtrace_plugin.errors import CostError
from flashtrace_plugin.methods.task import Task
from flashtrace_plugin.models.derive.runner import HuggingFace

if TYPE_CHECKING:
    from flashtrace_plugin.methods.base import Method

_CHOSEN_HOPS = 4
"""What "auto" is counted as; on the bundled reasoner it made 2 to 9."""


def hops_ahead(method: Method, task: Task) -> int:
    """How many hops will follow that of the target; all at once by a triangular solve take no more than none."""
    if "hops" not in method.drives or not bool(task.through.any()):
        return 0
    hops = method.driving.hops
    return hops if isinstance(hops, int) else 0 if hops == inf else _CHOSEN_HOPS


def check_cost(method: Method, task: Task) -> None:
    """Raises CostError for a run that takes more forward passes, by the method's estimate, than ``max_cost``."""
    bound = method.driving.max_cost
    if bound is None:
        return
    cost = method.cost(task)
    if cost <= bound:
        return
    estimate = (
        f"{method.name} takes about {_round(cost)} forward passes of these {task.length:,} tokens"
        f"{_duration(task, cost)}: {method.cost_of}"
    )
    cheaper = [*_cheaper(method, task, cost), "a shorter text"]
    raise CostError(
        f"{estimate}. That is more than max_cost={bound:g}. Choose {', '.join(cheaper)}; or allow it with "
        f"max_cost={_round(cost, ceil).replace(',', '')} or more, or with max_cost=None (--yes on the command line)",
        estimate,
    )


def _cheaper(method: Method, task: Task, cost: float) -> Iterator[str]:
    """Settings of the method with which the same text takes less."""
    for setting in method.cheaper:
        other = copy(method)
        other.options = replace(method.options, **setting)
        takes = other.cost(task)
        if takes < cost:
            yield f"{', '.join(f'{k}={v!r}' for k, v in setting.items())} (about {_round(takes)})"


def _duration(task: Task, cost: float) -> str:
    """How long so many forward passes take here, by one that is timed; nothing where none can be run."""
    model = task.source.language_model
    if model is None:
        return ""
    seconds = cost * _forward_seconds(model, task.input_ids)
    unit, name = next(
        (u, n) for u, n in ((86400, "days"), (3600, "hours"), (60, "minutes"), (0, "s")) if seconds > 2 * u
    )
    return f", about {_round(seconds / (unit or 1))} {name} here"


@torch.no_grad()
def _forward_seconds(model: Any, ids: Tensor) -> float:
    runner, last = HuggingFace(model), torch.tensor([ids.shape[1] - 1], device=ids.device)
    began = time.perf_counter()
    runner.plain(ids, last).cpu()  # which waits for an accelerator
    return time.perf_counter() - began


def _round(number: float, to: Callable[[float], int] = round) -> str:
    """Two digits of a number, which is as much as an estimate has."""
    step = 10.0 ** (floor(log10(number)) - 1)
    return f"{to(number / step) * step:,.10g}"

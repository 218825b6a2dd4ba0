"""Explanations that look at the text alone: chance, the end of the prompt, and the answer key that none can know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashtrace_plugin.evaluation.baselines.base import Baseline, fixed, generator_of

if TYPE_CHECKING:
    from flashtrace_plugin.evaluation.cases import Case


def _random(model: Any, case: Case) -> Tensor:
    return torch.rand(case.prompt_length, generator=generator_of(case), dtype=torch.float32)


def _recency(model: Any, case: Case) -> Tensor:
    return torch.arange(1, case.prompt_length + 1, dtype=torch.float32) / case.prompt_length


def _answer_key(model: Any, case: Case) -> Tensor:
    scores = torch.zeros(case.prompt_length, dtype=torch.float32)
    return scores.index_fill(0, torch.tensor([*case.gold, *case.question]), 1.0)


SIMPLE = {
    "random": Baseline(_random, fixed(0), "uniform noise, the floor of every metric; the same for the same tokens"),
    "recency": Baseline(_recency, fixed(0), "the later in the prompt, the higher"),
    "answer_key": Baseline(
        _answer_key, fixed(0), "1 on evidence and question, 0 elsewhere: what nobody can know, so no method"
    ),
}

"""Explanations that change the prompt and watch the likelihood: one token, a chunk, a window, a longer context."""

from __future__ import annotations

from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashtrace_plugin.evaluation.baselines.base import Baseline, chunks, falls, spread
from flashtrace_plugin.evaluation.metrics.likelihood import log_likelihood
from flashtrace_plugin.spans import Span

if TYPE_CHECKING:
    from flashtrace_plugin.evaluation.cases import Case

CHUNK = 8
"""Tokens of a chunk, about a clause: a case has no sentences, because it has no text."""

WINDOW = 3
"""Tokens that occlusion replaces together."""

_KEPT_CHUNKS = 0.25
"""Share of the chunks whose tokens are taken one by one."""


def _one_out(model: Any, case: Case) -> Tensor:
    return falls(model, case, chunks(case.prompt_length, 1), case.generation).clamp(min=0)


def _one_out_of_answer(model: Any, case: Case) -> Tensor:
    return falls(model, case, chunks(case.prompt_length, 1), case.target).clamp(min=0)


def _chunk_out(model: Any, case: Case) -> Tensor:
    groups = chunks(case.prompt_length, CHUNK)
    return spread(falls(model, case, groups, case.generation).clamp(min=0), groups, case.prompt_length)


def _hierarchical(model: Any, case: Case) -> Tensor:
    """Chunks first, then the tokens of the best of them; tokens of the others share the fall of their chunk."""
    groups = chunks(case.prompt_length, _side(case))
    whole = falls(model, case, groups, case.generation).clamp(min=0)
    scores = spread(whole, groups, case.prompt_length)
    best = whole.argsort(descending=True, stable=True)[: ceil(_KEPT_CHUNKS * len(groups))].tolist()
    tokens = [i for number in best for i in groups[number]]
    scores[tokens] = falls(model, case, [[i] for i in tokens], case.generation).clamp(min=0)
    return scores


def _side(case: Case) -> int:
    return ceil(sqrt(case.prompt_length))


def _occlusion(model: Any, case: Case) -> Tensor:
    """Mean over the windows that hold a token of their fall, as Captum's Occlusion with stride 1; 0 where negative."""
    length, size = case.prompt_length, min(WINDOW, case.prompt_length)
    groups = [list(range(i, i + size)) for i in range(length - size + 1)]
    found = falls(model, case, groups, case.generation)
    total, count = torch.zeros(length, dtype=torch.float32), torch.zeros(length, dtype=torch.float32)
    for value, group in zip(found, groups, strict=True):
        total[group] += value
        count[group] += 1
    return (total / count).clamp(min=0)


def _length_probing(model: Any, case: Case) -> Tensor:
    """log P(target | the text from token i on) less that from i + 1 on (Cífka and Liutkus 2023); 0 where negative."""
    found: list[float] = []
    for begin in range(case.prompt_length + 1):
        if begin == case.target.start:
            found.append(found[-1])  # nothing is left that could predict the target, so nothing is gained
            continue
        watched = Span(case.target.start - begin, case.target.stop - begin)
        found.append(float(log_likelihood(model, case.input_ids[None, begin : case.target.stop], generation=watched)))
    values = torch.tensor(found, dtype=torch.float32)
    return (values[:-1] - values[1:]).clamp(min=0)


def _share(case: Case) -> float:
    """Share of the text that is run on average where a change at every prompt token reuses what precedes it."""
    return 1 - case.prompt_length / (2 * len(case.input_ids))


PERTURBATION = {
    "leave_one_out": Baseline(
        _one_out,
        lambda case: case.prompt_length * _share(case),
        "fall of log P(generation) when one token is replaced, 0 where it rises",
    ),
    "leave_one_out_of_answer": Baseline(
        _one_out_of_answer,
        lambda case: case.prompt_length * _share(case),
        "the same for log P(target), the reasoning before it as it is",
    ),
    "leave_one_chunk_out": Baseline(
        _chunk_out,
        lambda case: case.prompt_length / CHUNK * _share(case),
        f"the same for {CHUNK} tokens at once, which share the fall: FlashTrace's perturbation (App. D.2)",
    ),
    "attribot": Baseline(
        _hierarchical,
        lambda case: (1 + _KEPT_CHUNKS * _side(case)) * _side(case) * _share(case),
        "leave one out by hierarchy with keys and values reused, after AttriBoT (Liu et al. 2024), no proxy model",
    ),
    "occlusion": Baseline(
        _occlusion,
        lambda case: case.prompt_length * _share(case),
        f"mean fall of the windows of {WINDOW} tokens that hold a token, as Captum's Occlusion",
    ),
    "context_length_probing": Baseline(
        _length_probing,
        lambda case: case.prompt_length * _share(case),
        "what each token adds to log P(target) as the context grows to the left (Cífka and Liutkus 2023)",
    ),
}

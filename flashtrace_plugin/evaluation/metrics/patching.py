"""Interventions at the target's edges: what the target reads of one prompt token comes from another run instead.

HETA's causal sanity check (its Table 13): Patch-Corr, Intervention@k and the misattribution rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashtrace_plugin.errors import InputError, SpanError
from flashtrace_plugin.evaluation.metrics.bootstrap import need_scipy
from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from flashtrace_plugin.evaluation.metrics.scores import Scores, as_scores, ranking
from flashtrace_plugin.models.guard import check_ids, check_model, evaluating
from flashtrace_plugin.models.prefix import States, kept_states, prefix_cache
from flashtrace_plugin.spans import Span


@dataclass(frozen=True)
class Patching:
    """How scores agree with interventions; None where it is not defined.

    correlation: Patch-Corr, Spearman's rank correlation with the effects; higher is better
    top_effect:  Intervention@k, mean effect of the k tokens with the highest scores, in nats; higher is better
    missed:      misattribution rate, share of the best tokens whose effect is below the threshold; lower is better
    """

    correlation: float | None
    top_effect: float
    missed: float


def patching(scores: Scores, effects: Tensor, *, k: int = 5, missed_of: int = 10, threshold: float = 0.01) -> Patching:
    """Compares scores with the effects of interventions (HETA, Table 13: k = 5, misses of the top 10, tau = 0.01).

    effects: [prompt_length]   of :func:`patch_effects`

    The correlation is None where scores or effects are all equal: there is no ranking.
    """
    values = as_scores(scores, len(effects))
    if not bool(effects.isfinite().all()):
        raise InputError("an effect of an intervention is not finite; run the model in float32")
    order = ranking(values)
    ranked = bool(values.max() > values.min()) and bool(effects.max() > effects.min())
    return Patching(
        float(need_scipy().spearmanr(values.numpy(), effects.numpy()).statistic) if ranked else None,
        float(effects[order[:k]].mean()),
        float((effects[order[:missed_of]] < threshold).double().mean()),
    )


def patch_effects(
    model: object,
    input_ids: Tensor,
    *,
    prompt_length: int,
    target: Span,
    replacement: int | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Fall of log P(target) when what its positions read of one prompt token is that of the reference run::

        Delta_i = log P(x_T | K, V) - log P(x_T | K, V with (k_i, v_i) of every layer from the reference run)

    The reference run has all of the prompt replaced. Only the positions that predict the target read the patched keys
    and values; what other positions had read stays, so these are the edges into the target and no others.

    result: [prompt_length]   in nats, positive where the token supports the target; float64 on the CPU

    A last prompt token that predicts the target itself has no edge to it, and an effect of 0. Each intervention runs
    the target's positions only. Raises UnsupportedModelError for a model that keeps no keys
    and values, SpanError for a target that does not follow the prompt.
    """
    lm = check_model(model)
    ids = check_ids(lm, torch.as_tensor(input_ids))
    if not prompt_length <= target.start < target.stop <= ids.shape[1]:
        raise SpanError(f"target {target} must follow the prompt of {prompt_length} tokens and end by {ids.shape[1]}")
    with evaluating(lm), torch.no_grad():
        effects = _effects(lm, ids, prompt_length, target, replacement_token(lm, replacement), batch_size)
    return effects


def _effects(lm: Any, ids: Tensor, prompt_length: int, target: Span, token: int, batch_size: int | None) -> Tensor:
    start = target.start - 1  # the first position that predicts the target, which runs again
    count = min(prompt_length, start)
    if not count:
        return torch.zeros(prompt_length, dtype=torch.float64)
    reference = ids.clone()
    reference[:, :prompt_length] = token
    own, other = kept_states(lm, ids[:, :start]), kept_states(lm, reference[:, :start])
    tail, size = ids[:, start : target.stop], batch_size or max(1, min(32, 8192 // start))
    plain = _tail_log_likelihood(lm, tail, own)
    found = [
        _tail_log_likelihood(lm, tail, _patched(own, other, range(i, min(i + size, count))))
        for i in range(0, count, size)
    ]
    effects = torch.zeros(prompt_length, dtype=torch.float64)
    effects[:count] = plain - torch.cat(found)
    return effects


def _patched(own: States, other: States, positions: range) -> States:
    """A row for each position, in which its key and value are those of the other run."""
    rows, where = torch.arange(len(positions)), torch.tensor(positions)

    def change(mine: Tensor, theirs: Tensor) -> Tensor:
        changed = mine.repeat(len(rows), 1, 1, 1)
        changed[rows, :, where] = theirs[0, :, where].transpose(0, 1)
        return changed

    return [(change(k, a), change(v, b)) for (k, v), (a, b) in zip(own, other, strict=True)]


def _tail_log_likelihood(lm: Any, tail: Tensor, states: States) -> Tensor:
    """log P of the tail's tokens but the first, for each row of the states. tail: [1, m]; result: [rows]"""
    rows, before = len(states[0][0]), states[0][0].shape[-2]
    inputs = tail[:, :-1].expand(rows, -1)
    mask = torch.ones(rows, before + inputs.shape[1], dtype=torch.long, device=tail.device)
    logits = lm(input_ids=inputs, past_key_values=prefix_cache(states), attention_mask=mask, use_cache=False).logits
    wanted = tail[:, 1:, None].expand(rows, -1, -1).to(logits.device)
    return logits.float().log_softmax(-1).gather(-1, wanted).sum((1, 2)).double().cpu()

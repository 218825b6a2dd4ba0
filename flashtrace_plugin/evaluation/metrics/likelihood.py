"""Log-probability of a generation after many variants of its prompt, in batches."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashtrace_plugin.errors import InputError, SpanError, UnsupportedModelError
from flashtrace_plugin.models.guard import check_ids, check_model, evaluating
from flashtrace_plugin.models.prefix import States, kept_states, prefix_cache
from flashtrace_plugin.models.user_hooks import whole_text
from flashtrace_plugin.spans import Span

_LOGIT_BYTES = 1 << 28
"""Size of a batch's float32 logits when the caller sets no batch size."""


def log_likelihood(model: object, input_ids: Tensor, *, generation: Span, batch_size: int | None = None) -> Tensor:
    """log P(generation | what precedes it) for each row, in nats, summed over the generation.

    model:      a Hugging Face causal language model; run in evaluation mode without gradients, left as it was found
    input_ids:  [rows, N]   variants of one sequence
    generation: positions whose tokens are scored; at least one token precedes them
    batch_size: rows per forward pass; by default as many as keep the logits under ``_LOGIT_BYTES``
    result:     [rows]      float64, on the CPU

    Logits are computed for the positions that predict the generation only, and their log-softmax is in float32
    whatever the model's dtype. Raises InputError for a result that is not finite.
    """
    return token_log_likelihood(model, input_ids, generation=generation, batch_size=batch_size).sum(-1)


def token_log_likelihood(
    model: object, input_ids: Tensor, *, generation: Span, batch_size: int | None = None
) -> Tensor:
    """The same for each token of the generation, so that parts of it can be watched in one run.

    result: [rows, generation]   float64, on the CPU; arguments and errors as in :func:`log_likelihood`

    Where rows begin as the first one does, its keys and values are computed once and only what follows is run.
    """
    lm = check_model(model)
    # Deletion puts the padding id in the place of tokens, the first included.
    ids = torch.stack([check_ids(lm, row, padded=True)[0] for row in input_ids])
    if not 0 < generation.start < generation.stop <= ids.shape[1]:
        raise SpanError(f"generation {generation} must lie in 1:{ids.shape[1]}, with a token before it to predict it")
    size = _batch_size(lm, generation, batch_size)
    with evaluating(lm), torch.no_grad():
        found = _after_prefix(lm, ids, generation, size)
        if found is None:
            found = torch.cat([_batch(lm, part, generation) for part in ids.split(size)])
    totals = found.sum(-1)
    bad = (~totals.isfinite()).nonzero()[:, 0]
    if len(bad):
        raise InputError(
            f"log P of the generation is {float(totals[bad[0]])} for variant {int(bad[0])} of {len(found)}; "
            "run the model in float32 or bfloat16"
        )
    return found


def generation_logits(model: PreTrainedModel, generation: Span, **given: Any) -> Tensor:
    """Logits that predict the generation, for ``input_ids`` [b, n] or ``inputs_embeds`` [b, n, d], n = stop - 1.

    The generation's last token predicts nothing that is asked for, so it is not run. With ``past_key_values`` the
    inputs are what comes after them. result: [b, generation, V]
    """
    kept = {"logits_to_keep": len(generation)} if _keeps_logits(model) else {}
    rows = len(next(iter(given.values())))
    # A replaced token is read like any other, even if it is the pad token, so nothing is masked.
    mask = torch.ones(rows, generation.stop - 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    return model(**given, attention_mask=mask, use_cache=False, **kept).logits[:, -len(generation) :]


def watched_span(generation: Span | None, prompt_length: int, length: int) -> Span:
    """The given span, or all that follows the prompt. Raises SpanError if it is not after the prompt."""
    if not 0 < prompt_length < length:
        raise SpanError(
            f"the prompt has {prompt_length} of {length} tokens; it needs at least one, and so does the generation"
        )
    watched = Span(prompt_length, length) if generation is None else generation
    if watched.start < prompt_length or watched.stop > length:
        raise SpanError(f"generation {watched} is outside {prompt_length}:{length}, the positions after the prompt")
    return watched


_SAVED = 0.2
"""Share of the positions that must be saved before reuse is worth the two further runs that it takes."""

_GAP = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest difference of a token's log P with and without reuse; 0.25 in half precision, where the kernels round."""


def _after_prefix(model: PreTrainedModel, ids: Tensor, generation: Span, size: int) -> Tensor | None:
    """The same with the common beginnings run once; None where that saves little or would give other numbers."""
    starts = _shared_with_first(ids[:, : generation.stop - 1]).clamp(max=generation.start - 1)
    if whole_text(model) or float(starts[1:].double().sum()) < _SAVED * ids.numel():
        return None
    try:
        states = kept_states(model, ids[:1, : int(starts.max())])
    except UnsupportedModelError:
        return None
    order = starts.argsort(descending=True, stable=True)
    parts = []
    for rows in order.split(size):
        parts.append(_batch(model, ids[rows], generation, states, int(starts[rows].min())))
    found = torch.cat(parts)[order.argsort()]
    gap = float((found[:1] - _batch(model, ids[:1], generation)).abs().max())
    return found if gap <= _GAP.get(model.dtype, 0.25) else None


def _shared_with_first(ids: Tensor) -> Tensor:
    """How many tokens each row begins with that are those of the first row. ids: [rows, n]; result: [rows]"""
    return (ids == ids[0]).long().cumprod(1).sum(1)


def _batch(model: PreTrainedModel, ids: Tensor, generation: Span, states: States = (), start: int = 0) -> Tensor:
    """log P for rows [b, N], whose first ``start`` tokens have these states. result: [b, G]"""
    given: dict[str, Any] = {"input_ids": ids[:, start : generation.stop - 1]}
    if start:
        given["past_key_values"] = prefix_cache([(k[..., :start, :], v[..., :start, :]) for k, v in states])
    logits = generation_logits(model, generation, **given)
    rows = [_row(row, wanted) for row, wanted in zip(logits, ids[:, generation.slice], strict=True)]
    return torch.stack(rows)


def _row(logits: Tensor, wanted: Tensor) -> Tensor:
    """One row at a time, so that only one row's float32 copy exists. logits: [G, V]; wanted: [G]; result: [G]"""
    found = logits.float().log_softmax(-1).gather(-1, wanted.to(logits.device)[:, None])
    return found[:, 0].cpu().double()


def _keeps_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _batch_size(model: PreTrainedModel, generation: Span, wanted: int | None) -> int:
    if wanted is None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        return max(1, _LOGIT_BYTES // (4 * vocabulary * len(generation)))
    if wanted < 1:
        raise InputError(f"batch_size must be at least 1, got {wanted}")
    return wanted

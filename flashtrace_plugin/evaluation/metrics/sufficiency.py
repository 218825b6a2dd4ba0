"""Sufficiency: keep only the prompt's most important tokens and see how likely the generation still is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from flashtrace_plugin.evaluation.metrics.likelihood import log_likelihood, watched_span
from flashtrace_plugin.evaluation.metrics.scores import Scores, as_scores, ranking, top_count
from flashtrace_plugin.models.guard import check_ids, check_model
from flashtrace_plugin.spans import Span

_FRACTIONS = (0.1, 0.2, 0.3)


@dataclass(frozen=True, eq=False)
class Sufficiency:
    """What is left of the likelihood when a part of the prompt is kept. Tensors are float64, on the CPU.

    fractions:   F shares of the prompt, above 0 and at most 1
    values:      [F]         log P(generation | the top tokens alone), in nats; higher is better
    random:      [draws, F]  the same for tokens chosen at random, as many of them
    kept:        F tuples    the prompt positions that were kept, ascending
    replacement: id of the token put in the place of the others
    """

    fractions: tuple[float, ...]
    values: Tensor
    random: Tensor
    kept: tuple[tuple[int, ...], ...]
    replacement: int

    @property
    def gain(self) -> Tensor:
        """Nats above the mean random choice of the same size; nan without draws. result: [F]"""
        return self.values - self.random.mean(0)


def sufficiency(
    model: object,
    input_ids: Tensor,
    *,
    prompt_length: int,
    scores: Scores,
    generation: Span | None = None,
    fractions: Sequence[float] = _FRACTIONS,
    draws: int = 4,
    seed: int = 0,
    replacement: int | None = None,
    batch_size: int | None = None,
) -> Sufficiency:
    """Keeps the highest-scoring tokens of the prompt and replaces all others.

    fractions: ceil(fraction * prompt_length) tokens are kept
    draws:     random choices of each size to compare with, the same for every scores; 0 for none
    seed:      of the random choices

    Other arguments as in :func:`deletion_curve`, whose other end this is: where its values hardly differ, because any
    deletion ruins a long prompt, these still do. F * (1 + draws) rows are run. Raises InputError or SpanError for
    arguments that do not fit.
    """
    lm = check_model(model)
    ids = check_ids(lm, torch.as_tensor(input_ids))[0].cpu()
    watched = watched_span(generation, prompt_length, len(ids))
    values = as_scores(scores, prompt_length, ids)
    token, counts = replacement_token(lm, replacement), kept_counts(fractions, prompt_length)
    chosen = top_positions(values, counts) + _random_positions(prompt_length, counts, draws, seed)
    rows = insertion_rows(ids, prompt_length, chosen, token)
    found = log_likelihood(lm, rows, generation=watched, batch_size=batch_size)
    size = len(counts)
    kept = tuple(tuple(sorted(part)) for part in chosen[:size])
    return Sufficiency(tuple(fractions), found[:size], found[size:].view(draws, size), kept, token)


def kept_counts(fractions: Sequence[float], prompt_length: int) -> list[int]:
    """How many tokens each fraction keeps. Raises InputError for none and for one out of range."""
    if not len(fractions):
        raise InputError(f"fractions is empty; give shares of the prompt such as {_FRACTIONS}")
    return [top_count(fraction, prompt_length) for fraction in fractions]


def top_positions(scores: Tensor, counts: Sequence[int]) -> list[list[int]]:
    """The highest-scoring positions, so many for each count."""
    order = ranking(scores).tolist()
    return [order[:count] for count in counts]


def _random_positions(prompt_length: int, counts: Sequence[int], draws: int, seed: int) -> list[list[int]]:
    """So many random positions for each count, for each draw in turn; those of one draw contain each other."""
    if draws < 0:
        raise InputError(f"draws must be 0 or more, got {draws}")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(prompt_length, generator=generator).tolist() for _ in range(draws)]
    return [order[:count] for order in orders for count in counts]


def insertion_rows(ids: Tensor, prompt_length: int, kept: Sequence[Sequence[int]], token: int) -> Tensor:
    """The sequence with all of the prompt replaced except what is kept. ids: [N]; result: [len(kept), N]"""
    rows = ids.repeat(len(kept), 1)
    rows[:, :prompt_length] = token
    for row, positions in zip(rows, kept, strict=True):
        row[list(positions)] = ids[list(positions)]
    return rows

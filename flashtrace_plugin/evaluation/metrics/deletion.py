"""Deletion metrics: delete the prompt's tokens, most important first, and watch the generation's likelihood fall.

RISE (Petsiuk et al., 2018) and MAS (Walker et al., 2024) in the form of FlashTrace, App. F.2, both from one curve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.metrics.likelihood import log_likelihood, watched_span
from flashtrace_plugin.evaluation.metrics.scores import Scores, as_masses, as_scores, ranking
from flashtrace_plugin.models.guard import check_ids, check_model
from flashtrace_plugin.spans import Span

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CurveOptions(TypedDict, total=False):
    """What else :func:`deletion_curve` takes."""

    generation: Span | None
    steps: int
    replacement: int | None
    batch_size: int | None


@dataclass(frozen=True, eq=False)
class DeletionCurve:
    """What deletion did to the likelihood of the generation. Tensors are float64, on the CPU.

    values:      [steps+1]         log P(generation | prompt), in nats, before any deletion and after each group
    groups:      steps tuples      the prompt positions deleted at each step
    scores:      [prompt_length]   the scores that ordered the deletions
    replacement: id of the token put in the place of a deleted one
    """

    values: Tensor
    groups: tuple[tuple[int, ...], ...]
    scores: Tensor
    replacement: int

    @property
    def falls(self) -> bool:
        """Whether deleting the whole prompt makes the generation less likely; else the areas below say nothing."""
        return bool(self.values[0] > self.values[-1])

    @property
    def curve(self) -> Tensor:
        """(value - last) / |first - last|, clipped to [0, 1] and made non-increasing. result: [steps+1]

        Ones where first and last are equal; where the likelihood rises, the first value clips to 0 and so do all.
        """
        first, last = self.values[0], self.values[-1]
        if first == last:
            return torch.ones_like(self.values)
        return ((self.values - last) / (first - last).abs()).clamp(0, 1).cummin(0).values

    def density(self, exponent: float = 1.0) -> Tensor:
        """1 - the share of the score mass deleted so far; a straight line where there is no mass. result: [steps+1]

        exponent: power of the scores first; other than 1 it needs scores >= 0
        """
        mass = self.scores if exponent == 1 else as_masses(self.scores, "an exponent") ** checked_exponent(exponent)
        total = mass.sum()
        if total <= 0:
            return torch.linspace(1, 0, len(self.values), dtype=torch.float64)
        deleted = torch.stack([mass[list(group)].sum() for group in self.groups]).cumsum(0) / total
        return torch.cat([deleted.new_ones(1), 1 - deleted])

    @property
    def rise(self) -> float:
        """Area under the curve, in [0, 1]; lower is better (FlashTrace, Eq. 33). Only the ranking matters."""
        return _area(self.curve)

    def mas(self, exponent: float = 1.0) -> float:
        """Area under curve + |curve - density|, clipped and stretched to [0, 1]; lower is better (FlashTrace, Eq. 34).

        It asks that scores are proportional to effects, so a monotone map of the scores changes it: name the exponent
        beside the number when it is not 1. 0.5 where the penalised curve is constant.
        """
        curve = self.curve
        penalised = (curve + (curve - self.density(exponent)).abs()).clamp(0, 1)
        low, high = penalised.min(), penalised.max()
        return _area((penalised - low) / (high - low)) if high > low else 0.5

    @property
    def aopc(self) -> float:
        """Mean fall of log P over all steps, in nats; higher is better (area over the perturbation curve)."""
        return float((self.values[0] - self.values).mean())


def deletion_curve(
    model: object,
    input_ids: Tensor,
    *,
    prompt_length: int,
    scores: Scores,
    generation: Span | None = None,
    steps: int = 20,
    replacement: int | None = None,
    batch_size: int | None = None,
) -> DeletionCurve:
    """Deletes the prompt's tokens in ``steps`` groups, most important first, by replacing them.

    model:         a Hugging Face causal language model
    input_ids:     [N] or [1, N], prompt and generation
    prompt_length: number of prompt tokens
    scores:        one for each prompt token, or an Attribution; equal scores rank in the order of the text
    generation:    positions whose likelihood is watched; by default all after the prompt, reasoning and output
    steps:         number of groups; they differ by one token at most, the larger ones first. A prompt of fewer tokens
                   is deleted token by token
    replacement:   id put in the place of a deleted token; by default the model's pad token, or its end token
    batch_size:    rows per forward pass; by default as many as memory for the logits allows

    steps + 1 rows are run. Raises InputError or SpanError for arguments that do not fit.
    """
    lm = check_model(model)
    ids = check_ids(lm, torch.as_tensor(input_ids))[0].cpu()
    watched = watched_span(generation, prompt_length, len(ids))
    values = as_scores(scores, prompt_length, ids)
    token = replacement_token(lm, replacement)
    groups = deletion_groups(values, steps)
    rows = deletion_rows(ids, groups, token)
    found = log_likelihood(lm, rows, generation=watched, batch_size=batch_size)
    return DeletionCurve(found, groups, values, token)


def rise(
    model: object, input_ids: Tensor, *, prompt_length: int, scores: Scores, **options: Unpack[CurveOptions]
) -> float:
    """RISE by itself, see :attr:`DeletionCurve.rise`; arguments as in :func:`deletion_curve`."""
    return deletion_curve(model, input_ids, prompt_length=prompt_length, scores=scores, **options).rise


def mas(
    model: object,
    input_ids: Tensor,
    *,
    prompt_length: int,
    scores: Scores,
    exponent: float = 1.0,
    **options: Unpack[CurveOptions],
) -> float:
    """MAS by itself, see :meth:`DeletionCurve.mas`; other arguments as in :func:`deletion_curve`."""
    checked_exponent(exponent)
    return deletion_curve(model, input_ids, prompt_length=prompt_length, scores=scores, **options).mas(exponent)


def checked_exponent(exponent: float) -> float:
    """Raises InputError unless the exponent keeps the ranking."""
    if not 0 < exponent < float("inf"):
        raise InputError(f"exponent must be a finite number above 0, got {exponent}; 1 leaves the scores as they are")
    return exponent


def replacement_token(model: object, replacement: int | None = None) -> int:
    """The id given, or the model's pad token, or its first end token. Raises InputError if there is none."""
    lm = check_model(model)
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    token = _default_replacement(lm) if replacement is None else replacement
    if token is None:
        raise InputError("the model names neither a pad nor an end token; pass the id to use as replacement=")
    if not 0 <= token < vocabulary:
        raise InputError(f"replacement {token} is outside the vocabulary 0..{vocabulary - 1}; pass another id")
    return int(token)


def _default_replacement(model: object) -> int | None:
    config = model.config.get_text_config()  # type: ignore[attr-defined]
    for token in (config.pad_token_id, config.eos_token_id):
        if token is not None:
            return token[0] if isinstance(token, (list, tuple)) else token
    return None


def deletion_groups(scores: Tensor, steps: int) -> tuple[tuple[int, ...], ...]:
    """The positions deleted at each step, most important first, see :func:`deletion_curve`."""
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}; the paper's is 20")
    parts = ranking(scores).tensor_split(min(steps, len(scores)))
    return tuple(tuple(part.tolist()) for part in parts)


def deletion_rows(ids: Tensor, groups: tuple[tuple[int, ...], ...], token: int) -> Tensor:
    """The sequence before any deletion and after each group. result: [steps+1, N]"""
    rows = ids.repeat(len(groups) + 1, 1)
    for step, group in enumerate(groups, start=1):
        rows[step:, list(group)] = token
    return rows


def _area(curve: Tensor) -> float:
    """Trapezoid rule on [0, 1] with equal steps."""
    return float(torch.trapezoid(curve) / (len(curve) - 1))

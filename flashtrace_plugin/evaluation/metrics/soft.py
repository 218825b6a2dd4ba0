"""Soft perturbation: keep or drop embedding dimensions with the scores as probabilities.

Soft-NS and Soft-NC of Zhao & Aletras (2023), for generation as in Zhao & Shan (2024, ReAGent).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.metrics.likelihood import generation_logits, watched_span
from flashtrace_plugin.evaluation.metrics.scores import Scores, as_scores
from flashtrace_plugin.models.guard import check_ids, check_model, evaluating
from flashtrace_plugin.spans import Span


@dataclass(frozen=True)
class SoftFaithfulness:
    """Soft metrics of one attribution, and of random scores under the same draws; higher is better.

    nc:        comprehensiveness: Δ when dimensions are dropped with probability score, over Δ of an all-zero prompt
    ns:        sufficiency: 1 - Δ when they are kept with probability score, over the same Δ, at least 0
    random_nc: nc of uniform random scores
    random_ns: ns of uniform random scores
    """

    nc: float
    ns: float
    random_nc: float
    random_ns: float

    @property
    def relative_nc(self) -> float:
        """nc as a multiple of that of random scores; nan where that is 0."""
        return self.nc / self.random_nc if self.random_nc else nan

    @property
    def relative_ns(self) -> float:
        """ns as a multiple of that of random scores; nan where that is 0."""
        return self.ns / self.random_ns if self.random_ns else nan


def soft_faithfulness(
    model: object,
    input_ids: Tensor,
    *,
    prompt_length: int,
    scores: Scores,
    generation: Span | None = None,
    samples: int = 16,
    seed: int = 0,
    retention: float | None = None,
) -> SoftFaithfulness:
    """Soft-NC and Soft-NS, raw and for random scores::

        Δ(X')   = mean over the generation of the Hellinger distance between P(. | X) and P(. | X')
        Soft-NC = Δ(X ⊙ (1 - e)) / Δ(0)
        Soft-NS = max(0, Δ(0) - Δ(X ⊙ e)) / Δ(0),      e ~ Bernoulli(score), one draw per token and dimension

    Scores are scaled to [0, 1] by their minimum and maximum; constant scores become 1/2. Δ(X') is the mean over
    ``samples`` draws. The random scores are drawn anew for each of them and share its uniform numbers.
    retention: expected share of the dimensions that e keeps, the same for all scores: pi-Soft-NC and -NS (arXiv
    2601.03089), because scores with a larger mean otherwise win. The scaled scores are multiplied by what makes the
    mean of min(1, c e) that share; where too few are above 0, the others get an equal rest.

    Only the prompt is perturbed. Other arguments as in :func:`deletion_curve`. It costs 2 + ``samples`` forward
    passes, the latter of four rows. Raises InputError for a model whose distributions do not depend on the prompt.
    """
    lm = check_model(model)
    ids = check_ids(lm, torch.as_tensor(input_ids))
    watched = watched_span(generation, prompt_length, ids.shape[1])
    keep = _retaining(_unit(as_scores(scores, prompt_length, ids[0])), retention).float()
    if samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}; 16 is usual")
    with evaluating(lm), torch.no_grad():
        probe = _Probe(lm, ids, watched, prompt_length)
        whole = float(probe.distances(torch.zeros(1, prompt_length, 1, dtype=torch.float32)))
        if whole == 0:
            raise InputError("the generation does not depend on the prompt: Δ of an all-zero prompt is 0")
        masks = _masks(keep, probe.embeddings.shape[-1], samples, seed, retention)
        draws = [probe.distances(mask) for mask in masks]
    kept, dropped, random_kept, random_dropped = torch.stack(draws).mean(0).tolist()
    return SoftFaithfulness(
        nc=dropped / whole,
        ns=max(0.0, whole - kept) / whole,
        random_nc=random_dropped / whole,
        random_ns=max(0.0, whole - random_kept) / whole,
    )


class _Probe:
    """Hellinger distance of the generation's distributions when the prompt's embeddings are multiplied by a mask."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, generation: Span, prompt_length: int) -> None:
        self.model, self.generation, self.prompt_length = model, generation, prompt_length
        self.embeddings = model.get_input_embeddings()(ids[:, : generation.stop - 1])
        self.original = self._root(self.embeddings)

    def distances(self, masks: Tensor) -> Tensor:
        """masks: [m, prompt_length, d or 1], one forward pass for all; result: [m] in [0, 1], float64 on the CPU"""
        perturbed = self.embeddings.repeat(len(masks), 1, 1)
        perturbed[:, : self.prompt_length] *= masks.to(perturbed)
        squared = (self._root(perturbed) - self.original).square().sum(-1) / 2
        return squared.sqrt().mean(-1).cpu().double()

    def _root(self, embeddings: Tensor) -> Tensor:
        """Square roots of the distributions. result: [m, generation, V] float32"""
        return generation_logits(self.model, self.generation, inputs_embeds=embeddings).float().softmax(-1).sqrt()


def _masks(keep: Tensor, width: int, samples: int, seed: int, retention: float | None) -> Iterator[Tensor]:
    """For each sample: dimensions kept and dropped by the scores, and by random ones. each: [4, prompt_length, d]"""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        uniform = torch.rand(len(keep), width, generator=generator, dtype=torch.float32)
        random = torch.rand(len(keep), generator=generator, dtype=torch.float32)
        random = _retaining(random.double(), retention).float()
        kept, random_kept = uniform < keep[:, None], uniform < random[:, None]
        yield torch.stack([kept, ~kept, random_kept, ~random_kept])


def _unit(scores: Tensor) -> Tensor:
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else torch.full_like(scores, 0.5)


def _retaining(unit: Tensor, retention: float | None) -> Tensor:
    """Scores in [0, 1] brought to a mean by a factor, at most 1 each. unit, result: [n]"""
    if retention is None:
        return unit
    if not 0 < retention < 1:
        raise InputError(f"retention must be above 0 and below 1, got {retention}; 0.5 is usual")
    room = retention * len(unit)
    unit = torch.where(unit < _NOTHING, 0.0, unit)
    if float((unit > 0).sum()) <= room:
        rest = (room - float((unit > 0).sum())) / max(1, int((unit == 0).sum()))
        return torch.where(unit > 0, 1.0, rest)
    low, high = 0.0, 1.0 / float(unit[unit > 0].min())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if float((unit * middle).clamp(max=1).sum()) < room else (low, middle)
    return (unit * high).clamp(max=1)


_HALVINGS = 200
"""Enough for any two float64 numbers."""

_NOTHING = 1e-12
"""Scaled scores below this count as 0: the factor that would lift them is beyond what numbers can hold."""

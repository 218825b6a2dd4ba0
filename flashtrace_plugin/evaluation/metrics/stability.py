"""How much scores move when they should not: under noise on the embeddings, and under rephrasing (HETA)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flashtrace_plugin.errors import InputError, SpanError
from flashtrace_plugin.evaluation.metrics.bootstrap import need_scipy
from flashtrace_plugin.evaluation.metrics.scores import Scores, as_scores
from flashtrace_plugin.models.guard import check_model


def sensitivity(
    attribute: Callable[[], Scores], model: object, *, delta: float, samples: int = 8, seed: int = 0
) -> float:
    """Mean over tokens of the standard deviation of a score under noise; lower is better (HETA, Eq. 7)::

        1/n sum_i std_s( score_i with ε_s ~ N(0, delta² I) added to every embedding )

    attribute: runs the attribution, ``lambda: method.attribute(prompt, generation)``
    model:     the model it runs; noise is added to what its embedding layer gives, and taken away again
    delta:     standard deviation of the noise, in units of the embeddings
    samples:   number of noise draws, at least 2

    The value has the units of the scores, so compare methods on scores of equal scale only.
    """
    if samples < 2:
        raise InputError(f"samples must be at least 2 for a standard deviation, got {samples}; 8 is usual")
    if not 0 <= delta < float("inf"):
        raise InputError(f"delta must be a finite number >= 0, got {delta}")
    embedding = check_model(model).get_input_embeddings()
    found = []
    for sample in range(samples):
        with _noise(embedding, delta, seed + sample):
            found.append(as_scores(attribute()))
    return float(torch.stack(found).std(0).mean())


@contextmanager
def _noise(embedding: nn.Module, delta: float, seed: int) -> Iterator[None]:
    """Adds noise to the layer's output; the same in every call for the same positions counted from the first."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []

    def add(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        while len(rows) < output.shape[-2]:
            rows.append(torch.randn(output.shape[-1], generator=generator, dtype=torch.float32))
        return output + delta * torch.stack(rows[: output.shape[-2]]).to(output)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def robustness(scores: Scores, other: Scores, *, alignment: Iterable[tuple[int, int]] | None = None) -> float:
    """Spearman's rank correlation of the scores of a text and its rephrasing, in [-1, 1]; higher is better (HETA).

    alignment: pairs (position in the first prompt, position in the second) of corresponding tokens, at least 2; by
               default equal positions of equally long prompts

    Equal scores share their mean rank. Raises InputError where a side is constant, because it has no ranking.
    """
    first, second = as_scores(scores), as_scores(other)
    pairs = list(alignment) if alignment is not None else _same_positions(first, second)
    if len(pairs) < 2:
        raise InputError(f"a rank correlation needs at least 2 aligned tokens, got {len(pairs)}")
    left = first[_inside([i for i, _ in pairs], len(first), "first")]
    right = second[_inside([j for _, j in pairs], len(second), "second")]
    for name, side in (("first", left), ("second", right)):
        if bool((side == side[0]).all()):
            raise InputError(
                f"the aligned scores of the {name} prompt are all {float(side[0]):.3g}: there is no ranking"
            )
    return float(need_scipy().spearmanr(left.numpy(), right.numpy()).statistic)


def _same_positions(first: Tensor, second: Tensor) -> list[tuple[int, int]]:
    if len(first) != len(second):
        raise InputError(f"the prompts have {len(first)} and {len(second)} tokens; pass alignment= pairs of positions")
    return [(i, i) for i in range(len(first))]


def _inside(positions: list[int], length: int, name: str) -> list[int]:
    for position in positions:
        if not 0 <= position < length:
            raise SpanError(f"aligned position {position} is outside the {name} prompt, 0..{length - 1}")
    return positions

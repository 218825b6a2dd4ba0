"""Training batches in which many questions share one body.

A body costs far more tokens than a question about it. So one row holds a body and several questions with their
generations; each question sees the body and itself only, at the positions it would have alone. The loss is exactly
that of the separate samples, and a row gives several times as many trained tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashtrace_plugin.evaluation.tasks.body import Body, Statement, scatter
from flashtrace_plugin.evaluation.tasks.generators import MAX_HOPS, draw_chains, draw_needles
from flashtrace_plugin.evaluation.tasks.sample import Sample, ask
from flashtrace_plugin.evaluation.tasks.vocabulary import NEEDLE_KEYS
from flashtrace_plugin.reasoner.build import EOS

Vocabulary = dict[str, int]  # token id of each word
_Columns = tuple[list[int], ...]  # ids, positions, labels, segments

IGNORED = -100  # the label of tokens without loss
_DIRECT_HOPS = 2  # deeper chains are not asked for without reasoning
_BODY, _PADDING = 0, -1


@dataclass(frozen=True)
class Batch:
    """A batch for the model; every tensor is [batch, width] except the mask.

    ids        token ids
    positions  position of each token in its own sample
    mask       [batch, 1, width, width], 0 where a row may look and -inf elsewhere
    labels     the token to predict at each place, IGNORED where there is no loss
    segments   0 in the body, then the number of the question, -1 in padding
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor
    segments: Tensor


def draw_body(rng: random.Random, length: int, chains: float = 0.65) -> Body:
    """A random body of at most ``length`` words: chains, at a share of ``chains``, or needles with 1 to 4 values."""
    statements = _draw_chains(rng, length) if rng.random() < chains else _draw_needles(rng, length)
    return scatter(rng, statements, length)


def _draw_chains(rng: random.Random, length: int) -> list[Statement]:
    values = rng.choice((1, 1, 1, 2, 3))
    left = rng.randint(2, max(2, min(length // (2 + values), 40)))  # statements still to place
    hops = []
    while left > 0:
        hops.append(min(left, rng.randint(1, MAX_HOPS)))
        left -= hops[-1]
    fitting = (length - 3 * (sum(hops) - len(hops))) // (2 + values)  # only chain ends hold several values
    return [s for chain in draw_chains(rng, hops[: max(1, min(fitting, 100 // values))], values) for s in chain]


def _draw_needles(rng: random.Random, length: int) -> list[Statement]:
    values = rng.randint(1, 4)
    most = min(length // (2 + values), len(NEEDLE_KEYS), 100 // values)
    return draw_needles(rng, rng.randint(min(2, most), most), values)


def draw_question(rng: random.Random, body: Body, direct: float = 0.2) -> Sample:
    """A question about a body, from anywhere in its chains; ``direct`` is the share without reasoning."""
    keys = list(body.statements)
    if rng.random() < direct:
        shallow = [key for key in keys if len(body.follow(key)) <= _DIRECT_HOPS]
        return ask(body, [rng.choice(shallow)], thinking=False, task="training")
    count = min(rng.choice((1, 1, 1, 2, 3)), len(keys))
    return ask(body, rng.sample(keys, count), thinking=True, task="training")


def _make_row(rng: random.Random, encode: Vocabulary, length: int, extra: int, chains: float) -> _Columns:
    """The columns of one body of ``length`` words and questions of ``extra`` words in all."""
    body = draw_body(rng, length, chains)
    rows = _segment(encode, body.words, "", 0, _BODY)
    for number in range(1, extra):
        sample = draw_question(rng, body)
        question = sample.prompt.split()[len(body.words) :]
        part = _segment(encode, question, sample.generation, len(body.words), number)
        if len(rows[0]) + len(part[0]) > length + extra:
            break
        rows = tuple(a + b for a, b in zip(rows, part))
    return rows


def _segment(encode: Vocabulary, given: Sequence[str], generation: str, first: int, number: int) -> _Columns:
    """The columns of one stretch of text; the loss begins where the last given word predicts."""
    generated = [*generation.split(), EOS] if generation else []
    ids = [encode[word] for word in (*given, *generated)]
    labels = [IGNORED] * len(ids)
    if generated:
        labels[len(given) - 1 :] = [*ids[len(given) :], IGNORED]
    return ids, list(range(first, first + len(ids))), labels, [number] * len(ids)


def make_batch(
    rng: random.Random, encode: Vocabulary, length: int, extra: int, rows: int, chains: float = 0.65
) -> Batch:
    """A batch of ``rows`` bodies, padded on the right to ``length + extra``."""
    drawn = [_make_row(rng, encode, length, extra, chains) for _ in range(rows)]
    ids, positions, labels, segments = (
        torch.tensor([row[i] + [fill] * (length + extra - len(row[i])) for row in drawn])
        for i, fill in enumerate((0, 0, IGNORED, _PADDING))
    )
    return Batch(ids, positions, _mask(segments), labels, segments)


def _mask(segments: Tensor) -> Tensor:
    """Each token sees the earlier tokens of the body and of its own segment."""
    same = segments[:, :, None] == segments[:, None, :]
    body = (segments == _BODY)[:, None, :]
    allowed = (same | body).tril()
    return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[:, None]

"""Replaces what an explanation names, token by token so that all positions stay, and watches log P of a later text."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, TypedDict, Union

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError, ModelWarning
from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from flashtrace_plugin.evaluation.metrics.likelihood import token_log_likelihood
from flashtrace_plugin.evaluation.metrics.scores import as_scores
from flashtrace_plugin.evaluation.metrics.sufficiency import kept_counts
from flashtrace_plugin.models.guard import check_ids, check_model
from flashtrace_plugin.models.read.source import source_for
from flashtrace_plugin.spans import Span
from flashtrace_plugin.text import end_ids
from flashtrace_plugin.units.scores import Unit, Units
from flashtrace_plugin.units.shares import unit_tokens
from flashtrace_plugin.units.split import SPLITTERS
from flashtrace_plugin.verify.result import Verification, count_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Unpack

    from flashtrace_plugin.graph.result import Graph

_ALONE = 16
"""Units that are replaced one at a time: half of them the best, the others at random."""
_NOUNS = frozenset({*SPLITTERS, "message", "document", "span"})


class VerifyOptions(TypedDict, total=False):
    """What else :func:`verify_units` takes."""

    fractions: Sequence[float]
    draws: int
    replacement: int | None
    seed: int
    batch_size: int | None


def verify_attribution(
    attribution: Attribution,
    model: object = None,
    *,
    unit: Units = "sentence",
    through: str | None = None,
    **options: Unpack[VerifyOptions],
) -> Verification:
    """See :meth:`flashtrace_plugin.Attribution.verify`."""
    lm = _model_of(attribution, model)
    if attribution.images:
        raise InputError(
            "what an explanation says of images cannot be verified by replacing tokens: the model would be run "
            "without the image, and no token stands for an image that is not there"
        )
    as_scores(attribution)  # refuses numbers that are not finite
    scored = attribution.by(unit)
    places = _places(lm, attribution.token_ids, attribution.tokens[attribution.prompt.slice], scored.units)
    chosen = [i for i, place in enumerate(places) if place]
    watched, name = _watched(attribution, through)
    return verify_units(
        lm,
        torch.tensor(attribution.token_ids),
        units=[places[i] for i in chosen],
        scores=scored.scores[chosen],
        texts=[scored.units[i].text for i in chosen],
        kind=next((scored.units[i].kind for i in chosen if scored.units[i].kind in _NOUNS), "unit"),
        watched=watched,
        name=name,
        target=attribution.target,
        **options,
    )


def verify_step(graph: Graph, row: int, model: object = None, **options: Unpack[VerifyOptions]) -> Verification:
    """See :meth:`flashtrace_plugin.graph.result.Graph.verify`; row: a step, or the number of steps for the answer."""
    lm = _model_of(graph, model)
    count, is_step = len(graph.sources) + row, row < len(graph.steps)
    places = _places(lm, graph.token_ids, graph.pieces, graph.nodes)
    watched = _around(places[count], row) if is_step else graph.target
    chosen = [i for i, place in enumerate(places[:count]) if place]
    return verify_units(
        lm,
        torch.tensor(graph.token_ids),
        units=[places[i] for i in chosen],
        scores=graph.shares[row, chosen],
        texts=[graph.nodes[i].text for i in chosen],
        watched=watched,
        name=f"step {row}" if is_step else "the answer",
        **options,
    )


def verify_units(
    model: object,
    input_ids: Tensor,
    *,
    units: Sequence[Sequence[int]],
    scores: Tensor,
    texts: Sequence[str],
    watched: Span,
    kind: str = "unit",
    name: str = "the answer",
    target: Span | None = None,
    fractions: Sequence[float] = (0.05, 0.1, 0.2),
    draws: int = 8,
    replacement: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Verification:
    """Replaces the units that have the highest scores, and others, and watches log P of a text behind them.

    model:     a Hugging Face causal language model
    input_ids: [N]
    units:     U lists of token positions before the watched text; no position in two of them
    scores:    [U]   equal ones rank in the order of the units
    texts:     U texts of the units, for the reader
    watched:   positions whose log P is watched, given all that precedes them
    kind:      what a unit is, for the reader
    name:      of what is watched, for the reader
    target:    positions of the watched text whose part is told by itself; by default all of them
    fractions, draws, replacement, seed, batch_size: as for :meth:`flashtrace_plugin.Attribution.verify`

    At most 2 + F * (2 + 2 * draws) + 16 rows are run. Raises InputError where units cannot be compared.
    """
    lm = check_model(model)
    ids = check_ids(lm, input_ids)[0].cpu()
    parts = _checked_units(units, len(scores), watched, kind)
    if isinstance(fractions, str) or not isinstance(seed, int):
        raise InputError(
            f"fractions must be numbers such as (0.1, 0.2) and seed a whole number, got {fractions!r} and {seed!r}"
        )
    token, shares = replacement_token(lm, replacement), tuple(sorted(set(fractions)))
    order = scores.argsort(descending=True, stable=True).tolist()
    named = [tuple(order[:count]) for count in kept_counts(shares, len(parts))]
    generator = torch.Generator().manual_seed(seed)
    drawn = [_draws(parts, top, _checked_draws(draws), kind, generator) for top in named]
    alone = _chosen_alone(order, generator)

    top = [list(chain.from_iterable(parts[u] for u in best)) for best in named]
    sets = [[], list(chain.from_iterable(parts)), *top, *chain.from_iterable(drawn), *(parts[u] for u in alone)]
    gone, f, d = _masks(len(ids), sets), len(named), len(named) * draws
    ends, choices, single = gone.split([2, f + d, len(alone)])
    rows = torch.where(torch.cat([ends, choices, ends[1] & ~choices, single]), token, ids)
    found = _log_p(lm, rows, watched, batch_size)
    part = found[0] if target is None else found[0, target.start - watched.start : target.stop - watched.start]
    whole, removed, random_removed, kept, random_kept, alone_removed = found.sum(-1).split([2, f, d, f, d, len(alone)])
    return Verification(
        unit=kind,
        units=tuple(texts),
        scores=scores.double(),
        tokens=tuple(map(len, parts)),
        watched=name,
        log_p=float(whole[0]),
        target_log_p=float(part.sum()),
        replaced_log_p=float(whole[1]),
        fractions=shares,
        named=tuple(named),
        removed=removed,
        kept=kept,
        random_removed=random_removed.view(f, draws).T,
        random_kept=random_kept.view(f, draws).T,
        alone=alone,
        alone_removed=alone_removed,
        replacement=token,
    )


def _log_p(lm: PreTrainedModel, rows: Tensor, watched: Span, batch_size: int | None) -> Tensor:
    """log P of each token of the watched text; rows that occur twice are run once. result: [rows, watched]"""
    different, index = rows.unique(dim=0, return_inverse=True)
    return token_log_likelihood(lm, different, generation=watched, batch_size=batch_size)[index]


def _masks(length: int, sets: Sequence[Sequence[int]]) -> Tensor:
    """Sets of positions as masks. result: [sets, length] bool"""
    masks = torch.zeros(len(sets), length, dtype=torch.bool)
    for mask, positions in zip(masks, sets, strict=True):
        mask[list(positions)] = True
    return masks


def _draws(
    parts: Sequence[Sequence[int]], top: Sequence[int], draws: int, kind: str, generator: torch.Generator
) -> list[list[int]]:
    """Random choices of tokens of the other units, as many as the top ones have."""
    count, others = sum(len(parts[u]) for u in top), [part for u, part in enumerate(parts) if u not in top]
    room = sum(map(len, others))
    if room < count:
        raise InputError(
            f"the {count_of(len(top), kind)} named first have {count} tokens and all others {room}: nothing of equal "
            "length is left to compare with; pass smaller fractions=, or ask for shorter units, such as unit='word'"
        )
    return [_draw(others, count, generator) for _ in range(draws)]


def _draw(others: Sequence[Sequence[int]], count: int, generator: torch.Generator) -> list[int]:
    """Whole units in random order, and a random stretch of the one that would be too much."""
    taken: list[int] = []
    for u in torch.randperm(len(others), generator=generator).tolist():
        room = count - len(taken)
        start = int(torch.randint(max(0, len(others[u]) - room) + 1, (), generator=generator))
        taken += others[u][start : start + room]
    return taken


def _chosen_alone(order: Sequence[int], generator: torch.Generator) -> tuple[int, ...]:
    """All units, or the best ones and random others."""
    best, others = order[: _ALONE // 2], order[_ALONE // 2 :]
    shuffled = torch.randperm(len(others), generator=generator)[: _ALONE - len(best)]
    return (*best, *(others[i] for i in shuffled.tolist()))


def _checked_draws(draws: int) -> int:
    if not isinstance(draws, int) or draws < 2:
        raise InputError(f"draws must be a whole number of at least 2, since they make a range, got {draws!r}")
    return draws


def _checked_units(units: Sequence[Sequence[int]], scores: int, watched: Span, kind: str) -> list[list[int]]:
    parts = [list(one) for one in units]
    if scores != len(parts):
        raise InputError(f"there are {scores} scores for {len(parts)} units; give one for each")
    if len(parts) < 2:
        raise InputError(
            f"there is {'one' if parts else 'no'} {kind} that could be replaced, so there is nothing to compare with; "
            "ask for shorter units, such as unit='word'"
        )
    every = sorted(chain.from_iterable(parts))
    if not all(parts) or len(set(every)) < len(every) or not 0 <= every[0] <= every[-1] < watched.start:
        raise InputError(
            f"units must be lists of token positions before the watched text {watched}, each with at least one, and "
            "no position in two units"
        )
    return parts


def _places(
    lm: PreTrainedModel, token_ids: Sequence[int], pieces: Sequence[str], units: Sequence[Unit]
) -> list[list[int]]:
    """Positions of each unit that can be replaced: of content, and none that begins, ends or pads a text."""
    config = lm.config.get_text_config()
    special = end_ids(None, config, getattr(lm, "generation_config", None)) | {config.bos_token_id}
    owned = unit_tokens(pieces, [unit.ranges for unit in units], [unit.content for unit in units])
    return [[i for i in positions if token_ids[i] not in special] for positions in owned]


def _around(positions: Iterable[int], step: int) -> Span:
    inside = sorted(positions)
    if not inside:
        raise InputError(f"step {step} has no token of its own whose log P could be watched; choose another step")
    return Span(inside[0], inside[-1] + 1)


def _watched(attribution: Attribution, through: str | None) -> tuple[Span, str]:
    """The positions that are watched, and what they are called."""
    followed = attribution.reasoning is not None and attribution.hops > 0
    through = ("reasoning" if followed else "target") if through is None else through
    if through not in ("reasoning", "target"):
        raise InputError(f"through must be 'reasoning' or 'target', got {through!r}")
    if through == "target":
        return attribution.target, "the answer"
    if attribution.reasoning is None:
        raise InputError("there is no reasoning to watch; pass through='target', or reasoning=... to attribute")
    return Span(attribution.prompt.stop, attribution.target.stop), "the reasoning and the answer"


def _model_of(explained: Union[Attribution, Graph], given: object) -> PreTrainedModel:
    """The model to run. Raises InputError where it is not known, or of another family than what is explained."""
    model = explained.model if given is None else given
    if model is None:
        raise InputError(
            "the model is not known: this result was loaded or copied, was made of a matrix, or its model is gone; "
            "pass it as verify(model=...)"
        )
    source = source_for(model)
    ours, theirs = source.describe(), explained.settings
    if theirs.get("family", ours["family"]) != ours["family"]:
        raise InputError(
            f"a model of the family {theirs['family']!r} was explained, and this one is {ours['family']!r}; pass the "
            "model that was explained"
        )
    if theirs.get("model", ours["model"]) != ours["model"]:
        text = f"the model {theirs['model']!r} was explained, and {ours['model']!r} is run to verify it"
        warnings.warn(text, ModelWarning, stacklevel=4)
    return check_model(source.language_model)

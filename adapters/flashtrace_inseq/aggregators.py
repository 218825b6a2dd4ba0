"""Choosing one part of the scores, ``out.aggregate("hops", hop=1)``, and recursion: ``out.aggregate("recursive")``."""

from __future__ import annotations

from typing import Any

from inseq.data.aggregator import Aggregator, ContiguousSpanAggregator, SequenceAttributionAggregator
from inseq.data.attribution import FeatureAttributionSequenceOutput

from flashtrace_inseq.outputs import TOTAL, FlashTraceSequenceOutput, attributions_of, no_parts
from flashtrace_inseq.recursion import recursive_sequence
from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.units.scores import Units
from flashtrace_plugin.units.shares import unit_tokens


class PartAggregator(SequenceAttributionAggregator):
    """Keeps one part of the scores and drops the others; nothing is averaged or normalised.

    Args:
        part (:obj:`str`, `optional`): Name of the part, such as ``"hop 1"``. Default: ``"total"``.
        select_idx (:obj:`int`, `optional`): Its index instead, 0 for the total, as Inseq's command line gives it.
    """

    aggregator_name = "parts"

    @classmethod
    def aggregate(
        cls,
        attr: FlashTraceSequenceOutput,
        *,
        part: str = TOTAL,
        select_idx: int | None = None,
        normalize: bool = False,
        **kwargs: Any,
    ) -> FlashTraceSequenceOutput:
        """The sequence with scores [rows, columns] of one part. Raises InputError for a part it has not."""
        if select_idx is None:
            select_idx = _index(attr, part)
        return super().aggregate(attr, select_idx=select_idx, normalize=normalize, **kwargs)


class HopAggregator(PartAggregator):
    """Keeps the scores of one hop, over all positions before the target; by default the total over hops.

    Args:
        hop (:obj:`int`, `optional`): 0 for the target's own sources, 1 for the sources of the reasoning that hop 0
            found, and so on. Default: the total, which counts the prompt only where reasoning was followed;
            ``part="everywhere"`` counts the generation, too.
    """

    aggregator_name = "hops"

    @classmethod
    def aggregate(
        cls, attr: FlashTraceSequenceOutput, *, hop: int | None = None, part: str = TOTAL, **kwargs: Any
    ) -> FlashTraceSequenceOutput:
        """The sequence with scores [rows, columns] of one hop. Raises InputError for a hop it has not."""
        return super().aggregate(attr, part=part if hop is None else f"hop {hop}", **kwargs)


class _UnitAggregator(ContiguousSpanAggregator):
    """Merges the prompt's tokens into sentences or other units, as ``spans`` merges those of given positions.

    Args:
        unit (:obj:`str`, `optional`): "word", "line", "sentence", "paragraph", "step", or what else
            ``flashtrace_plugin.Attribution.by`` takes. A token in two units counts for the one with more of it; to
            split it, ask ``attributions(out)[0].by(unit)``. Default: "sentence".
    """

    aggregator_name = "units"

    @classmethod
    def aggregate(cls, attr: FlashTraceSequenceOutput, *, unit: Units = "sentence", **kwargs: Any) -> Any:
        """The sequence with a row for each unit. Raises InputError for units that are not there."""
        return super().aggregate(attr, target_spans=_unit_spans(attributions_of(attr)[0], unit), **kwargs)


def _unit_spans(found: Attribution, unit: Units) -> list[tuple[int, int]]:
    """Token positions of the units of the prompt, those of one token left out: there is nothing to merge."""
    units = [one.unit for one in found.by(unit)]
    wanted = [one.content for one in units]
    owned = unit_tokens(found.tokens[found.prompt.slice], [one.ranges for one in units], wanted)
    return [(tokens[0], tokens[-1] + 1) for tokens in sorted(owned) if len(tokens) > 1]


class RecursiveAggregator(Aggregator):
    """Turns the scores of single tokens into those of a target, through the reasoning that the target rests on.

    Args:
        hops (:obj:`int` or :obj:`str`, `optional`): How many; ``"auto"``; or infinity, all at once. Default: "auto".
        target, reasoning: Positions of the sequence, or pieces of the generation where there is a tokenizer. Those
            that are left out are found in the text, which also needs the tokenizer.
        tokenizer (`optional`): The model's tokenizer. Default: None.
        prompt_length (:obj:`int`, `optional`): Default: where attribution began, ``attr_pos_start``.
        recursion, mass, ignore, format: As for :func:`flashtrace_plugin.Recursive`.
    """

    aggregator_name = "recursive"

    @classmethod
    def _aggregate(cls, attr: FeatureAttributionSequenceOutput, **options: Any) -> FlashTraceSequenceOutput:
        """One column for the target. Raises InputError for scores that cannot be followed."""
        return recursive_sequence(attr, **options)


def _index(attr: FlashTraceSequenceOutput, part: str) -> int:
    parts = getattr(attr, "_parts", None)
    if not parts or attr.target_attributions.ndim != 3:
        raise no_parts(part)
    if part not in parts:
        raise InputError(f"no part {part!r}; there are {', '.join(parts)}")
    return parts.index(part)

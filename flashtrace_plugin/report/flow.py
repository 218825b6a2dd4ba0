"""How mass moves from the target through the reasoning to the prompt: parts of the text, and what each hop finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.spans import Span

PARTS = ("prompt", "reasoning", "target", "rest")
HEIGHT = 28
_BINS = 240


@dataclass(frozen=True)
class _Segment:
    """A stretch of text of one part; ``rest`` is generated text that is neither reasoning nor target."""

    part: str
    span: Span


def segments(attribution: Attribution) -> list[_Segment]:
    """The text cut into its parts, in order and without gaps."""
    named = [_Segment("prompt", attribution.prompt), _Segment("target", attribution.target)]
    if attribution.reasoning is not None:
        named.insert(1, _Segment("reasoning", attribution.reasoning))
    found, end = [], 0
    for segment in [*named, None]:
        start = len(attribution.tokens) if segment is None else segment.span.start
        if end < start:
            found.append(_Segment("rest", Span(end, start)))
        if segment is not None:
            found.append(segment)
            end = segment.span.stop
    return found


@dataclass(frozen=True)
class _HopRow:
    """One hop in numbers.

    shares:     part -> share of the hop's mass, 0 to 1; empty if the hop has no mass
    reasoning:  rho_k, the share that is followed further (Eq. 11/23)
    carried:    prod_{m<k} rho_m, the weight of the hop in the total (Eq. 12/24)
    score:      share of the total score that the hop brought
    strip:      for each segment but what follows the target, a path of its scores
    """

    number: int
    shares: dict[str, float]
    reasoning: float
    carried: float
    score: float
    strip: list[tuple[_Segment, float, str]]


def hop_rows(attribution: Attribution) -> list[_HopRow]:
    """A row for every hop that covers all positions; none for hops that had no reasoning to follow."""
    cut = segments(attribution)
    hops = [h for h in attribution.hop_scores if len(h) == len(attribution.tokens)]
    rho = attribution.reasoning_mass.tolist()
    carried = attribution.hop_weights.tolist()
    brought = [c * float(h[attribution.prompt.slice].sum()) for c, h in zip(carried, hops, strict=False)]
    total = sum(brought) or 1.0
    return [
        _HopRow(
            k, _shares(cut, hop), rho[k], carried[k], brought[k] / total, _strip(cut, _without_sinks(attribution, hop))
        )
        for k, hop in enumerate(hops)
        if k == 0 or attribution.reasoning is not None or hop.any()
    ]


def _without_sinks(attribution: Attribution, values: Tensor) -> Tensor:
    """Numbers [N] with 0 at known sinks, next to which nothing else could be seen."""
    return values.index_fill(0, torch.tensor(attribution.sinks, dtype=torch.long), 0.0)


def _shares(cut: Sequence[_Segment], hop: Tensor) -> dict[str, float]:
    whole = float(hop.sum())
    if whole <= 0:
        return {}
    mass = dict.fromkeys(PARTS, 0.0)
    for segment in cut:
        mass[segment.part] += float(hop[segment.span.slice].sum())
    return {part: m / whole for part, m in mass.items()}


def _strip(cut: Sequence[_Segment], hop: Tensor) -> list[tuple[_Segment, float, str]]:
    """Segments up to the target with their widths in percent, which sum to 100, and a path each.

    No part is so narrow that it cannot be seen: a stretch gets at least 8 % (2 % for what is neither prompt, reasoning
    nor target) of the width before the widths are scaled to 100 %.
    """
    upto = cut[: [s.part for s in cut].index("target") + 1]
    whole = upto[-1].span.stop
    wide = [max(0.02 if s.part == "rest" else 0.08, len(s.span) / whole) for s in upto]
    peak = float(hop.max()) or 1.0
    widths = [100 * w / sum(wide) for w in wide]
    return [(s, w, _path(hop[s.span.slice] / peak, w)) for s, w in zip(upto, widths, strict=True)]


def _path(values: Tensor, width: float) -> str:
    """Steps of the highest value in each of at most 2.4 bins per percent of width, in a box bins x HEIGHT."""
    bins = max(1, min(len(values), round(_BINS * width / 100)))
    edges = [round(i * len(values) / bins) for i in range(bins + 1)]
    heights = [HEIGHT * (1 - float(values[a:b].max())) for a, b in pairwise(edges)]
    steps = "".join(f"V{h:.3g}h1" for h in heights)
    return f"M0 {HEIGHT}{steps}V{HEIGHT}z"

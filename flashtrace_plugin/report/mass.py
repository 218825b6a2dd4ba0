"""Where the mass of a view lies, in words: also what is not shown, such as that of the answer itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.report.kinds import Kind
from flashtrace_plugin.report.marks import percent

_PLACES = (
    "the prompt’s contents",
    "the reasoning",
    "other generated text",
    "the answer itself",
    "template tokens and tags",
    "sinks, which draw mass whatever is explained",
)


def total_mass(attribution: Attribution) -> Tensor:
    """Where all mass ends: that of every hop, less what the next one follows from the reasoning. result: [N]::

        sum_k ( prod_{m<k} rho_m ) alpha_k / |alpha_k|,  on the reasoning less sum_{k>0} prod_{m<k} rho_m

    It adds up to 1, and nothing counts twice, unlike in ``Attribution.totals``.
    """
    hops, weights = attribution.hop_scores, attribution.hop_weights
    sums = hops.sum(1, keepdim=True)
    ended = weights @ (hops / sums).masked_fill(sums <= 0, 0.0)
    if attribution.reasoning is not None and attribution.hops:
        where = attribution.reasoning.slice
        kept, followed = ended[where].sum(), weights[1:] @ hops[1:].any(1).float()
        ended[where] *= ((kept - followed) / kept).clamp(min=0) if kept > 0 else 0.0
    return ended


def mass_in_words(attribution: Attribution, kinds: Sequence[Kind], mass: Tensor) -> str:
    """The shares of magnitudes [N] on parts of the text, largest first; empty where there is no mass."""
    mass = mass.abs().double()
    whole = float(mass.sum())
    if whole <= 0:
        return ""
    shares = torch.zeros(len(_PLACES), dtype=torch.float64).index_add(0, _places(attribution, kinds), mass) / whole
    found = [i for i in shares.argsort(descending=True, stable=True).tolist() if shares[i] > 0]
    return "; ".join(f"{percent(float(shares[i]))} on {_PLACES[i]}" for i in found)


def _places(attribution: Attribution, kinds: Sequence[Kind]) -> Tensor:
    """The index into ``_PLACES`` of every token. [N]"""
    fixed = {Kind.TARGET: 3, Kind.TEMPLATE: 4, Kind.SINK: 5}
    places = [fixed.get(kind, 0 if i in attribution.prompt else 2) for i, kind in enumerate(kinds)]
    for i in attribution.reasoning or ():
        places[i] = 1 if kinds[i] is Kind.CONTENT else places[i]
    return torch.tensor(places)

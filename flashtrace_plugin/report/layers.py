"""Shares of heads, residual stream and MLP, layer by layer, for each hop."""

from __future__ import annotations

from dataclasses import dataclass

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.report.colours import level


@dataclass(frozen=True)
class _LayerRow:
    """One layer of a hop: a colour step for each head, and the shares of residual stream and MLP, 0 to 1."""

    number: int
    heads: list[int]
    residual: float
    mlp: float


@dataclass(frozen=True)
class _LayerMap:
    """All layers of a hop, in the order of the model.

    maximum:   largest share of a head
    strongest: the five strongest heads, by TransformerLens' names, with their shares
    bypass:    whether the method defines shares of residual stream and MLP; HETA does not
    """

    hop: int
    rows: list[_LayerRow]
    maximum: float
    strongest: list[tuple[str, float]]
    bypass: bool


def layer_maps(attribution: Attribution) -> list[_LayerMap]:
    """A map for every hop that has any share; none for a method without head shares."""
    heads = attribution.head_scores
    if heads.dim() != 3 or not heads.numel():
        return []
    return [_map(attribution, k) for k in range(len(heads)) if float(heads[k].sum()) > 0]


def _map(attribution: Attribution, k: int) -> _LayerMap:
    heads = attribution.head_scores[k]
    maximum = float(heads.max())
    residual, mlp = attribution.residual_shares[k].tolist(), attribution.mlp_shares[k].tolist()
    rows = [
        _LayerRow(layer, [level(v, maximum) for v in values], residual[layer], mlp[layer])
        for layer, values in enumerate(heads.tolist())
    ]
    best = heads.flatten().argsort(descending=True)[:5].tolist()
    names = [f"L{i // heads.shape[1]}H{i % heads.shape[1]}" for i in best]
    strongest = list(zip(names, heads.flatten()[best].tolist(), strict=True))
    return _LayerMap(k, rows, maximum, strongest, bypass=bool(attribution.residual_shares.any()))

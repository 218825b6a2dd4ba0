"""What the script of a report gets: numbers as packed arrays, and texts that it only ever writes as text."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.report.colours import CLIP, LEVELS
from flashtrace_plugin.report.kinds import Kind
from flashtrace_plugin.report.marks import shorten
from flashtrace_plugin.report.pieces import Pieces
from flashtrace_plugin.report.views import View
from flashtrace_plugin.units.shares import unit_tokens

if TYPE_CHECKING:
    from flashtrace_plugin.graph.result import Graph

_LEAST = 0.001
"""Shares of a graph below this are left out of the page."""


def packed(values: Any, kind: str) -> str:
    """Numbers as base64 of little-endian values of a NumPy type, such as "<f4"."""
    return base64.b64encode(np.asarray(values).astype(kind).tobytes()).decode()


def page_data(
    views: Sequence[View], masses: Sequence[str], cuts: Sequence[Pieces], kinds: Sequence[Kind], **other: Any
) -> dict[str, Any]:
    """Views, cuts and kinds of tokens for the script.

    masses: for each view, where its mass lies, in words
    other:  what else it needs to know, by name
    """
    return {
        "levels": LEVELS,
        "clip": CLIP,
        "kinds": packed([int(kind) for kind in kinds], "<u1"),
        "views": [_view(view, mass) for view, mass in zip(views, masses, strict=True)],
        "cuts": [_cut(cut) for cut in cuts],
        **other,
    }


def _view(view: View, mass: str) -> dict[str, Any]:
    told = {"label": view.label, "note": view.note, "signed": view.signed, "sources": view.sources, "mass": mass}
    return told | {"values": packed(view.values, "<f4")}


def _cut(cut: Pieces) -> dict[str, Any]:
    return {
        "name": cut.name,
        "owner": packed(cut.owner, "<i4"),
        "parts": [[token, piece, float(f"{share:.6g}")] for token, piece, share in cut.parts],
        "names": list(cut.names),
    }


def graph_data(graph: Graph) -> dict[str, Any]:
    """Nodes of a graph with what each rests on, directly and by all routes.

    owner: [N] node that each token belongs to, -1 for none
    nodes: label, number of tokens, and for steps and the answer pairs of (node, share)
    """
    units = [unit.ranges for unit in graph.nodes]
    owner = torch.full((len(graph.pieces),), -1, dtype=torch.long)
    places = unit_tokens(graph.pieces, units, [unit.content or unit.kind == "rest" for unit in graph.nodes])
    for node, tokens in enumerate(places):
        owner[tokens] = node
    first = len(graph.sources)
    rows = [
        {"direct": _pairs(graph.shares[v]), "total": _pairs(graph.totals[v]), "label": _label(graph, first + v)}
        for v in range(len(graph.steps) + 1)
    ]
    return {"owner": packed(owner, "<i4"), "first": first, "rows": rows, "counts": [len(p) for p in places]}


def _label(graph: Graph, node: int) -> str:
    step = node - len(graph.sources) + 1
    name = f"Step {step}" if step <= len(graph.steps) else "Answer"
    return f"{name}: “{shorten(graph.nodes[node].text, 60)}”"


def _pairs(row: torch.Tensor) -> list[list[float]]:
    found = (row >= _LEAST).nonzero()[:, 0].tolist()
    return [[node, float(f"{row[node]:.6g}")] for node in found]


def head_data(attribution: Attribution, hops: Sequence[int]) -> Mapping[int, str]:
    """Shares of heads of every hop that is drawn, layer by layer."""
    return {hop: packed(attribution.head_scores[hop].flatten(), "<f4") for hop in hops}

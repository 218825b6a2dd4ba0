"""Routes drawn as a flow: sources on the left, steps of the reasoning from top to bottom, the answer last.

Everything is placed here, so that the drawing needs no script, prints, and can be saved as a file.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashtrace_plugin.report.marks import percent, visible

if TYPE_CHECKING:
    from flashtrace_plugin.graph.result import Graph

_MOST = 8
"""Sources, and steps, that are drawn; those with most of the answer."""
_LEAST_IMPORTANCE, _LEAST_EDGE = 0.005, 0.03
_BOX, _GAP, _BETWEEN, _LINE = 330, 14, 130, 16
_CHARACTERS = 48
_WIDEST, _ENTRY = 12, 13
"""Sizes in pixels, but for the characters of a line."""


@dataclass(frozen=True)
class _Box:
    """A node: ``part`` is "prompt", "reasoning" or "target", ``head`` its name and share, ``lines`` its text."""

    node: int
    part: str
    head: str
    lines: list[str]
    x: int
    y: int

    width = _BOX

    @property
    def height(self) -> int:
        return 14 + _LINE * (1 + len(self.lines))

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


@dataclass(frozen=True)
class _Edge:
    """What rests on what: a path from one box to the other, its width, and its share in words."""

    source: int
    node: int
    path: str
    width: float
    share: float
    label: str
    x: float
    y: float


@dataclass(frozen=True)
class _Diagram:
    """Boxes and edges, and how much was left out, in words."""

    boxes: list[_Box]
    edges: list[_Edge]
    left_out: str

    width = 2 * _BOX + _BETWEEN + 90

    @property
    def height(self) -> int:
        return max(box.y + box.height for box in self.boxes) + 8


def diagram_of(graph: Graph) -> _Diagram:
    """The strongest sources and steps of a graph, and the edges between them."""
    first, last = len(graph.sources), len(graph.nodes) - 1
    totals, importance = graph.totals[-1].tolist(), graph.importance.tolist()
    sources = _strongest([share if graph.sources[s].content else 0.0 for s, share in enumerate(totals)])
    steps = [first + r for r in _strongest(importance)]
    heads = {s: f"{graph.sources[s].name or 'prompt'} · {percent(totals[s])} of the answer" for s in sources}
    heads |= {v: f"step {v - first + 1} · {percent(importance[v - first])} passes through it" for v in steps}
    heads[last] = "answer"
    right = _column(graph, [*steps, last], heads, _BOX + _BETWEEN, 4)
    left = _column(graph, sources, heads, 4, 4)
    boxes = {box.node: box for box in _levelled(left, right)}
    strong = [(v, u, share) for v, u, share in graph.edges(_LEAST_EDGE) if {u, v} <= set(boxes)]
    edges = [_edge(boxes[u], boxes[v], share, _entry(strong, u, v, boxes)) for v, u, share in strong]
    return _Diagram(list(boxes.values()), edges, _left_out(graph, len(sources), len(steps)))


def _strongest(shares: Sequence[float]) -> list[int]:
    best = sorted(range(len(shares)), key=lambda i: -shares[i])[:_MOST]
    return sorted(i for i in best if shares[i] >= _LEAST_IMPORTANCE)


def _column(graph: Graph, nodes: Sequence[int], heads: dict[int, str], x: int, y: int) -> list[_Box]:
    boxes = []
    for node in nodes:
        part = "prompt" if node < len(graph.sources) else "target" if node == len(graph.nodes) - 1 else "reasoning"
        text = visible(" ".join(graph.nodes[node].text.split()))
        lines = textwrap.wrap(text, _CHARACTERS, max_lines=2, placeholder=" …")
        boxes.append(_Box(node, part, heads[node], lines or ["␣"], x, y))
        y += boxes[-1].height + _GAP
    return boxes


def _levelled(left: list[_Box], right: list[_Box]) -> list[_Box]:
    """Both columns, the shorter one set to the middle of the longer."""
    low, high = ((c[-1].y + c[-1].height if c else 0) for c in (left, right))
    down = (max(0, high - low) // 2, max(0, low - high) // 2)
    return [_Box(**(vars(b) | {"y": b.y + d})) for column, d in zip((left, right), down, strict=True) for b in column]


def _entry(edges: Sequence[tuple[int, int, float]], source: int, node: int, boxes: Mapping[int, _Box]) -> float:
    """How far from its middle an edge from a source enters a box, so that edges lie side by side."""
    order = sorted((u for v, u, _ in edges if v == node and boxes[u].part == "prompt"), key=lambda u: boxes[u].y)
    return (order.index(source) - (len(order) - 1) / 2) * _ENTRY if source in order else 0.0


def _edge(source: _Box, node: _Box, share: float, entry: float) -> _Edge:
    """From a source to the right; from an earlier step around the right side of the column."""
    width = max(1.0, _WIDEST * share)
    if source.part == "prompt":
        a, b = source.x + _BOX, node.x
        end = node.middle + max(-node.height / 2, min(node.height / 2, entry))
        path = f"M{a} {source.middle:g}C{a + 60} {source.middle:g} {b - 60} {end:g} {b} {end:g}"
        x, y = b - 40.0, end - 2
    else:
        a, bend = node.x + _BOX, 20 + min(70, (node.y - source.y) / 5)
        path = f"M{a} {source.middle:g}C{a + bend} {source.middle:g} {a + bend} {node.middle:g} {a} {node.middle:g}"
        x, y = a + 0.75 * bend + 4, (source.middle + node.middle) / 2 + 4
    return _Edge(source.node, node.node, path, width, share, percent(share), x, y)


def _left_out(graph: Graph, sources: int, steps: int) -> str:
    content = sum(unit.content for unit in graph.sources)
    return (
        f"Drawn: {sources} of {content} units of the prompt and {steps} of {len(graph.steps)} steps, those with most "
        f"of the answer, and what rests directly on what, from {percent(_LEAST_EDGE)} on; the width is the share. "
        "What the shares lack to 100 % ends on template tokens, or on generated text that is no step."
    )

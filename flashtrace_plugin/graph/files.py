"""A graph for other programs and for reading: GraphML, Graphviz' language, and a page of HTML."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtrace_plugin import __version__
from flashtrace_plugin.report import colours
from flashtrace_plugin.report.marks import one_line, percent, shorten

if TYPE_CHECKING:
    import networkx
    from jinja2 import Template

    from flashtrace_plugin.graph.result import Graph

_SHAPES = {"source": "box", "step": "ellipse", "answer": "doubleoctagon"}
_STRONGEST = 5
"""What a step of the page is shown to rest on, and routes."""


def write_graphml(graph: networkx.DiGraph, path: str | Path) -> None:
    """Writes GraphML, with characters that XML forbids as visible ones."""
    import networkx as nx

    for _, node in graph.nodes(data=True):
        node.update({name: one_line(node[name]) for name in ("text", "name")})
    nx.write_graphml(graph, path)


def as_dot(graph: networkx.DiGraph) -> str:
    """Graphviz' language; labels are inert whatever the text is."""
    lines = ["digraph steps {", "  rankdir=TB;", '  node [fontname="sans-serif"];']
    for i, node in graph.nodes(data=True):
        label = _quoted(f"{shorten(node['text'], 60)} ({percent(node['score'])})")
        lines.append(f"  n{i} [label={label}, shape={_SHAPES[node['part']]}];")
    for v, u, share in graph.edges(data="share"):
        lines.append(f'  n{v} -> n{u} [label="{share:.2f}", penwidth={0.5 + 4 * share:.2f}];')
    return "\n".join([*lines, "}", ""])


def _quoted(label: str) -> str:
    """A string that Graphviz shows as it is: its escapes begin with a backslash, and end a line."""
    return '"' + label.replace("\\", "\\\\").replace('"', '\\"') + '"'


def as_page(graph: Graph) -> str:
    """The graph as a page: answer and steps with what they rest on most, and the widest routes."""
    title = f"What “{shorten(graph.answer.text, 60)}” rests on"
    return _template().render(
        title=title,
        version=__version__,
        graph=graph,
        nodes=[_shown(graph, v) for v in range(len(graph.steps) + 1)],
        routes=graph.routes(_STRONGEST),
        unused=set(graph.unused()),
        light=colours.LIGHT.variables(),
        dark=colours.DARK.variables(),
    )


def _shown(graph: Graph, v: int) -> dict[str, Any]:
    """A step, or last the answer, with what it rests on most directly and by all routes."""
    best = graph.shares[v].argsort(descending=True, stable=True)[:_STRONGEST].tolist()
    step = None if v == len(graph.steps) else v
    return {
        "step": step,
        "unit": graph.nodes[len(graph.sources) + v],
        "direct": [(u, graph.nodes[u], float(graph.shares[v, u])) for u in best if graph.shares[v, u] > 0],
        "top": graph.by_source(step).top(_STRONGEST),
        "inside": float(graph.inside[v]),
        "outside": float(graph.outside[v]),
        "importance": None if step is None else float(graph.importance[v]),
    }


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("flashtrace_plugin", "graph")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, shorten=shorten)
    return environment.get_template("graph.html.j2")

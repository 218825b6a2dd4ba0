"""The report as one HTML file: it needs no network, and everything from the model is escaped.

Without JavaScript it shows the first screen, the text shaded by the total, a table, routes, hops and heads. The script
adds what is chosen: other views, units and scales, the sources of a step, search, and files. The page runs this script
and this style sheet and no other, by their hashes (content security policy).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypedDict
from uuid import uuid4

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.report.advice import advice
from flashtrace_plugin.report.code import as_code
from flashtrace_plugin.report.data import graph_data, head_data, page_data
from flashtrace_plugin.report.diagram import diagram_of
from flashtrace_plugin.report.environment import rendered_page
from flashtrace_plugin.report.flow import HEIGHT, PARTS, hop_rows, segments
from flashtrace_plugin.report.front import front_of
from flashtrace_plugin.report.kinds import kinds_of
from flashtrace_plugin.report.layers import layer_maps
from flashtrace_plugin.report.marks import shorten
from flashtrace_plugin.report.mass import mass_in_words, total_mass
from flashtrace_plugin.report.pieces import cuts_of, first_cut
from flashtrace_plugin.report.tokens import ShadedText, piece_rows, signed, text_sections, token_classes
from flashtrace_plugin.report.views import View, views_of
from flashtrace_plugin.units.scores import Units

if TYPE_CHECKING:
    from flashtrace_plugin.graph.result import Graph
    from flashtrace_plugin.verify import Verification


class ReportOptions(TypedDict, total=False):
    """What else :meth:`flashtrace_plugin.Attribution.to_html` takes."""

    evidence: Iterable[int]
    unit: Units
    graph: Graph | None
    verification: Verification | None


def as_html(
    attribution: Attribution,
    fragment: bool = False,
    *,
    evidence: Iterable[int] = (),
    unit: Units = "sentence",
    graph: Graph | None = None,
    verification: Verification | None = None,
) -> str:
    """The report of an attribution.

    fragment:     a piece of HTML for a notebook's output instead of a whole page
    evidence:     positions of the prompt that are known to be the evidence; they are marked in the text
    unit:         what is named as a source and shaded as one, as for ``Attribution.by``
    graph:        of the same text: its steps can be chosen to see what they rest on, and its routes are drawn
    verification: what ``Attribution.verify`` found; by default what it found last

    Raises InputError for a result without tokens or with scores that are not finite, for units that cannot be found,
    and for a graph of another text.
    """
    if graph is not None and graph.pieces != attribution.tokens:
        raise InputError(
            f"the graph is of another text: {len(graph.pieces)} tokens that are not the attribution's "
            f"{len(attribution.tokens)}; make both of the same prompt and generation"
        )
    name = f"ft-{uuid4().hex[:8]}" if fragment else "ft"
    explored = _explored(attribution, frozenset(evidence), unit, verification or attribution.verified, graph, name)
    return rendered_page(
        {
            "fragment": fragment,
            "root": name,
            "title": f"What led to “{shorten(attribution.text(attribution.target).strip(), 90)}”",
            "facts": facts(attribution),
            "advice": advice(attribution),
            "evidence": bool(tuple(evidence)),
            "graph": graph,
            "diagram": None if graph is None else diagram_of(graph),
            "hops": hop_rows(attribution),
            "parts": PARTS,
            "strip_height": HEIGHT,
            "settings": [settings_of(attribution)],
            "closure": _closure_sentence(attribution),
            "code": as_code(attribution),
        }
        | explored
    )


def _explored(
    attribution: Attribution,
    evidence: frozenset[int],
    unit: Units,
    verification: Verification | None,
    graph: Graph | None,
    root: str,
) -> dict[str, Any]:
    """First screen, text, table and the script's data."""
    views, kinds, cuts = views_of(attribution), kinds_of(attribution), cuts_of(attribution, unit)
    chosen = first_cut(attribution, cuts, unit)
    front, rows = (
        front_of(attribution, unit, verification, graph),
        piece_rows(attribution, views[0], cuts[chosen], kinds),
    )
    masses = [mass_in_words(attribution, kinds, m) for m in (total_mass(attribution), *(v.values for v in views[1:]))]
    maps = layer_maps(attribution)
    linked = {row.position for row in rows} | {source.position for source in front.sources + front.routed}
    classes = token_classes(views[0], cuts[chosen], kinds, evidence)
    data = page_data(
        views,
        masses,
        cuts,
        kinds,
        cut=chosen,
        parts=[[s.part, s.span.start, s.span.stop] for s in segments(attribution)],
        signs=next((i for i, view in enumerate(views) if view.label == "Relevance (signed)"), None),
        graph=None if graph is None else graph_data(graph),
        heads=head_data(attribution, [m.hop for m in maps]),
        rows=attribution.head_scores.shape[-1] if maps else 0,
        sides=None,
    )
    return {
        "fronts": [("", "", front)],
        "buttons": buttons(views),
        "mass": masses[0],
        "cuts": cuts,
        "chosen": chosen,
        "text": text_sections(attribution, ShadedText(attribution.tokens, classes, linked, root)),
        "rows": rows,
        "signed": signed(attribution),
        "maps": maps,
        "data": data,
    }


def buttons(views: Sequence[View]) -> dict[str, list[tuple[int, View]]]:
    """Views with their index, by the heading of the switch that they are part of."""
    groups: dict[str, list[tuple[int, View]]] = {}
    for i, view in enumerate(views):
        groups.setdefault(view.group, []).append((i, view))
    return groups


def facts(attribution: Attribution) -> str:
    """Model, numbers of tokens and hops in a line."""
    a, hops = attribution, len(hop_rows(attribution)) - 1
    counts = f"tokens: prompt {len(a.prompt)}, " + (f"reasoning {len(a.reasoning)}, " if a.reasoning else "")
    told = [a.method, _short_name(str(a.settings.get("model", ""))), f"{counts}target {len(a.target)}"]
    if a.reasoning is not None and hops > 0:
        told.append(f"{hops} {'hop' if hops == 1 else 'hops'} through the reasoning")
    return " · ".join(filter(None, told))


def _closure_sentence(attribution: Attribution) -> str:
    """What the closure error of an attribution means, in a sentence."""
    gap = attribution.closure_error
    if gap == 0:
        return "No parts of the residual stream were added up, so there is no gap to check."
    return (
        f"The parts that were read from the model add up to its residual stream up to a relative gap of {gap:.1e}. "
        "That is rounding: about 1e-7 is usual in float32 and 1e-2 in bfloat16; a larger gap would have been refused."
    )


def _short_name(model: str) -> str:
    """A name as it is, and the end of a path."""
    path = PurePath(model)
    return "/".join(path.parts[-2:]) if path.is_absolute() else model


def settings_of(attribution: Attribution) -> dict[str, str]:
    """Everything that was set or noted, in words."""
    a = attribution
    noted = {name.replace("_", " "): _plain(value) for name, value in a.settings.items()}
    spans = {"prompt": f"positions {a.prompt}", "target": f"positions {a.target}"}
    reasoning = {"reasoning": f"positions {a.reasoning}" if a.reasoning else "none"}
    return {"method": a.method} | noted | spans | reasoning | {"closure error": f"{a.closure_error:.3g}"}


def _plain(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)

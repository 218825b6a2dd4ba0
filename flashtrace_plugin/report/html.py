"""The report as one HTML file: it needs no network and no JavaScript, and everything from the model is escaped.

Shading is done by classes: ``b17`` on a token says that its step on the colour scale is 17 in the view with key ``b``.
Choosing a view is a radio button, and the style sheet does the rest. The script only adds what is comfortable: exact
numbers under the pointer, and stepping through the tokens by keyboard.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from flashtrace_plugin import __version__
from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.report import colours
from flashtrace_plugin.report.advice import advice
from flashtrace_plugin.report.flow import HEIGHT, PARTS, hop_rows, segments
from flashtrace_plugin.report.layers import LayerMap, layer_maps
from flashtrace_plugin.report.marks import percent, shorten
from flashtrace_plugin.report.tokens import shaded, signed, top_rows
from flashtrace_plugin.report.views import View, views_of

if TYPE_CHECKING:
    from jinja2 import Environment


def as_html(attribution: Attribution, fragment: bool = False, *, evidence: Iterable[int] = ()) -> str:
    """The report of an attribution.

    fragment: a piece of HTML for a notebook's output instead of a whole page
    evidence: positions of the prompt that are known to be the evidence; they are marked in text and table
    """
    name = f"ft-{uuid4().hex[:8]}" if fragment else "ft"
    page = _environment().get_template("report.html.j2")
    return page.render(_context(attribution, frozenset(evidence)), fragment=fragment, root=name)


def _context(attribution: Attribution, evidence: frozenset[int]) -> dict[str, Any]:
    views = views_of(attribution)
    maps = layer_maps(attribution)
    tokens = shaded(attribution, views, evidence)
    return {
        "a": attribution,
        "version": __version__,
        "title": f"Which prompt tokens led to “{shorten(attribution.text(attribution.target).strip(), 60)}”",
        "advice": advice(attribution),
        "model": _short_name(str(attribution.settings.get("model", ""))),
        "views": views,
        "text": [(s.part, s.span, tokens[s.span.slice]) for s in segments(attribution)],
        "top": top_rows(attribution, evidence),
        "signed": signed(attribution),
        "evidence": sorted(evidence),
        "hops": hop_rows(attribution),
        "parts": PARTS,
        "strip_height": HEIGHT,
        "maps": maps,
        "settings": {name: _plain(value) for name, value in attribution.settings.items()},
        "closure": _closure_sentence(attribution),
        "light": colours.LIGHT.variables(),
        "dark": colours.DARK.variables(),
        "steps": range(1, colours.LEVELS + 1),
        "data": _data(attribution, views, maps),
    }


def _closure_sentence(attribution: Attribution) -> str:
    """What the closure error of an attribution means, in a sentence."""
    gap = attribution.closure_error
    if gap == 0:
        return "No parts of the residual stream were added up, so there is no gap to check."
    return (
        f"The parts that were read from the model add up to its residual stream up to a relative gap of {gap:.1e}. "
        "That is rounding: about 1e-7 is usual in float32 and 1e-2 in bfloat16; a larger gap would have been refused."
    )


def _data(attribution: Attribution, views: list[View], maps: list[LayerMap]) -> dict[str, Any]:
    """Numbers for the script: what it shows under the pointer."""
    heads = {m.hop: attribution.head_scores[m.hop].flatten().tolist() for m in maps}
    return {
        "views": [[v.label, v.whole, list(map(_short, v.values)), v.signed] for v in views],
        "heads": {hop: list(map(_short, values)) for hop, values in heads.items()},
    }


def _short_name(model: str) -> str:
    """A name as it is, and the end of a path."""
    path = PurePath(model)
    return "/".join(path.parts[-2:]) if path.is_absolute() else model


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _number(value: float) -> str:
    """Four digits, so that columns of numbers line up."""
    return f"{value:#.4g}" if value else "0"


def _plain(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("flashtrace_plugin", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["number"] = _number
    # The page runs this script and no other, whatever else might get into it (content security policy).
    script = environment.get_template("script.js").render().encode()
    environment.globals["script_hash"] = "sha256-" + base64.b64encode(hashlib.sha256(script).digest()).decode()
    return environment

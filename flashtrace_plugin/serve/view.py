"""Texts and attributions as the page shows them: plain numbers and texts, nothing that could act on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.report.marks import one_line, shorten
from flashtrace_plugin.spans import Span
from flashtrace_plugin.units.contents import offsets_of
from flashtrace_plugin.units.scores import Unit, UnitScores


def shown_text(tokens: Sequence[str], prompt_length: int) -> dict[str, Any]:
    """The tokens with invisible characters made visible; a line break keeps its effect."""
    return {"tokens": ["↵\n".join(map(one_line, t.split("\n"))) for t in tokens], "prompt_length": prompt_length}


def view(found: Attribution, fields: Mapping[str, str]) -> dict[str, Any]:
    """What the page shows of an attribution.

    fields: of the prompt by name, to add mass up over them

    values: [N] mass as it is shaded: scores of the prompt without sinks, and totals between prompt and target
    units:  by "sentence" and "field": name, text, share and token positions; sentences of the reasoning by themselves
    """
    values = found.totals
    values[found.prompt.slice] = found.scores_without_sinks
    values[found.target.start :] = 0.0
    return {
        "values": [float(f"{v:.4g}") for v in values.tolist()],
        "target": _pair(found.target),
        "reasoning": None if found.reasoning is None else _pair(found.reasoning),
        "target_text": shorten(found.text(found.target).strip(), 120),
        "units": {
            "sentence": _units(found, found.by("sentence")),
            "step": _steps(found),
            "field": _named(found, fields),
        },
        "sinks": list(found.sinks),
        "sink_share": found.settings.get("sink_share", 0.0),
        "rules": [str(found.settings[name]) for name in ("target_rule", "reasoning_rule") if name in found.settings],
        "hops": found.settings.get("hops_followed", 0),
        "closure_error": found.closure_error,
        "method": found.method,
    }


def _pair(span: Span) -> list[int]:
    return [span.start, span.stop]


def _steps(found: Attribution) -> list[dict[str, Any]]:
    if found.reasoning is None:
        return []
    return _units(found, found.by("step", part="reasoning"))


def _named(found: Attribution, fields: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """Mass by field; None where the fields cannot be told apart in the prompt, as when two have the same text."""
    if len(fields) < 2:
        return None
    try:
        return _units(found, found.by(fields))
    except InputError:
        return None


def _units(found: Attribution, scores: UnitScores) -> list[dict[str, Any]]:
    """Units of content in the order of the text, with the tokens that they begin and end in."""
    offsets = offsets_of(found.tokens)
    return [
        {
            "text": shorten(one.unit.text, 300),
            "name": one.unit.name,
            "share": one.share,
            "tokens": _tokens(one.unit, offsets),
        }
        for one in scores
        if one.unit.content
    ]


def _tokens(unit: Unit, offsets: Sequence[tuple[int, int]]) -> list[int]:
    a, b = unit.ranges[0][0], unit.ranges[-1][1]
    inside = [i for i, (start, stop) in enumerate(offsets) if start < b and a < max(stop, start + 1)]
    return [inside[0], inside[-1] + 1] if inside else [0, 0]

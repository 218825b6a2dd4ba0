"""What stands first in a report: what was asked, the answer, its strongest sources, and whether they were checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.report.marks import shorten
from flashtrace_plugin.report.pieces import name_of
from flashtrace_plugin.units.scores import Unit, Units, UnitScore, UnitScores
from flashtrace_plugin.units.shares import unit_tokens

if TYPE_CHECKING:
    from flashtrace_plugin.graph.result import Graph
    from flashtrace_plugin.verify import Verification

_SOURCES = 3
_LONG = 360
"""Characters of a text that are quoted."""


@dataclass(frozen=True)
class _Source:
    """A unit of the prompt that the answer rests on.

    name:     of a document or message, or ""
    share:    of the mass on the prompt's contents, 0 to 1
    position: its first token
    """

    text: str
    name: str
    share: float
    position: int


@dataclass(frozen=True)
class _Front:
    """The first screen.

    asked:     the question, or how the prompt ends
    question:  whether it is a question, which is then told apart from the sources
    answer:    what is explained
    sources:   the strongest units of the prompt, best first
    routed:    the strongest by all routes through the steps of the reasoning; empty without a graph
    own:       share of the question itself
    others:    number and share of all units that are neither
    unit:      what the units are, in a word
    checked:   what ``verify`` found, in a sentence; "" where it was not run
    holds:     its verdict
    """

    asked: str
    question: bool
    answer: str
    sources: list[_Source]
    routed: list[_Source]
    own: float
    others: tuple[int, float]
    unit: str
    checked: str
    holds: bool

    @property
    def together(self) -> float:
        """Share of the sources."""
        return sum(source.share for source in self.sources)


def front_of(
    attribution: Attribution, unit: Units, verification: Verification | None, graph: Graph | None = None
) -> _Front:
    """The first screen of an attribution, and what a graph of the same text adds."""
    found = attribution.by(unit)
    asked = _asked(attribution.by(unit if isinstance(unit, str) and unit != "message" else "sentence"))
    question = asked is not None and "?" in asked.text
    units = [one for one in found.top(len(found)) if one.score > 0]
    own = [one for one in units if question and asked is not None and one.unit.ranges == asked.ranges]
    best = [one for one in units if one not in own][:_SOURCES]
    rest = len(units) - len(best) - len(own), 1 - sum(one.share for one in best + own)
    return _Front(
        asked=_quoted(asked.text) if asked else "",
        question=question,
        answer=_quoted(attribution.text(attribution.target)),
        sources=_sources(attribution, best),
        routed=_routed(attribution, graph, asked if question else None),
        own=sum(one.share for one in own),
        others=(rest[0], max(0.0, rest[1])),
        unit=name_of(unit),
        checked=verification.sentence if verification else "",
        holds=bool(verification and verification.holds),
    )


def _asked(units: UnitScores) -> Unit | None:
    """The last unit with a question mark, in the last message of a user if there are messages; else the last unit."""
    contents = [unit for unit in units.units if unit.content and unit.text]
    last = max((unit.message for unit in contents if unit.message is not None and unit.name == "user"), default=None)
    asked = [unit for unit in contents if unit.message == last] or contents
    return next((unit for unit in reversed(asked) if "?" in unit.text), asked[-1] if asked else None)


def _routed(attribution: Attribution, graph: Graph | None, asked: Unit | None) -> list[_Source]:
    """The sources of a graph that have most of the answer by all routes, without the question itself."""
    if graph is None or not graph.steps:
        return []
    found = [one for one in graph.top(_SOURCES + 1) if asked is None or one.unit.ranges != asked.ranges]
    return _sources(attribution, [one for one in found if one.score > 0][:_SOURCES])


def _sources(attribution: Attribution, best: Sequence[UnitScore]) -> list[_Source]:
    tokens = attribution.tokens[attribution.prompt.slice]
    places = unit_tokens(tokens, [one.unit.ranges for one in best], [True] * len(best))
    return [
        _Source(_quoted(one.unit.text), one.unit.name, one.share, at[0] if at else 0)
        for one, at in zip(best, places, strict=True)
    ]


def _quoted(text: str) -> str:
    return shorten(text, _LONG)

"""Tokens as the report shows them: shaded in the text, and the strongest ones in a table."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.report.marks import in_table, in_text, one_line, percent
from flashtrace_plugin.report.views import View

if TYPE_CHECKING:
    from markupsafe import Markup

_TOP = 20
"""Rows of the table."""
_CONTEXT = 4
"""Tokens on either side of a token in the table."""


@dataclass(frozen=True)
class _ShadedToken:
    """A token of the text.

    classes: its step on the colour scale in each view, and ``gold`` if it is known evidence
    title:   what a browser without JavaScript shows under the pointer
    """

    position: int
    classes: str
    title: str
    html: Markup


def shaded(attribution: Attribution, views: Sequence[View], evidence: Set[int]) -> list[_ShadedToken]:
    """Every token of the text with its shading in all views."""
    return [
        _ShadedToken(i, _classes(i, views, i in evidence), f"{i}: {_title(attribution, i)}", in_text(text))
        for i, text in enumerate(attribution.tokens)
    ]


def _classes(position: int, views: Sequence[View], gold: bool) -> str:
    shades = (view.shade(position) for view in views)
    return " ".join([shade for shade in shades if shade] + ["gold"] * gold)


def _title(attribution: Attribution, position: int) -> str:
    if position >= len(attribution.scores):
        return "generated"
    score, whole = float(attribution.scores[position]), float(attribution.scores.sum())
    return f"{score:.3g}, {percent(score / whole if whole else 0.0)}"


@dataclass(frozen=True)
class TopRow:
    """One of the strongest tokens.

    before, after: the prompt around it
    share:         of the prompt's score, 0 to 1
    width:         score relative to the highest, 0 to 1
    gold:          whether it is known evidence
    sign:          + or − of its relevance; empty for a method that knows no signs
    """

    position: int
    token: str
    before: str
    after: str
    score: float
    share: float
    width: float
    gold: bool
    sign: str


def top_rows(attribution: Attribution, evidence: Set[int] = frozenset(), count: int = _TOP) -> list[TopRow]:
    """The strongest tokens of the prompt, best first, those without a score left out."""
    whole = float(attribution.scores_without_sinks.sum())
    best = [t for t in attribution.top(count) if t.score > 0]
    return [
        TopRow(
            t.position,
            in_table(t.token),
            *_around(attribution, t.position),
            t.score,
            t.score / whole,
            t.score / best[0].score,
            t.position in evidence,
            _sign(attribution, t.position),
        )
        for t in best
    ]


def signed(attribution: Attribution) -> bool:
    """Whether the method says which tokens speak for the target and which against it."""
    return attribution.components.get("relevance", attribution.scores[:0]).shape == (len(attribution.tokens),)


def _sign(attribution: Attribution, position: int) -> str:
    value = float(attribution.components["relevance"][position]) if signed(attribution) else 0.0
    return "+" if value > 0 else "−" if value < 0 else ""


def _around(attribution: Attribution, position: int) -> tuple[str, str]:
    """The prompt before and after a token on one line; the space that a token begins with counts as before it."""
    tokens, stop = attribution.tokens, min(position + 1 + _CONTEXT, attribution.prompt.stop)
    own = tokens[position]
    space = " " if own.startswith(" ") and own.strip() else ""
    before, after = "".join(tokens[max(0, position - _CONTEXT) : position]), "".join(tokens[position + 1 : stop])
    return one_line(before) + space, one_line(after)

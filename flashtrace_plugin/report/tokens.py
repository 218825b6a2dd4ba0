"""Tokens as the report shows them: shaded in the text, and the strongest ones in a table."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from markupsafe import Markup

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.report.colours import clipped_top, level
from flashtrace_plugin.report.flow import segments
from flashtrace_plugin.report.kinds import Kind
from flashtrace_plugin.report.marks import in_table, in_text, one_line
from flashtrace_plugin.report.pieces import Pieces
from flashtrace_plugin.report.views import View
from flashtrace_plugin.spans import Span

_TOP = 20
"""Rows of the table."""
_CONTEXT = 4
"""Tokens on either side of a token in the table."""
_CHUNK = 400
"""Tokens from which on a line break ends a stretch that the browser lays out by itself."""
_HIDDEN = (Kind.TEMPLATE, Kind.SINK, Kind.TARGET)
"""Kinds that are not shaded unless the reader asks for them."""
_LETTERS = {Kind.TEMPLATE: "t", Kind.SINK: "k", Kind.TARGET: "a"}


@dataclass(frozen=True)
class ShadedText:
    """Every token with its classes: shading, what it is, and whether it is known evidence.

    linked: positions that something on the page leads to
    root:   what the names of places on the page begin with
    """

    tokens: Sequence[str]
    classes: Sequence[str]
    linked: Set[int]
    root: str

    def chunks(self, span: Span) -> list[Markup]:
        """The tokens of a span as HTML, in stretches that end at line breaks."""
        found, start = [], span.start
        for i in span:
            if i + 1 == span.stop or (i + 1 - start >= _CHUNK and self.tokens[i].endswith("\n")):
                found.append(Markup("".join(map(self._token, range(start, i + 1)))))
                start = i + 1
        return found

    def _token(self, i: int) -> str:
        # Only the text is not the package's own, and in_text escapes it.
        name = f' class="{self.classes[i]}"' if self.classes[i] else ""
        place = f' id="{self.root}-{i}"' if i in self.linked else ""
        return f"<span{name}{place}>{in_text(self.tokens[i])}</span>"


def text_sections(
    attribution: Attribution, text: ShadedText, stop: int | None = None
) -> list[tuple[str, int, list[tuple[str, Span, list[Markup]]]]]:
    """Prompt and generated text, each with its number of tokens and its parts, of those that begin before ``stop``."""
    end = len(attribution.tokens) if stop is None else stop
    cut = [(s.part, s.span, text.chunks(s.span)) for s in segments(attribution) if s.span.start < max(end, 1)]
    found = [("Prompt", cut[:1]), ("Generated text", cut[1:])]
    return [(name, sum(len(span) for _, span, _ in parts), parts) for name, parts in found if parts]


def token_classes(view: View, cut: Pieces, kinds: Sequence[Kind], evidence: Set[int]) -> list[str]:
    """Classes of every token when a view is shown by the pieces of a cut: ``s17``, ``m17`` where it is negative."""
    sums = cut.sums(view.values)
    shown = [kinds[i] not in _HIDDEN for i in cut.first]
    magnitudes = sums.abs()
    top = clipped_top(magnitudes[[i for i, one in enumerate(shown) if one]])
    steps = [level(m, top) if one else 0 for m, one in zip(magnitudes.tolist(), shown, strict=True)]
    shades = [f"{'m' if s < 0 else 's'}{step}" if step else "" for s, step in zip(sums.tolist(), steps, strict=True)]
    return [
        " ".join(filter(None, (_LETTERS.get(kinds[i], ""), shades[piece], "gold" if i in evidence else "")))
        for i, piece in enumerate(cut.owner.tolist())
    ]


@dataclass(frozen=True)
class _PieceRow:
    """A piece of the text in the table: its first token, its text, the part it is in, its score, share and sign."""

    position: int
    text: str
    part: str
    score: float
    share: float
    width: float
    sign: str


def piece_rows(attribution: Attribution, view: View, cut: Pieces, kinds: Sequence[Kind]) -> list[_PieceRow]:
    """The strongest pieces of the prompt's contents in a view, best first: what the table shows without a script."""
    sums, tokens = cut.sums(view.values), attribution.tokens
    wanted = [p for p, i in enumerate(cut.first) if i in attribution.prompt and kinds[i] is Kind.CONTENT]
    whole = float(sums[wanted].sum())
    best = sorted((p for p in wanted if sums[p] > 0), key=lambda p: -float(sums[p]))[:_TOP]
    signs = cut.sums(attribution.components["relevance"]).tolist() if signed(attribution) else [0.0] * len(cut)
    return [
        _PieceRow(
            cut.first[p],
            one_line("".join(tokens[cut.first[p] : cut.last[p] + 1]).strip()) or in_table(tokens[cut.first[p]]),
            "prompt",
            float(sums[p]),
            float(sums[p]) / whole,
            float(sums[p]) / float(sums[best[0]]),
            _sign(signs[p]),
        )
        for p in best
    ]


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
    signs = attribution.components["relevance"].tolist() if signed(attribution) else [0.0] * len(attribution.tokens)
    return [
        TopRow(
            t.position,
            in_table(t.token),
            *_around(attribution, t.position),
            t.score,
            t.score / whole,
            t.score / best[0].score,
            t.position in evidence,
            _sign(signs[t.position]),
        )
        for t in best
    ]


def signed(attribution: Attribution) -> bool:
    """Whether the method says which tokens speak for the target and which against it."""
    return attribution.components.get("relevance", attribution.scores[:0]).shape == (len(attribution.tokens),)


def _sign(value: float) -> str:
    return "+" if value > 0 else "−" if value < 0 else ""


def _around(attribution: Attribution, position: int) -> tuple[str, str]:
    """The prompt before and after a token on one line; the space that a token begins with counts as before it."""
    tokens, stop = attribution.tokens, min(position + 1 + _CONTEXT, attribution.prompt.stop)
    own = tokens[position]
    space = " " if own.startswith(" ") and own.strip() else ""
    before, after = "".join(tokens[max(0, position - _CONTEXT) : position]), "".join(tokens[position + 1 : stop])
    return one_line(before) + space, one_line(after)

"""Two attributions side by side: two methods, two models, or a right and a wrong answer to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.report.data import page_data
from flashtrace_plugin.report.environment import rendered_page
from flashtrace_plugin.report.flow import segments
from flashtrace_plugin.report.front import front_of
from flashtrace_plugin.report.html import buttons, facts, settings_of
from flashtrace_plugin.report.kinds import Kind, kinds_of
from flashtrace_plugin.report.marks import shorten
from flashtrace_plugin.report.pieces import Pieces, cuts_of, first_cut
from flashtrace_plugin.report.tokens import ShadedText, piece_rows, text_sections, token_classes
from flashtrace_plugin.report.views import View, check_numbers, views_of
from flashtrace_plugin.spans import Chars
from flashtrace_plugin.units.contents import Content
from flashtrace_plugin.units.scores import Units


def compare(
    first: Attribution,
    second: Attribution,
    path: str | Path,
    *,
    names: tuple[str, str] | None = None,
    unit: Units = "sentence",
) -> None:
    """Writes a page with two attributions of one prompt side by side, and what one has more than the other.

    names: of the two, by default their methods, models or answers, whichever differ
    unit:  what is shaded as one, as for ``Attribution.by``

    Both are shown as shares of the mass on the prompt's contents. The same text is compared as a whole; where only the
    prompt is the same, that is; for another tokenizer mass goes by characters. Raises InputError for other prompts.
    """
    Path(path).write_text(_compared(first, second, names or _names(first, second), unit), encoding="utf-8")


def _compared(a: Attribution, b: Attribution, names: tuple[str, str], unit: Units) -> str:
    for one in (a, b):
        check_numbers(one)
    stop = len(a.tokens) if a.tokens == b.tokens and _same_parts(a, b) else a.prompt.stop
    views = _views(a, b, names, stop)
    kinds = kinds_of(a)[:stop]
    cuts = [
        Pieces(c.name, c.owner[:stop], tuple(p for p in c.parts if p[0] < stop), c.names) for c in cuts_of(a, unit)
    ]
    chosen = first_cut(a, cuts, unit)
    rows = piece_rows(a, views[0], cuts[chosen], kinds)
    fronts = [(name, facts(one), front_of(one, unit, one.verified)) for name, one in zip(names, (a, b), strict=True)]
    linked = {row.position for row in rows} | {source.position for source in fronts[0][2].sources}
    text = ShadedText(a.tokens, token_classes(views[0], cuts[chosen], kinds, frozenset()), linked, "ft")
    data = page_data(
        views,
        ["", "", ""],
        cuts,
        kinds,
        cut=chosen,
        parts=[[s.part, s.span.start, s.span.stop] for s in segments(a) if s.span.start < stop],
        sides=names,
        **dict.fromkeys(("signs", "graph", "heads")),
        rows=0,
    )
    shown = {group: [one for one in members if one[0] != 1] for group, members in buttons(views).items()}
    return rendered_page(
        {
            "fragment": False,
            "root": "ft",
            "title": f"{names[0]} and {names[1]}",
            "facts": "",
            "advice": "",
            "evidence": False,
            "fronts": fronts,
            "buttons": shown,
            "mass": "",
            "cuts": cuts,
            "chosen": chosen,
            "text": text_sections(a, text, stop),
            "rows": rows,
            "signed": False,
            "data": data,
            "settings": [settings_of(a), settings_of(b)],
            **dict.fromkeys(("graph", "diagram", "closure", "code")),
            **dict.fromkeys(("hops", "maps", "parts"), ()),
            "strip_height": 0,
        }
    )


def _same_parts(a: Attribution, b: Attribution) -> bool:
    return (a.prompt, a.reasoning, a.target) == (b.prompt, b.reasoning, b.target)


def _names(a: Attribution, b: Attribution) -> tuple[str, str]:
    """What tells them apart, in a few words."""
    told = [
        [one.method for one in (a, b)],
        [str(one.settings.get("model", "")) for one in (a, b)],
        [f"“{shorten(one.text(one.target).strip(), 80)}”" for one in (a, b)],
    ]
    differing = [pair for pair in told if pair[0] != pair[1]] or [["the first", "the second"]]
    return tuple(", ".join(parts) for parts in zip(*differing, strict=True))  # type: ignore[return-value]


def _views(a: Attribution, b: Attribution, names: tuple[str, str], stop: int) -> list[View]:
    """Shares of the first, of the second on the first one's tokens, and their difference."""
    mine = _shares(a)[:stop]
    theirs = _shares(b)[:stop] if a.tokens[:stop] == b.tokens[:stop] else _moved(_shares(b), b, a)
    note = f"shares of the mass on the prompt's contents, {names[0]} on the left and {names[1]} on the right"
    more = f"what {names[0]} (orange) has more than {names[1]} (blue), as shares of each one's mass on the prompt"
    return [
        View("Compare", "Side by side", note, mine, sources=True),
        View("Compare", names[1], note, theirs, sources=True),
        View("Compare", "Difference", more, mine - theirs, signed=True, sources=True),
    ]


def _shares(attribution: Attribution) -> Tensor:
    """The total relative to the prompt's contents; 0 for what is no content there. [N]"""
    values, kinds = views_of(attribution)[0].values.clone(), kinds_of(attribution)
    inside = torch.tensor([kind is Kind.CONTENT for kind in kinds])
    whole = values[inside & (torch.arange(len(values)) < attribution.prompt.stop)].sum()
    # Tags and sinks of the generated text stay: they are shown on demand, and count for no share.
    return values / whole if whole > 0 else values


def _moved(values: Tensor, source: Attribution, target: Attribution) -> Tensor:
    """Scores of the contents of one prompt on the tokens of another tokenizer, by characters. [target's prompt]

    Each token's score is spread over its characters that are no white space, as for units.
    """
    here, there = (_contents(one) for one in (target, source))
    texts = [
        ["".join(one.tokens)[c.start : c.stop].strip() for c in found]
        for one, found in ((target, here), (source, there))
    ]
    if texts[0] != texts[1]:
        raise InputError(
            f"the two attributions are of different prompts, {shorten(' '.join(texts[0]), 60)!r} and "
            f"{shorten(' '.join(texts[1]), 60)!r}; compare explanations of one prompt"
        )
    by_character = _spread(values, source)
    moved = torch.zeros(len("".join(target.tokens)), dtype=torch.float64)
    for mine, theirs in zip(_ranges(target, here), _ranges(source, there), strict=True):
        moved[slice(*mine)] = by_character[slice(*theirs)]
    edges = [0, *accumulate(len(token) for token in target.tokens[target.prompt.slice])]
    return torch.tensor([float(moved[i:j].sum()) for i, j in pairwise(edges)])


def _contents(attribution: Attribution) -> Sequence[Content]:
    return attribution.contents or (Content(0, len(attribution.text(attribution.prompt))),)


def _ranges(attribution: Attribution, contents: Sequence[Content]) -> list[Chars]:
    """Characters of contents without white space at their ends."""
    text = "".join(attribution.tokens)
    stripped = [(c.start + len(text[c.start : c.stop]) - len(text[c.start : c.stop].lstrip()), c) for c in contents]
    return [(start, start + len(text[c.start : c.stop].strip())) for start, c in stripped]


def _spread(values: Tensor, attribution: Attribution) -> Tensor:
    """Scores of tokens on the characters of the visible text. [characters]"""
    text, start = "".join(attribution.tokens), 0
    spread = torch.zeros(len(text), dtype=torch.float64)
    for token, value in zip(attribution.tokens, values.tolist(), strict=True):
        stop = start + len(token)
        visible = [i for i in range(start, stop) if not text[i].isspace()] or list(range(start, stop))
        if visible:
            spread[visible] = value / len(visible)
        elif start:  # a later byte of a character belongs where that does
            spread[start - 1] += value
        start = stop
    return spread

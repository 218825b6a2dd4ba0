"""An attribution in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.report.advice import advice
from flashtrace_plugin.report.flow import PARTS, hop_rows
from flashtrace_plugin.report.marks import one_line, percent, shorten
from flashtrace_plugin.report.tokens import TopRow, signed, top_rows
from flashtrace_plugin.units.scores import UnitScores

_BAR, _TOKEN, _FIXED = 8, 14, 56
"""Widths: the longest bar, a token, and all of a table but the text around its tokens."""
_Column = tuple[str, Literal["left", "right"]]
_UNIT_COLUMNS: tuple[_Column, ...] = (
    ("share", "right"),
    ("", "left"),
    ("per token", "right"),
    ("in", "left"),
    ("text", "left"),
)
_BESIDE_UNIT = 48
_SIGN: _Column = ("sign", "right")
_KNOWN: _Column = ("evidence", "left")
_EVIDENCE, _LEAST_AROUND = 9, 4
_COLUMNS: tuple[_Column, ...] = (
    ("position", "right"),
    ("", "right"),
    ("token", "left"),
    ("", "left"),
    ("score", "right"),
    ("share", "right"),
    ("", "left"),
)


def print_attribution(
    attribution: Attribution, *, top: int = 10, evidence: Mapping[int, str] | None = None, console: Console
) -> None:
    """Prints what was explained, the strongest tokens of the prompt, and where each hop's mass lies.

    Where the method knows signs, each token has that of its direct relevance, before hops.

    top:      number of tokens
    evidence: positions of the prompt that are known to be the evidence, and what to call them
    """
    console.print(_headline(attribution), "\n", sep="")
    console.print(_top_table(attribution, top, evidence or {}, console.width))
    if signed(attribution):
        console.print(Text("sign: of its direct relevance; + supports the target, − speaks against it", "dim"))
    console.print()
    console.print(_hop_table(attribution))
    if advice(attribution):
        console.print(Text(f"\n{advice(attribution)}", "dim"))


def print_units(units: UnitScores, *, top: int = 10, console: Console) -> None:
    """Prints the units with most mass, and what lies on the chat template."""
    table = Table(title="Where the mass lies", title_justify="left", box=None, pad_edge=False)
    for name, justify in _UNIT_COLUMNS:
        table.add_column(name, justify=justify, no_wrap=True)
    best = [one for one in units.top(top) if one.score > 0]
    for one in best:
        bar = "█" * max(1, round(_BAR * one.score / best[0].score))
        where = one.unit.name if one.unit.message is None else f"{one.unit.message} {one.unit.name}"
        text = Text(shorten(one.unit.text, max(20, console.width - _BESIDE_UNIT)))
        table.add_row(percent(one.share), bar, f"{one.density:#.3g}", shorten(where, _TOKEN), text)
    console.print(table)
    if units.template_share:
        console.print(Text(f"on the chat template and special tokens: {percent(units.template_share)}", "dim"))


def _headline(attribution: Attribution) -> Text:
    reasoning = "no reasoning" if attribution.reasoning is None else f"reasoning {attribution.reasoning}"
    target = shorten(attribution.text(attribution.target).strip(), 60)
    facts = f"prompt {attribution.prompt}, {reasoning}, target {attribution.target}"
    method = one_line(attribution.method)
    return Text.assemble((method, "bold"), ": what led to ", (repr(target), "bold"), f"\n{facts}")


def _top_table(attribution: Attribution, count: int, evidence: Mapping[int, str], width: int = 80) -> Table:
    """The strongest tokens of the prompt, each between its neighbours, in a table of at most ``width`` columns."""
    signs = signed(attribution)
    table = Table(title="Top tokens of the prompt", title_justify="left", box=None, pad_edge=False)
    around = min(30, (width - _FIXED - (len(_SIGN[0]) + 1) * signs - _EVIDENCE * bool(evidence)) // 2)
    columns = [*_COLUMNS[:4], *[_SIGN] * signs, *_COLUMNS[4:], *[_KNOWN] * bool(evidence)]
    # A narrow terminal keeps what has a name.
    shown = [i for i, (name, _) in enumerate(columns) if name or around >= _LEAST_AROUND]
    for i in shown:
        table.add_column(columns[i][0], justify=columns[i][1], no_wrap=True)
    for row in top_rows(attribution, evidence.keys(), count):
        sign, known = [row.sign] * signs, [evidence.get(row.position, "")] * bool(evidence)
        cells = [*_named(row, max(1, around)), *sign, *_measured(row), *known]
        table.add_row(*(cells[i] for i in shown))
    return table


def _named(row: TopRow, around: int) -> list[str | Text]:
    """Where a token is: its position, and itself between its neighbours."""
    return [
        str(row.position),
        Text(row.before.strip()[-around:], "dim"),
        Text(shorten(row.token, _TOKEN), "bold"),
        Text(row.after.strip()[:around], "dim"),
    ]


def _measured(row: TopRow) -> list[str]:
    return [f"{row.score:#.3g}", percent(row.share), "█" * max(1, round(_BAR * row.width))]


def _hop_table(attribution: Attribution) -> Table:
    """Share of each hop's mass on the parts of the text, and what the hop brings to the total."""
    table = Table(title="Where each hop's mass lies", title_justify="left", box=None, pad_edge=False)
    for name in ("hop", *PARTS, "weight", "of the total"):
        table.add_column(name, justify="right")
    for hop in hop_rows(attribution):
        parts = [percent(hop.shares[part]) if hop.shares else "–" for part in PARTS]
        table.add_row(str(hop.number), *parts, f"{hop.carried:#.3g}", percent(hop.score))
    return table

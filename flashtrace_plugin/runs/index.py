"""A page that lists what a run has found, with failures and their reasons; it needs no network and no script."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from heapq import nsmallest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.report.html import as_html
from flashtrace_plugin.runs.folder import read_manifest, results, write_whole
from flashtrace_plugin.runs.lines import LineHead

if TYPE_CHECKING:
    from jinja2 import Environment

_INDEX = "index.html"
_SHOWN = 1000
"""Rows of each kind that the page lists, the first of the input: more than anybody reads, and a browser's load."""
_LONGEST = 160


@dataclass(frozen=True)
class Shown:
    """One explained row as the page shows it.

    source: the sentence or document of the prompt with most of the mass on contents; share: of that mass
    report: where its report is, from the page; "" if there is none
    """

    number: int
    id: str
    question: str
    answer: str
    source: str
    share: float | None
    recovery: float | None
    report: str


def write_index(folder: Path, *, reports: bool = False) -> None:
    """Writes the page, and with ``reports`` the report of every row that has none yet."""
    if reports:
        _write_reports(folder)
    page = _environment().get_template("index.html.j2")
    write_whole(folder / _INDEX, page.render(_context(folder)).encode("utf-8", "replace"))


def _write_reports(folder: Path) -> None:
    (folder / "reports").mkdir(exist_ok=True)
    for head, line in results(folder):
        path = folder / _report(head.number)
        if not head.failed and not path.exists():
            data = json.loads(line)
            evidence = data.get("evidence", {}).get("positions", ())
            write_whole(path, as_html(Attribution.from_dict(data), evidence=evidence).encode("utf-8", "replace"))


def _report(number: int) -> str:
    return f"reports/{number}.html"


def _context(folder: Path) -> dict[str, Any]:
    about = read_manifest(folder)
    failed = [head.failed for head, _ in results(folder)]
    return {
        "about": {name: value for name, value in about.items() if name not in ("format", "settings")},
        "settings": about["settings"],
        "explained": [_shown(folder, head, data) for head, data in _first(folder, failed=False)],
        "failures": [data for _, data in _first(folder, failed=True)],
        "counts": {"rows": len(failed), "failed": sum(failed)},
        "most": _SHOWN,
    }


def _first(folder: Path, failed: bool) -> list[tuple[LineHead, dict[str, Any]]]:
    """The first rows of the input that were explained, or that failed."""
    chosen = ((head, line) for head, line in results(folder) if head.failed == failed)
    return [(head, json.loads(line)) for head, line in nsmallest(_SHOWN, chosen, key=lambda pair: pair[0].number)]


def _shown(folder: Path, head: LineHead, data: Mapping[str, Any]) -> Shown:
    found = Attribution.from_dict(data)
    source, share = _source(found, data.get("documents", ()))
    report = _report(head.number)
    return Shown(
        head.number,
        data["id"],
        _short(_question(found)),
        _short(found.text(found.target)),
        _short(source),
        share,
        data.get("evidence", {}).get("recovery"),
        report if (folder / report).exists() else "",
    )


def _source(found: Attribution, documents: Iterable[Mapping[str, Any]]) -> tuple[str, float | None]:
    """What the answer rests on most, with its share: a document if there are some, a sentence, or else a token."""
    named = [unit for unit in documents if unit["kind"] == "document"]
    if named:
        best = max(named, key=lambda unit: unit["share"] or 0.0)
        return f"{best['name']}: {best['text']}", best["share"]
    try:
        top = found.by("sentence").top(1)
        return (top[0].unit.text, top[0].share) if top else ("", None)
    except InputError:  # the messages cannot be found in the text, so there are no sentences of them
        return "".join(token.token for token in found.top(1)), None


def _question(found: Attribution) -> str:
    """The last line with a question mark of what the user wrote last, or of the prompt; all of it if there is none."""
    users = [c for c in found.contents if c.role == "user"]
    text = found.text(found.prompt)
    asked = text[users[-1].start : users[-1].stop] if users else text
    return next((line for line in reversed(asked.splitlines()) if "?" in line), asked)


def _short(text: str) -> str:
    found = " ".join(text[: 4 * _LONGEST].split())
    return found if len(found) <= _LONGEST else f"{found[: _LONGEST - 1]}…"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("flashtrace_plugin", "runs"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

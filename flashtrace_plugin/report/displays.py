"""Small tables for a notebook's output: HTML without scripts, in which texts of a model are text and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from flashtrace_plugin.report.marks import percent, shorten

if TYPE_CHECKING:
    from jinja2 import Template

Format = Callable[[Any], str]


def text(value: Any) -> str:
    """A text on one line, cut where it is long; invisible characters become visible ones."""
    return shorten(str(value), 240)


def number(value: float) -> str:
    """Three digits: small shares of long prompts are not zero."""
    return f"{value + 0.0:.3g}"


def share(value: float) -> str:
    """A share in percent; a dash for nan, which template and sinks have."""
    return percent(value) if value == value else "–"


def table(title: str, columns: Mapping[str, Format], rows: Iterable[Sequence[Any]], *notes: str) -> str:
    """One table with its title above and sentences below. Everything is escaped.

    columns: how the cells of each column are written; those written by :func:`text` are aligned to the left
    """
    return _template().render(
        title=shorten(title, 400),
        heads=[(shorten(name, 40), "left" if written is text else "right") for name, written in columns.items()],
        rows=[[written(cell) for written, cell in zip(columns.values(), row, strict=True)] for row in rows],
        notes=[shorten(note, 1000) for note in notes if note],
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    return Environment(autoescape=True, undefined=StrictUndefined).from_string(_TABLE)


_TABLE = """<div><p><strong>{{ title }}</strong></p>
<table><thead><tr>{% for name, side in heads %}
<th scope="col" style="text-align:{{ side }};padding:0 .6em">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr>{% for cell in row %}
<td dir="auto" style="text-align:{{ heads[loop.index0][1] }};padding:0 .6em">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>{% for note in notes %}<p dir="auto">{{ note }}</p>{% endfor %}</div>
"""

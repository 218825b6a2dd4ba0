"""Docstrings are written to be read in an editor: here their roles, formulas and aligned lines become Markdown."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|mod|attr|data):`(~?)([\w.]+)`")
_ARGUMENT = re.compile(r"^(?P<names>`{0,2}[\w*]+`{0,2}(?:, [\w*]+)*):\s+(?P<text>\S.*)$")


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is collected."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The docstring with code spans for roles, code blocks for formulas, and lists for aligned lines."""
    text = _ROLE.sub(_name, text).replace("``", "`")
    blocks = [_block(list(lines)) for blank, lines in groupby(text.splitlines(), lambda x: not x.strip()) if not blank]
    return "\n\n".join(blocks)


def _name(role: re.Match[str]) -> str:
    return f"`{role[2].rpartition('.')[2] if role[1] else role[2]}`"


def _block(lines: list[str]) -> str:
    if lines[0].startswith(" "):  # an indented formula
        return "\n".join(line if line.startswith("    ") else f"    {line}" for line in lines)
    if _ARGUMENT.match(lines[0]):
        return _arguments(lines)
    return re.sub(r"::$", ":", "\n".join(lines))


def _arguments(lines: list[str]) -> str:
    """Lines ``name: what it is``, with their continuations, as a list."""
    items: list[str] = []
    for line in lines:
        argument = _ARGUMENT.match(line)
        if argument is None:
            items[-1] += f" {line.strip()}"
        else:
            items.append(f"- `{argument['names'].strip('`')}`: {argument['text']}")
    return "\n".join(items)

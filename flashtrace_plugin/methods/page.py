"""Writes docs/methods.md from the declarations of the methods.

python -m flashtrace_plugin.methods.page
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from flashtrace_plugin.methods.base import Method, options_of
from flashtrace_plugin.methods.options import Declared
from flashtrace_plugin.methods.registry import BUILT_IN, METHODS

_INTRODUCTION = """\
# Methods and their options

Written by `python -m flashtrace_plugin.methods.page` from what the methods declare; do not edit by hand. Methods of
other packages, see [adding-a-method.md](adding-a-method.md), are found in the same places under their own names.
"""

_PLACES = {
    "Python": "flashtrace_plugin.{cls}(model, tokenizer)",
    "Inseq": 'inseq.load_model(model, "{name}")',
    "Captum": "flashtrace_captum.{cls}(model)",
    "TransformerLens": "flashtrace_lens.{name}(bridge, tokens, …)",
    "command line": "flashtrace-plugin attribute --method {name}",
}
"""How each host calls a method by its name or its class."""

_PAGES = {
    "recommended": "recommended.md",
    "flashtrace": "how-it-works.md",
    "lrp": "lrp.md",
    "heta": "heta.md",
}
"""Methods that have a page of their own."""


def page() -> str:
    """The whole page: one section for each of the package's own methods."""
    return "\n".join([_INTRODUCTION, *(section(METHODS[name]) for name in BUILT_IN)])


def section(method: type[Method]) -> str:
    """What a method does, where it is found, and its options."""
    places = [[host, f"`{call.format(name=method.name, cls=method.__name__)}`"] for host, call in _PLACES.items()]
    options = [_row(one) for one in options_of(method)]
    own = _PAGES.get(method.name)
    return "\n\n".join(
        [
            f"## {method.__name__}",
            _described(method) + (f"\n\nWhat it does and does not say: [{own}]({own})." if own else ""),
            _table(["where", "how"], places),
            _table(["option", "default", "choices", "what it does"], options) + "\n",
        ]
    )


def _described(method: type[Method]) -> str:
    """The docstring without its list of options, as Markdown."""
    text = (method.__doc__ or "").partition("\nOptions:\n")[0].strip()
    return re.sub(r"(:\w+:)?`+~?([^`]+)`+", r"`\2`", text)


def _row(one: Declared) -> list[str]:
    choices = ", ".join(f"`{choice!r}`" for choice in one.choices or ())
    return [f"`{one.name}`", f"`{one.default!r}`", choices, one.help.replace("|", "\\|")]


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    """Writes the page to the file that is named, or to docs/methods.md."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/methods.md")
    path.write_text(page(), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

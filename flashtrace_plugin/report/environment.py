"""The templates of a report, and its own style sheet and script with the hashes that a page allows them by."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from flashtrace_plugin import __version__
from flashtrace_plugin.report import colours
from flashtrace_plugin.report.marks import percent, shorten, visible

if TYPE_CHECKING:
    from jinja2 import Environment

_SCRIPTS = ("data", "scale", "table", "text", "overview", "focus", "files", "main")
"""Parts of the script, in the order in which they are put together."""


def rendered_page(context: Mapping[str, Any]) -> str:
    """A page, or a piece of one, from what the template needs to know."""
    return _environment().get_template("report.html.j2").render(context, version=__version__)


class _Own(str):
    """Text of the package's own, which is not escaped."""

    def __html__(self) -> str:
        return str(self)

    @property
    def hash(self) -> str:
        """By which a content security policy allows it."""
        return "sha256-" + base64.b64encode(hashlib.sha256(self.encode()).digest()).decode()


def _inert(value: Any) -> Any:
    """What an expression writes: texts without characters that no file can hold or that turn lines around."""
    return visible(value) if type(value) is str else value


def _number(value: float) -> str:
    """Three digits, so that columns of numbers line up."""
    return f"{value:#.3g}" if value else "0"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("flashtrace_plugin", "report/page"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_inert,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, number=_number, shorten=shorten)
    environment.globals.update(scripts=[f"script/{name}.js" for name in _SCRIPTS], colours=colours)
    style, script = (environment.get_template(name).render() for name in ("style.css.j2", "script.js.j2"))
    environment.globals.update(style=_Own(style), script=_Own(script))
    return environment

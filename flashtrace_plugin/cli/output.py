"""What a command gives back: files first, then a table in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashtrace_plugin.errors import InputError

if TYPE_CHECKING:
    from flashtrace_plugin.attribution import Attribution


def _writable(path: Path | None) -> Path | None:
    """Refused before the work, not after it."""
    if path is not None and not path.parent.is_dir():
        raise InputError(
            f"cannot write {path}: the folder {path.parent} does not exist; create it, or write elsewhere"
        )
    return path


OUTPUT: dict[str, Any] = {"dir_okay": False, "callback": _writable, "rich_help_panel": "Output"}
"""Settings of an option that names a file to write."""


BY: dict[str, Any] = {
    "help": "Also print mass by 'word', 'sentence', 'paragraph', 'step', 'line' or 'message'.",
    "rich_help_panel": "Output",
}
"""Settings of the option that names units."""


def deliver(
    found: Attribution, top: int, json_path: Path | None, html_path: Path | None, by: str | None = None
) -> None:
    """Writes the files that were asked for and prints the attribution.

    by: units to print as well
    """
    from rich.console import Console

    from flashtrace_plugin.report import terminal

    # Files first: whoever reads the output may stop reading, as `head` does.
    if json_path is not None:
        found.save(json_path)
    if html_path is not None:
        found.to_html(html_path)
    terminal.print_attribution(found, top=top, console=Console())
    if by is not None:
        typer.echo()
        terminal.print_units(found.by(by), top=top, console=Console())
    if json_path is not None:
        typer.echo(f"\nSaved: {json_path}")
    if html_path is not None:
        typer.echo(f"\nReport: {html_path.absolute().as_uri()}")

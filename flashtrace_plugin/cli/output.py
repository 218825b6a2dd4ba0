"""What a command gives back: files first, then a table in the terminal."""

from __future__ import annotations

import codecs
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashtrace_plugin.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from flashtrace_plugin.attribution import Attribution

_STDOUT = "-"


def _writable(path: Path | None) -> Path | None:
    """Refused before the work, not after it."""
    if path is None or str(path) == _STDOUT:
        return path
    if not path.parent.is_dir():
        raise InputError(
            f"cannot write {path}: the folder {path.parent} does not exist; create it, or write elsewhere"
        )
    try:
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; write elsewhere") from error
    return path


OUTPUT: dict[str, Any] = {"dir_okay": False, "allow_dash": True, "callback": _writable, "rich_help_panel": "Output"}
"""Settings of an option that names a file to write."""


def console_beside(*paths: Path | None) -> Console:
    """Where people read: stdout, or stderr where a file goes to stdout. Raises InputError for two such files."""
    from rich.console import Console

    piped = [path for path in paths if path is not None and str(path) == _STDOUT]
    if len(piped) > 1:
        raise InputError("two files were to go to stdout; give one of them a name")
    return Console(stderr=bool(piped))


def write_text(path: Path | None, text: str) -> None:
    """Writes a file that was asked for, in UTF-8."""
    if path is None:
        return
    if str(path) == _STDOUT:
        stdout = typer.get_binary_stream("stdout")
        stdout.write(text.rstrip("\n").encode() + b"\n")
        stdout.flush()
    else:
        path.write_text(text, encoding="utf-8")


def deliver(
    found: Attribution, top: int, json_path: Path | None, html_path: Path | None, by: str | None = None
) -> None:
    """Writes the files that were asked for and prints the attribution.

    by: units to print as well
    """
    from rich.text import Text

    from flashtrace_plugin.report import terminal
    from flashtrace_plugin.report.html import as_html

    console = console_beside(json_path, html_path)
    # Files first: whoever reads the output may stop reading, as `head` does.
    if json_path is not None:
        write_text(json_path, json.dumps(found.to_dict(), ensure_ascii=False))
    if html_path is not None:
        write_text(html_path, as_html(found))
    terminal.print_attribution(found, top=top, console=console)
    if by is not None:
        console.print()
        terminal.print_units(found.by(by), top=top, console=console)
    for name, path in (("Saved", json_path), ("Report", html_path)):
        if path is not None and str(path) != _STDOUT:
            where = path.absolute().as_uri() if name == "Report" else path
            console.print(Text(f"\n{name}: {where}"), soft_wrap=True)


def print_text(console: Console, text: str, heading: str = "") -> None:
    """A text of a model or a file, under a heading, with what could act on the terminal made visible."""
    from rich.text import Text

    from flashtrace_plugin.report.marks import visible

    if heading:
        console.print(Text(heading, "bold"))
    console.print(Text(visible(text.strip("\n"))), soft_wrap=not heading)
    if heading:
        console.print()


@contextmanager
def kept(generation: str, path: Path | None) -> Iterator[None]:
    """Saves what the model wrote before it is used, or, without a path, if what comes then fails or is stopped."""
    write_text(path, generation)
    try:
        yield
    except BaseException:
        if path is None:
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", prefix="flashtrace-generation-", suffix=".txt", delete=False
            ) as file:
                file.write(generation)
            path = Path(file.name)
        typer.echo(f"what the model wrote is kept: --generation-file {path}", err=True)
        raise


_LIKE = {ord(a): b for a, b in zip("█−–—“”‘’…·×→␣↵⇥␡•≥≤", "#---\"\"''~.x>_|>?*><", strict=True)}
_NAME = "flashtrace-plugin.like"


def _like(error: UnicodeError) -> tuple[str, int]:
    """A character that looks like the one that the encoding lacks, as wide as it is; else its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_LIKE.get(ord(c), c.encode("ascii", "backslashreplace").decode()) for c in lost), error.end


def use_any_terminal() -> None:
    """Lets stdout and stderr take every character, whatever the encoding of the terminal is."""
    codecs.register_error(_NAME, _like)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_NAME)

"""Files of one JSON object a line that may be cut off at any byte: what is whole is kept, the rest written again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashtrace_plugin.errors import InputError


def read_lines(path: Path, needed: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """The complete lines of a file; none where there is no file. Raises InputError for one that lacks a name."""
    if not path.exists():
        return
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not text.endswith("\n"):
            return
        try:
            line = json.loads(text)
            _ = [line[name] for name in needed]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"line {number} of {path} is not a result ({error}); give another file as out") from error
        yield line


def cut_unfinished(path: Path) -> None:
    """Removes a last line that was cut off."""
    text = path.read_bytes() if path.exists() else b""
    if text and not text.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds one line. Raises InputError where it cannot be written; what was there stays as it was."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); the lines before are kept, make room and run again"
        ) from error

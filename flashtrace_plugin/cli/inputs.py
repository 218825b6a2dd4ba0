"""What a command is given: texts from options and files, spans, and options of a method as they are typed."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashtrace_plugin.errors import InputError

if TYPE_CHECKING:
    from flashtrace_plugin.text import Prompt


def read_prompt(prompt: str | None, prompt_file: Path | None, messages_file: Path | None) -> Prompt:
    """The prompt from the one option that gives it. Raises InputError for none or several."""
    given = [x for x in (prompt, prompt_file, messages_file) if x is not None]
    if len(given) != 1:
        raise InputError(f"{len(given)} prompts were given; give one of --prompt, --prompt-file and --messages-file")
    if messages_file is not None:
        return _messages(read_file(messages_file) or "", messages_file)
    return prompt if prompt is not None else read_file(prompt_file) or ""


def _messages(text: str, path: Path) -> Prompt:
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); it must hold a list of chat messages") from error
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{path} holds no chat messages; write [{{"role": "user", "content": "…"}}, …]')
    return messages


def read_file(path: Path | None) -> str | None:
    """A file's text, or that of stdin for ``-``. Raises InputError for what cannot be read."""
    if path is None:
        return None
    try:
        data = typer.get_binary_stream("stdin").read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


def only(first: str, one: str | None, second: str, other: str | None) -> str | None:
    """The one of two options that was given. Raises InputError for both."""
    if one is not None and other is not None:
        raise InputError(f"both {first} and {second} were given; give one of them")
    return one if other is None else other


def read_span(text: str | None) -> slice | str | None:
    """Token positions if it reads ``a:b``, ``a:`` or ``:b`` with numbers, otherwise a piece of the text."""
    found = re.fullmatch(r"(-?\d+)?:(-?\d+)?", text) if text is not None and text != ":" else None
    return text if found is None else slice(*(None if part is None else int(part) for part in found.groups()))


def typed_options(pairs: Sequence[str], extra: Sequence[str]) -> dict[str, Any]:
    """Options of a method: ``NAME=VALUE`` pairs, and what stands as ``--name value`` or ``--name=value``."""
    found: dict[str, Any] = {}
    for item in [*pairs, *_as_pairs(list(extra))]:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"option {item!r} is not of the form NAME=VALUE")
        found[name] = typed(value)
    return found


def typed(value: str) -> Any:
    """A value is read as JSON, and as plain text if it is none."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # no JSON, or more digits or levels than Python reads
        return value


def _as_pairs(extra: list[str]) -> list[str]:
    """``["--rule", "attn"]`` as ``["rule=attn"]``. Raises InputError for what no option begins."""
    pairs = []
    while extra:
        flag = extra.pop(0)
        if not flag.startswith("--"):
            raise InputError(f"unexpected {flag!r}; options of a method are --name value, see 'methods NAME'")
        name, equals, value = flag[2:].partition("=")
        if not equals and not extra:
            raise InputError(f"the option {flag} has no value; write {flag} VALUE")
        pairs.append(f"{name.replace('-', '_')}={value if equals else extra.pop(0)}")
    return pairs


_IN_FLAGS = (
    ("a Span of token positions", "token positions a:b, which 'flashtrace-plugin tokens' lists"),
    ("pass a Span instead", "pass token positions a:b, which 'flashtrace-plugin tokens' lists"),
    ("pass the spans to choose others", "give --target and --reasoning to choose others"),
    ("generate more tokens", "raise --max-new-tokens"),
    ("give a generation instead", "give --generation instead"),
)
"""What messages of the Python API say, and what it is on the command line."""


def in_flags(message: str, flags: Collection[str]) -> str:
    """A message of the Python API in the words of a command: ``target=...`` is ``--target``.

    flags: those that the command has
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found.groups()
        known = f"--{name.replace('_', '-')}"
        given = "" if value in ("", "...") else f" {value.strip(chr(39))}"
        return f"{known}{given}" if known in flags else found.group()

    for python, here in _IN_FLAGS:
        message = message.replace(python, here)
    return re.sub(r"\b([a-z_]+)=(\.\.\.|'[^']*'|[\w.]*)", flag, message)

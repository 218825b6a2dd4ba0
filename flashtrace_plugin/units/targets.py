"""Targets in the words people use: a sentence or line of the answer, a tool call, an argument of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from flashtrace_plugin.errors import SpanError
from flashtrace_plugin.formats import find_tool_calls
from flashtrace_plugin.spans import Chars, trim
from flashtrace_plugin.units.split import SPLITTERS, split


@runtime_checkable
class Locator(Protocol):
    """What finds its place in a generated text."""

    def locate(self, generation: str, visible: Chars) -> Chars:
        """Characters of the generation. Raises SpanError where there is no such place.

        visible: the answer, without the reasoning before it and what ends it
        """
        ...


@dataclass(frozen=True)
class Sentence:
    """A sentence of the answer, by its index; negative ones count from the end."""

    index: int

    def locate(self, generation: str, visible: Chars) -> Chars:
        """See :class:`Locator`."""
        return _piece("sentence", self.index, generation, visible)


@dataclass(frozen=True)
class Line:
    """A line of the answer that is not empty, by its index; negative ones count from the end."""

    index: int

    def locate(self, generation: str, visible: Chars) -> Chars:
        """See :class:`Locator`."""
        return _piece("line", self.index, generation, visible)


def _piece(kind: str, index: int, generation: str, visible: Chars) -> Chars:
    start = visible[0]
    pieces = split(generation[start : visible[1]], SPLITTERS[kind], kind)
    if not -len(pieces) <= index < len(pieces):
        raise SpanError(f"the answer has {len(pieces)} {kind}s, so there is no {kind} {index}; they count from 0")
    a, b = pieces[index]
    return start + a, start + b


@dataclass(frozen=True)
class ToolCall:
    """A tool call of the generation, by its index; :meth:`argument` chooses one of its arguments.

    The formats are those of :data:`~flashtrace_plugin.formats.TOOL_CALLS`, and an answer that is nothing but JSON.
    """

    index: int = 0
    path: str | None = None

    def argument(self, path: str) -> ToolCall:
        """The value of an argument: its name, and with dots what is inside it: ``"recipients.0.address"``."""
        return replace(self, path=path)

    def locate(self, generation: str, visible: Chars) -> Chars:
        """See :class:`Locator`."""
        calls = find_calls(generation, visible)
        if not -len(calls) <= self.index < len(calls):
            raise SpanError(
                f"the generation has {len(calls)} tool calls, so there is no call {self.index}; they count from 0. "
                "Known formats are those of flashtrace_plugin.formats.TOOL_CALLS and plain JSON"
            )
        call = calls[self.index]
        return call.chars if self.path is None else _argument(generation, call, self.path)


@dataclass(frozen=True)
class _FoundCall:
    """A tool call of a text.

    name:      of the tool
    chars:     the whole call, without the format's markers
    arguments: the JSON of its arguments
    """

    name: str
    chars: Chars
    arguments: Chars


def find_calls(generation: str, visible: Chars | None = None) -> list[_FoundCall]:
    """Tool calls of a text, in its order. Raises SpanError for one that is not JSON.

    visible: the answer, which may itself be a call in plain JSON; by default all of the text
    """
    answer = visible or (0, len(generation))
    found = find_tool_calls(generation, answer[0])
    if found:
        return [call for _, chars in found for call in _calls(generation, chars)]
    chars = trim(generation, answer)
    plain = chars is not None and generation[chars[0]] in "{[" and chars
    return [call for call in _calls(generation, plain) if call.name] if plain else []


_ARGS = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\][^\[]*)?\[ARGS\]\s*")
"""Mistral's newer form: ``name[ARGS]{…}``"""
_HARMONY = re.compile(r"(?:functions\.)?([\w.-]+).*?<\|message\|>\s*", re.DOTALL)
"""gpt-oss: ``functions.name <|constrain|>json<|message|>{…}``"""


def _calls(text: str, chars: Chars) -> Iterator[_FoundCall]:
    start, stop = chars
    headed = _ARGS.match(text, start, stop) or (
        _HARMONY.match(text, start, stop) if text[start : start + 1] not in "{[" else None
    )
    if headed:
        _json(text, headed.end(), stop)
        yield _FoundCall(headed[1], chars, (headed.end(), stop))
        return
    _json(text, start, stop)
    for a, b in [(s, e) for _, s, e in _items(text, start)] if text[start] == "[" else [chars]:
        inside = {key: (s, e) for key, s, e in _items(text, a)} if text[a] == "{" else {}
        arguments = inside.get("arguments") or inside.get("parameters")
        name = json.loads(text[slice(*inside["name"])]) if "name" in inside else ""
        yield _FoundCall(str(name) if arguments else "", (a, b), arguments or (a, b))


def _argument(text: str, call: _FoundCall, path: str) -> Chars:
    """The characters of an argument's value. Raises SpanError, with the arguments that there are."""
    start, stop = call.arguments
    for key in path.split("."):
        items = {str(name): (s, e) for name, s, e in _items(text, start)} if text[start] in "{[" else {}
        if key not in items:
            known = ", ".join(items) or "none"
            raise SpanError(f"the call of {call.name!r} has no argument {path!r}: {key!r} is not among {known}")
        start, stop = items[key]
    return (start + 1, stop - 1) if text[start] == '"' and stop - start > 2 else (start, stop)


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def _json(text: str, start: int, stop: int) -> None:
    """Raises SpanError unless the characters are one JSON value."""
    try:
        _, end = _DECODER.raw_decode(text[:stop], start)
    except json.JSONDecodeError as error:
        raise SpanError(
            f"the tool call {text[start : start + 60]!r} is not valid JSON ({error.msg} at character {error.pos} of "
            "the generation); pass the piece of text that you ask about as target instead"
        ) from None
    except RecursionError:
        raise SpanError(f"the tool call {text[start : start + 60]!r} is nested too deeply to be read") from None
    if text[end:stop].strip():
        raise SpanError(f"the tool call goes on behind its JSON with {text[end:stop].strip()[:40]!r}")


def _items(text: str, start: int) -> Iterator[tuple[str | int, int, int]]:
    """Key or index of every item of a JSON object or array that begins at ``start``, and its value's characters."""
    keyed, at, count = text[start] == "{", _SPACE.match(text, start + 1).end(), 0  # type: ignore[union-attr]
    while text[at] not in "}]":
        key: str | int = count
        if keyed:
            key, at = _DECODER.raw_decode(text, at)
            at = _after(text, at, ":")
        _, end = _DECODER.raw_decode(text, at)
        yield key, at, end
        count += 1
        at = _after(text, end, ",")


def _after(text: str, at: int, mark: str) -> int:
    """Behind a mark and the space around it; at the next thing where the mark is missing."""
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    return _SPACE.match(text, at + 1).end() if text[at] == mark else at  # type: ignore[union-attr]

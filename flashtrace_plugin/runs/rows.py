"""A row of a data set: what is asked and answered, checked before a model sees it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.messages import check_messages
from flashtrace_plugin.text import Conversation, Prompt

COLUMNS = ("id", "prompt", "messages", "tools", "generation", "target", "reasoning", "documents", "evidence")
"""What a row may hold; other columns are left alone."""


@dataclass(frozen=True)
class Given:
    """A row as it stands in the input.

    number:  counted from 0, with the rows that cannot be read
    columns: those of ``COLUMNS`` that have a value; None where the row cannot be read
    digest:  of these values, 16 hexadecimal digits: the same wherever they are read from
    problem: why the row cannot be read
    """

    number: int
    columns: Mapping[str, Any] | None
    digest: str
    problem: str = ""

    @property
    def id(self) -> str:
        """The row's name, by default its number. Raises InputError for what is none."""
        if self.columns is None:
            raise InputError(self.problem)
        found = self.columns.get("id", self.number)
        if isinstance(found, bool) or not isinstance(found, (str, int)) or found == "":
            raise InputError(f"the id is {_short(found)}; it must be a text that is not empty, or a whole number")
        return str(found)


@dataclass(frozen=True)
class Row:
    """A row that can be explained.

    generation: None where the model is to write it
    target, reasoning: a piece of the generation, or token positions
    documents:  texts of the prompt by name
    evidence:   what is known to be the evidence: texts of the prompt, or positions of its tokens
    """

    number: int
    digest: str
    id: str
    prompt: Prompt
    generation: str | None = None
    target: str | slice | None = None
    reasoning: str | slice | None = None
    documents: Mapping[str, str] = field(default_factory=dict)
    evidence: tuple[str | int, ...] = ()

    @property
    def size(self) -> int:
        """Characters, as a measure of how long it takes before anything is tokenized."""
        texts = self.prompt if isinstance(self.prompt, str) else str(self.prompt)
        return len(texts) + len(self.generation or "")


@dataclass(frozen=True)
class Failure:
    """A row that has no explanation, and why; ``id`` is None where that is what is wrong, or cannot be read."""

    number: int
    digest: str
    id: str | None
    error: str
    message: str

    size = 0

    def __str__(self) -> str:
        name = "" if self.id is None else f" (id {_short(self.id)})"
        return f"row {self.number}{name}: {self.error}: {' '.join(self.message.split())}"


def failed(row: Given | Row, error: BaseException, id: str | None) -> Failure:
    """The failure of a row. id: of the row, if that is known"""
    return Failure(row.number, row.digest, id, type(error).__name__, str(error) or type(error).__name__)


def given(number: int, row: Any, names: Mapping[str, str]) -> Given:
    """A row of the input with its columns by the names of ``COLUMNS``.

    names: what columns are called in the input, where they are called otherwise
    """
    if not isinstance(row, Mapping):
        return unreadable(number, repr(row).encode(), f"the row is a {type(row).__name__}, not an object with columns")
    lacking = [theirs for theirs in names.values() if theirs not in row]
    if lacking:
        return unreadable(number, repr(row).encode(), f"the row has no column {', '.join(map(repr, lacking))}")
    found = {name: _filled(row.get(names.get(name, name))) for name in COLUMNS}
    kept = {name: value for name, value in found.items() if value is not None}
    return Given(number, kept, digest_of(json.dumps(kept, sort_keys=True, default=repr).encode()))


def unreadable(number: int, data: bytes, problem: str) -> Given:
    """A row of the input that is none. data: what stands there"""
    return Given(number, None, digest_of(data), problem)


def digest_of(data: bytes) -> str:
    """16 hexadecimal digits that tell rows apart."""
    return hashlib.sha256(data).hexdigest()[:16]


def _filled(value: Any) -> Any:
    """Without the empty fields that columnar formats give every object that lacks what others have."""
    if isinstance(value, Mapping):
        return {str(key): _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, (list, tuple)) else value


def row_of(row: Given, id: str) -> Row:
    """The row, checked as far as that goes without a model. Raises InputError for what cannot be explained."""
    assert row.columns is not None  # the caller has its id
    prompt, answered = _prompt(row.columns)
    return Row(
        row.number,
        row.digest,
        id,
        prompt,
        _text("generation", row.columns.get("generation", answered)),
        _where("target", row.columns.get("target")),
        _where("reasoning", row.columns.get("reasoning")),
        _documents(row.columns.get("documents")),
        _evidence(row.columns.get("evidence")),
    )


def _prompt(columns: Mapping[str, Any]) -> tuple[Prompt, str | None]:
    """What was asked, and the answer if the messages end with it."""
    text, messages = columns.get("prompt"), columns.get("messages")
    if (text is None) == (messages is None):
        which = "neither prompt nor messages" if text is None else "both prompt and messages"
        raise InputError(f"the row has {which}; it must have one of them")
    if messages is None:
        if "tools" in columns:
            raise InputError("the row has tools and a prompt that is a text; tools need messages")
        return _text("prompt", text) or "", None
    check_messages(messages)
    asked, answered = _asked(messages) if "generation" not in columns else (messages, None)
    return Conversation(asked, columns["tools"]) if "tools" in columns else asked, answered


def _asked(messages: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], str | None]:
    """Messages that end with an assistant's hold question and answer."""
    last = messages[-1]
    if last["role"] != "assistant":
        return messages, None
    if set(last) != {"role", "content"} or not isinstance(last["content"], str) or len(messages) == 1:
        raise InputError(
            "the messages end with an assistant's that is more than a content; leave it out and pass what the model "
            "wrote as generation"
        )
    return messages[:-1], last["content"]


def _text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} is {_short(value)}, a {type(value).__name__}; it must be a text")
    if value is not None and not value.strip():
        raise InputError(f"the {name} is empty")
    return value


def _where(name: str, value: Any) -> str | slice | None:
    """A piece of the generation, or ``[start, stop]``, which JSON has instead of a Span."""
    if isinstance(value, list) and len(value) == 2 and all(type(edge) is int for edge in value):
        return slice(*value)
    if value is not None and not isinstance(value, str):
        raise InputError(
            f"{name} is {_short(value)}; it must be a piece of the generation, or token positions [start, stop]"
        )
    return _text(name, value)


def _documents(value: Any) -> Mapping[str, str]:
    """Texts by name, or a list of texts, which are named by their numbers from 1."""
    found = {str(i): text for i, text in enumerate(value, 1)} if isinstance(value, list) else value
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(text, str) and text.strip() for text in found.values()):
        raise InputError(f'documents are {_short(value)}; write {{"name": "text", …}} or ["text", …]')
    return found


def _evidence(value: Any) -> tuple[str | int, ...]:
    found = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(found, list) or not all(type(one) in (str, int) for one in found):
        raise InputError(f"evidence is {_short(value)}; it must be texts of the prompt, or positions of its tokens")
    return tuple(found)


def _short(value: Any) -> str:
    found = repr(value)
    return found if len(found) <= 60 else f"{found[:57]}…"

"""Which message, and which sentence of it, made an agent write what it wrote: a tool call, an argument, an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.frames import as_frame
from flashtrace_plugin.messages import check_messages
from flashtrace_plugin.sources.explainer import explainer
from flashtrace_plugin.text import Conversation, Messages, Where, as_conversation, render
from flashtrace_plugin.units.scores import UnitScore, UnitScores
from flashtrace_plugin.units.targets import ToolCall

if TYPE_CHECKING:
    import pandas as pd

    from flashtrace_plugin.verify import Verification

_FIRST_CALL = ToolCall(0)
_STRONGEST = 3
"""Messages whose sentences are looked at."""


@dataclass(frozen=True, eq=False)
class Blame:
    """What an assistant's message comes from.

    target:       what was explained, as the model wrote it
    turn:         index of the message that it stands in
    messages:     mass over the messages before it
    sentences:    those with most mass in the strongest messages, best first
    injection:    the text that was named, with its mass; None without one
    verification: what happens without the sentences with most mass; None where that was not tried
    attribution:  all of it
    """

    target: str
    turn: int
    messages: UnitScores
    sentences: tuple[UnitScore, ...]
    injection: UnitScore | None
    verification: Verification | None
    attribution: Attribution

    def __str__(self) -> str:
        return "\n".join([f"message {self.turn} wrote: {_line(self.target)}", *self._lines()])

    def _lines(self) -> list[str]:
        rows = [f"{one.share:6.1%}  {_where(one)}: {_line(one.unit.text)}" for one in self.messages.top(_STRONGEST)]
        rows += [f"{one.share:6.1%}  in {_where(one)}: “{_line(one.unit.text)}”" for one in self.sentences]
        if self.injection is not None:
            rows.append(f"{self.injection.share:6.1%}  injection: “{_line(self.injection.unit.text)}”")
        return rows + ([] if self.verification is None else [self.verification.sentence])

    def to_markdown(self) -> str:
        """Tables of the messages and of the sentences."""
        parts = [
            f"## What message {self.turn} comes from",
            f"> {_line(self.target, 400)}",
            _table("message", [(_where(one), one) for one in self.messages if one.unit.content]),
            _table("sentence of", [(_where(one), one) for one in self.sentences]),
        ]
        if self.injection is not None:
            parts.append(_table("injection in", [(_where(self.injection), self.injection)]))
        if self.verification is not None:
            parts.append(self.verification.sentence)
        return "\n\n".join(parts) + "\n"

    def to_frame(self) -> pd.DataFrame:
        """A row for each message, then for each sentence, then for the injection: part, message, role, text, share,
        density.

        Raises InputError without pandas.
        """
        return as_frame({"part": part, **_row(one)} for part, one in self._parts())

    def _repr_html_(self) -> str:
        from flashtrace_plugin.report.displays import share, table, text

        rows = [(part, _where(one), one.share, one.unit.text) for part, one in self._parts()]
        note = "" if self.verification is None else self.verification.sentence
        columns = {"part": text, "where": text, "share": share, "text": text}
        return table(f"What message {self.turn} comes from: “{_line(self.target)}”", columns, rows, note)

    def _parts(self) -> list[tuple[str, UnitScore]]:
        """Messages, sentences and the injection, each with what it is."""
        messages = [("message", one) for one in self.messages if one.unit.content]
        sentences = [("sentence", one) for one in self.sentences]
        return messages + sentences + ([] if self.injection is None else [("injection", self.injection)])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        return {
            "format": "flashtrace-blame/1",
            "target": self.target,
            "turn": self.turn,
            "messages": [_row(one) for one in self.messages if one.unit.content],
            "template_share": self.messages.template_share,
            "sentences": [_row(one) for one in self.sentences],
            "injection": None if self.injection is None else _row(self.injection),
            "verification": None if self.verification is None else self.verification.to_dict(),
            "method": self.attribution.method,
            "settings": dict(self.attribution.settings),
        }


def _row(one: UnitScore) -> dict[str, Any]:
    unit = one.unit
    return {"message": unit.message, "role": unit.name, "text": unit.text, "share": one.share, "density": one.density}


def _where(one: UnitScore) -> str:
    return f"message {one.unit.message} ({one.unit.name})"


def _line(text: str, most: int = 100) -> str:
    """A text in one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _table(head: str, rows: Sequence[tuple[str, UnitScore]]) -> str:
    cells = [(where, f"{one.share:.1%}", _line(one.unit.text).replace("|", r"\|")) for where, one in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [(head, "share", "text"), ("---",) * 3, *cells])


def blame(
    model: Any,
    tokenizer: Any,
    transcript: Messages | Conversation,
    target: Where | None = _FIRST_CALL,
    *,
    turn: int | None = None,
    tools: Sequence[Any] | None = None,
    injection: str | None = None,
    method: str = "recommended",
    verify: bool = False,
    **options: Any,
) -> Blame:
    """What a message of the assistant comes from: mass over the messages before it, and their sentences.

    transcript: chat messages with the assistant's message to explain; a Conversation to set options of the template
    target:     what of it: ``ToolCall(0)``, ``ToolCall(0).argument("to")``, a piece of it, as for
                :meth:`~flashtrace_plugin.Method.attribute`; None for all of it
    turn:       index of the message, negative ones from the end; by default the assistant's last. What comes after it
                is left out
    tools:      as the template was given them
    injection:  a text of the messages whose share is asked for, word for word
    method:     its name;  options: of the method
    verify:     whether sentences are really replaced, see :meth:`~flashtrace_plugin.attribution.Attribution.verify`

    What the model wrote is what the template writes for the message after the prompt that asks for it. Raises
    InputError where the template does not write it so: where it drops the thinking, the tool calls or a part of the
    text, or writes the messages before it otherwise once there is an answer.
    """
    chat = as_conversation(transcript)
    chat = chat if tools is None else replace(chat, tools=tools)
    explain = explainer(model, tokenizer, method, options)
    at = _turn(chat.messages, turn)
    before = replace(chat, messages=list(chat.messages[:at]))
    found = explain.attribute(before, _generation(explain.tokenizer, chat, at), target=target)
    messages = found.by("message")
    known = [one.unit.message for one in messages.top(_STRONGEST)]
    sentences = [one for one in found.by("sentence").top(len(found.tokens)) if one.unit.message in known]
    return Blame(
        found.text(found.target).strip(),
        at,
        messages,
        tuple(sentences[:_STRONGEST]),
        None if injection is None else _injection(found, injection),
        found.verify(explain.source.language_model, unit="sentence") if verify else None,
        found,
    )


def _turn(messages: Messages, turn: int | None) -> int:
    """Index of the message to explain. Raises InputError for one that is not the assistant's, and for the first."""
    check_messages(messages)
    if turn is not None and not isinstance(turn, int):
        raise InputError(f"turn must be the index of a message, got {turn!r}")
    if turn is None:
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not spoken:
            raise InputError("the transcript has no message of the assistant, so there is nothing to explain")
        turn = spoken[-1]
    if not -len(messages) <= turn < len(messages):
        raise InputError(f"turn {turn} is outside the transcript's {len(messages)} messages, which count from 0")
    at = turn % len(messages)
    if messages[at]["role"] != "assistant":
        raise InputError(
            f"message {at} is of the role {messages[at]['role']!r}; only what the assistant wrote can be explained"
        )
    if at == 0:
        raise InputError(
            "the assistant's message is the first one: no message comes before it that could have caused it"
        )
    return at


_THINKING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which messages carry what the model thought."""


def _generation(tokenizer: Any, chat: Conversation, at: int) -> str:
    """What the template writes for the message, after the prompt that asks for it."""
    asked, _ = render(tokenizer, replace(chat, messages=list(chat.messages[:at])))
    whole = chat.rendered(tokenizer, stop=at + 1)
    if not whole.startswith(asked):
        same = next((i for i, (a, b) in enumerate(zip(asked, whole)) if a != b), min(len(asked), len(whole)))
        raise InputError(
            f"the chat template writes the messages before message {at} otherwise once it is answered (from "
            f"{whole[same : same + 40]!r}, where the model saw {asked[same : same + 40]!r}), so what the model wrote "
            "is not known; use attribute with the prompt and the text that it wrote"
        )
    written, pieces = whole[len(asked) :].rstrip(), _pieces(chat.messages[at])
    if not pieces:
        raise InputError(f"message {at} is empty; there is nothing to explain")
    for what, piece in pieces:
        if piece not in written:
            raise InputError(
                f"the chat template does not write {what} of message {at} as it was given ({_line(piece, 60)!r}), so "
                "what the model wrote is not known; use attribute with the text that it wrote"
            )
    return written


def _pieces(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What of a message must be in what the template writes for it."""
    content = message.get("content")
    parts = [content] if isinstance(content, str) else [part["text"] for part in content or []]
    told = [("the content", part.strip()) for part in parts]
    told += [("the thinking", str(message[key]).strip()) for key in _THINKING if message.get(key)]
    for call in message.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if not isinstance(function.get("name"), str):
            raise InputError(
                f"the tool call {call!r} has no name; write {{'function': {{'name': …, 'arguments': …}}}}"
            )
        told.append((f"the tool call {function['name']!r}", function["name"]))
    return [(what, piece) for what, piece in told if piece]


def _injection(found: Attribution, text: str) -> UnitScore:
    try:
        scored = found.by({"injection": text})
    except InputError as error:
        raise InputError(f"injection=: {error}") from error
    one = scored[0]
    inside = [c for c in found.contents if c.start <= one.unit.ranges[0][0] < c.stop]
    return replace(one, unit=replace(one.unit, name=inside[0].role if inside else one.unit.name))

"""Where the contents of a prompt are in its visible text: chat messages, or what stands between special tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from flashtrace_plugin.formats import find_tool_calls
from flashtrace_plugin.spans import Chars


@dataclass(frozen=True)
class Content:
    """A part of the prompt that somebody wrote; what lies between contents is the chat template's.

    start, stop: characters of the visible text, which is the text of all tokens, special ones by their names
    role:        of the message, such as "user" or "tool"; "" where the prompt was no messages
    message:     index of the message; None where the prompt was no messages
    """

    start: int
    stop: int
    role: str = ""
    message: int | None = None


def offsets_of(tokens: Sequence[str]) -> list[Chars]:
    """Characters of each token in the visible text."""
    stops = list(accumulate(len(token) for token in tokens))
    return list(zip([0, *stops[:-1]], stops, strict=True)) if stops else []


def between_special(tokens: Sequence[str], ids: Sequence[int], special: Collection[int]) -> tuple[Content, ...]:
    """The stretches of ordinary tokens, as contents of no message. White space alone is none."""
    runs: list[list[int]] = [[]]
    for edges, i in zip(offsets_of(tokens), ids, strict=True):
        if i in special:
            runs.append([])
        else:
            runs[-1].extend(edges)
    text = "".join(tokens)
    return tuple(Content(run[0], run[-1]) for run in runs if run and text[run[0] : run[-1]].strip())


def of_messages(
    messages: Sequence[Mapping[str, Any]], text: str, render: Callable[[int], str | None]
) -> tuple[Content, ...]:
    """Contents of chat messages, in characters of the rendered text.

    text:   all messages as the tokenizer's template writes them
    render: the text of the first so many messages by themselves, without what asks for an answer; None where the
            template refuses them

    A message that the template dropped or rewrote is missing from the result.
    """
    found: list[Content] = []
    cursor = 0
    for i, message in enumerate(messages):
        block = _block(text, render(i) if i else "", render(i + 1), cursor)
        place = _inside(text, block, message)
        if place is not None:
            found.append(Content(*place, str(message.get("role", "")), i))
            cursor = place[1]
    return tuple(found)


def _block(text: str, before: str | None, until: str | None, cursor: int) -> tuple[Chars, bool]:
    """What a message added to the text, and whether that is known; else all that comes after the message before."""
    known = before is not None and until is not None and text.startswith(until) and until.startswith(before)
    return ((max(cursor, len(before or "")), len(until or "")), True) if known else ((cursor, len(text)), False)


def _inside(text: str, block: tuple[Chars, bool], message: Mapping[str, Any]) -> Chars | None:
    """Where a message's own text is inside its block: its content, and the tool calls that it makes."""
    (start, stop), known = block
    content = _written(message.get("content"))
    # A role's name may be the content as well, and comes first; in an unknown block the first match is the message.
    at = -1 if not content else text.rfind(content, start, stop) if known else text.find(content, start, stop)
    places = [(at, at + len(content))] if at >= 0 else []
    if message.get("tool_calls") and known:
        calls = [chars for _, chars in find_tool_calls(text[start:stop])]
        places += [(start + a, start + b) for a, b in calls] or [_without_header(text, start, stop)]
    return (min(a for a, _ in places), max(b for _, b in places)) if places else None


def _without_header(text: str, start: int, stop: int) -> Chars:
    """A block from its first brace or bracket of JSON to its last, or the whole block."""
    inside = text[start:stop]
    first = min((i for i in (inside.find("{"), inside.find("[")) if i >= 0), default=0)
    last = max(inside.rfind("}"), inside.rfind("]"))
    return (start + first, start + last + 1) if last > first else (start, stop)


def _written(content: Any) -> str:
    """The text of a message's content, which some write as parts."""
    if isinstance(content, str):
        return content.strip()
    texts = [str(part.get("text", "")) for part in content or [] if isinstance(part, Mapping)]
    return texts[0].strip() if len(texts) == 1 else ""


def in_visible_text(
    contents: Sequence[Content], text: str, tokens: Sequence[str], offsets: Sequence[Chars]
) -> tuple[Content, ...]:
    """Contents of a rendered text as contents of the visible text of its tokens.

    tokens:  of the prompt
    offsets: characters of ``text`` for each of them, or none where they are not known: then a text that is not that
             of the tokens has no contents
    """
    visible = "".join(tokens)
    if visible.endswith(text):
        shift = len(visible) - len(text)
        return tuple(Content(c.start + shift, c.stop + shift, c.role, c.message) for c in contents)
    if not offsets:
        return ()
    places, moved = offsets_of(tokens), []
    for c in contents:
        own = [place for place, (a, b) in zip(places, offsets, strict=True) if a < c.stop and c.start < b]
        if own:
            moved.append(Content(own[0][0], own[-1][1], c.role, c.message))
    return tuple(moved)

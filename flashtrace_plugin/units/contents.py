"""Where the contents of a prompt are in its visible text: chat messages, or what stands between special tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from flashtrace_plugin.formats import find_tool_calls
from flashtrace_plugin.spans import Chars, trim


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
    messages: Sequence[Mapping[str, Any]],
    text: str,
    render: Callable[[int], str | None],
    replaced: Callable[[int, Any], str | None],
) -> tuple[Content, ...]:
    """Contents of chat messages, in characters of the rendered text and in its order.

    text:     all messages as the tokenizer's template writes them
    render:   the text of the first so many messages by themselves, without what asks for an answer; None where the
              template refuses them
    replaced: all messages as in ``text``, with other content in one of them; None likewise

    A message that the template dropped or rewrote is missing from the result; an empty one has a place of no length.
    """
    found: list[Content] = []
    cursor = 0
    for i, message in enumerate(messages):
        block = _block(text, render(i) if i else "", render(i + 1), cursor)
        marked = _is_marked(text, message, replaced(i, _marked(message.get("content"))))
        place = _inside(text, block, message, marked)
        if place is not None:
            found.append(Content(*place, str(message.get("role", "")), i))
            cursor = place[1]
    return tuple(sorted(found, key=lambda content: content.start))


def in_order(messages: Sequence[Mapping[str, Any]], text: str) -> tuple[Content, ...]:
    """Contents of messages whose rendered text is not known, by their texts, one behind the other."""
    found, cursor = [], 0
    for i, message in enumerate(messages):
        pieces = [piece.strip() for piece in _texts(message.get("content")) if piece.strip()]
        for piece in pieces:
            at = text.find(piece, cursor)
            if at >= 0:
                cursor = at + len(piece)
                found.append(Content(at, cursor, str(message.get("role", "")), i))
    return tuple(found)


_MARK = "\N{REPLACEMENT CHARACTER}content\N{REPLACEMENT CHARACTER}"


def _marked(content: Any) -> Any:
    return [{"type": "text", "text": _MARK}] if isinstance(content, (list, tuple)) else _MARK


def _is_marked(text: str, message: Mapping[str, Any], marked: str | None) -> Chars | None:
    """What stands where a mark in the place of the content stands, if it is the content and all else is the same."""
    before, mark, after = (marked or "").partition(_MARK)
    start, stop = len(before), len(text) - len(after)
    if not (mark and start <= stop and text.startswith(before) and text.endswith(after)):
        return None
    chars = trim(text, (start, stop))
    written, given = text[start:stop].strip(), message.get("content")
    if isinstance(given, str):
        return (chars or (start, start)) if written == given.strip() else None
    texts = "".join(_texts(given))  # templates write parts with white space of their own between them
    return chars if written.split() and "".join(written.split()) == "".join(texts.split()) else None


def _block(text: str, before: str | None, until: str | None, cursor: int) -> tuple[Chars, bool]:
    """What a message added to the text, and whether that is known; else all that comes after the message before."""
    known = before is not None and until is not None and text.startswith(until) and until.startswith(before)
    return ((max(cursor, len(before or "")), len(until or "")), True) if known else ((cursor, len(text)), False)


def _inside(text: str, block: tuple[Chars, bool], message: Mapping[str, Any], marked: Chars | None) -> Chars | None:
    """Where a message's own text is: its content, as marked or inside its block, and the tool calls that it makes."""
    (start, stop), known = block
    places = [marked or _searched(text, block, _texts(message.get("content")))]
    if message.get("tool_calls") and known:
        calls = [chars for _, chars in find_tool_calls(text[start:stop])]
        places += [(start + a, start + b) for a, b in calls] or [_without_header(text, start, stop)]
    found = [place for place in places if place is not None]
    filled = [(a, b) for a, b in found if a < b] or found
    return (min(a for a, _ in filled), max(b for _, b in filled)) if filled else None


def _searched(text: str, block: tuple[Chars, bool], texts: Sequence[str]) -> Chars | None:
    """Where the content is inside its block, for a template that writes a mark otherwise than the content."""
    (start, stop), known = block
    content = texts[0].strip() if len(texts) == 1 else ""
    # A role's name may be the content as well, and comes first; in an unknown block the first match is the message.
    at = -1 if not content else text.rfind(content, start, stop) if known else text.find(content, start, stop)
    return (at, at + len(content)) if at >= 0 else None


def _without_header(text: str, start: int, stop: int) -> Chars:
    """A block from its first brace or bracket of JSON to its last, or the whole block."""
    inside = text[start:stop]
    first = min((i for i in (inside.find("{"), inside.find("[")) if i >= 0), default=0)
    last = max(inside.rfind("}"), inside.rfind("]"))
    return (start + first, start + last + 1) if last > first else (start, stop)


def _texts(content: Any) -> list[str]:
    """The texts of a message's content, which some write as parts."""
    if isinstance(content, str):
        return [content]
    parts = [part for part in content or [] if isinstance(part, Mapping)]
    return [str(part.get("text", "")) for part in parts if part.get("type", "text") == "text"]


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

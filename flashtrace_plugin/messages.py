"""Chat messages are checked before a template makes a text of them: most templates print whatever they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from flashtrace_plugin.errors import InputError

UNRENDERED = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""What a chat template raises for messages that it was not made for."""

_WRITE = '; write {"role": "user", "content": "…"}'


_MEDIA = ("image", "video")
"""Kinds of parts, besides texts, that a processor makes tokens of."""


def is_media(part: Any) -> bool:
    """Whether a part of a message's content is an image or a video."""
    return isinstance(part, Mapping) and part.get("type") in _MEDIA


def check_messages(messages: Any, *, media: bool = False) -> None:
    """Raises InputError, with the index of the message, for what is no list of messages that consist of text.

    media: whether there may be images and videos among their parts
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(
            f"the prompt must be a text or a list of chat messages, got {type(messages).__name__}; "
            'write [{"role": "user", "content": "…"}]'
        )
    if not messages:
        raise InputError("the prompt is empty: a list without messages; there is nothing to attribute to")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {i} is a {type(message).__name__}, not a dictionary{_WRITE}")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise InputError(f"message {i} has the role {message.get('role')!r}, which is no text{_WRITE}")
        _check_content(f"message {i} (role {message['role']!r})", message, media)


def _check_content(name: str, message: Mapping[str, Any], media: bool) -> None:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return  # an assistant that calls a tool need not say anything
    if content is None or not isinstance(content, (str, list, tuple)):
        raise InputError(f"{name} has no content that is a text, got {type(content).__name__}{_WRITE}")
    for part in () if isinstance(content, str) else content:
        if media and is_media(part):
            continue
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(
                f"{name} has a part of type {kind!r}; only text can be attributed, "
                "or, with the model's processor in the tokenizer's place, images and videos as well: "
                '[{"type": "text", "text": "…"}], or one text'
            )


def rendered(messages: Sequence[Mapping[str, Any]], render: Callable[[int], str]) -> str:
    """The text of the messages. Raises InputError with the index of the message that the template stumbles over.

    render: the text of the first so many messages
    """
    try:
        text = render(len(messages))
    except UNRENDERED as error:
        i = next((i for i in range(len(messages)) if not _renders(render, i + 1)), len(messages) - 1)
        raise InputError(
            f"the tokenizer's chat template fails at message {i} (role {messages[i]['role']!r}): {error}; write the "
            "messages as the template wants them, or pass the prompt as a text"
        ) from error
    for i, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str) and content is not None and str(content) in text:
            raise InputError(
                f"the tokenizer's chat template prints the parts of message {i} as Python does; pass its content as "
                "one text"
            )
    return text


def _renders(render: Callable[[int], str], count: int) -> bool:
    try:
        render(count)
    except UNRENDERED:
        return False
    return True


def check_encodable(name: str, text: str) -> None:
    """Raises InputError for halves of surrogate pairs, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the {name} has {text[error.start]!a} at character {error.start}, half of a surrogate pair, which is no "
            "text; decode its bytes as UTF-8 with errors='replace'"
        ) from error

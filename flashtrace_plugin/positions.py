"""The one reading of token positions: a Span, an index, ``(start, stop)`` or a slice, counted from either end."""

from __future__ import annotations

from operator import index
from typing import Any, Union

from flashtrace_plugin.errors import SpanError
from flashtrace_plugin.spans import Span

Positions = Union[Span, int, "tuple[int, int]", "list[int]", slice]
"""Positions of the whole sequence: a Span, one position, ``(start, stop)`` or ``slice(start, stop)``. Negative ones
count from the end, as everywhere in Python; an open end of a slice is that of the sequence."""


def as_span(name: str, value: Any, length: int, first: int = 0) -> Span:
    """The value as a Span of positions ``first <= i < length``.

    name:   what is read, for errors
    length: number of positions; negative values count from there
    first:  what the value's zero stands for, where positions are counted from somewhere else (Captum's responses)

    Raises SpanError for what is not a range of positions, and for one that is empty or ends outside.
    """
    if isinstance(value, Span):
        return _inside(name, value, length)
    start, stop = (_from_end(part, length - first) + first for part in _edges(name, value, length - first))
    if not first <= start < stop:
        raise SpanError(
            f"{name} {value!r} is {start}:{stop} of {length} positions, which is empty, reversed or negative; use "
            f"{first} <= start < stop"
        )
    return _inside(name, Span(start, stop), length)


def prompt_before(target: Span, reasoning: Span | None) -> int:
    """Number of prompt tokens where nobody says: all that come before reasoning and target."""
    return target.start if reasoning is None else min(reasoning.start, target.start)


def _edges(name: str, value: Any, length: int) -> tuple[int, int]:
    """Start and stop as written. A position -1 is the last one, so its stop is the end and not 0."""
    single = not isinstance(value, (tuple, list, slice))
    parts = (value, value) if single else value
    if isinstance(value, slice) and value.step in (None, 1):
        parts = (0 if value.start is None else value.start, length if value.stop is None else value.stop)
    try:
        start, stop = (index(part) for part in parts if not isinstance(part, bool))
    except (TypeError, ValueError):
        raise SpanError(
            f"{name} must be a Span(start, stop) of token positions, one position, (start, stop) or a slice without "
            f"step, got {value!r}. Spans are contiguous; explain several pieces one by one"
        ) from None
    return (start, start + 1 or length) if single else (start, stop)


def _from_end(position: int, length: int) -> int:
    return position + length if position < 0 else position


def _inside(name: str, span: Span, length: int) -> Span:
    if span.stop > length:
        raise SpanError(
            f"{name} {span} ends after the last of {length} tokens, outside the generation; positions count from 0"
        )
    return span

"""Spans of tokens, and where the reasoning and the answer of a generated text are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import Union

from flashtrace_plugin.errors import SpanError


@dataclass(frozen=True, order=True)
class Span:
    """Half-open range of token positions ``start <= i < stop`` in the whole sequence (prompt + generation)."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.stop <= self.start:
            raise SpanError(
                f"span {self.start}:{self.stop} is empty, reversed or negative; use 0 <= start < stop, both counted "
                "from the first token of the prompt"
            )

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __contains__(self, position: object) -> bool:
        return isinstance(position, int) and self.start <= position < self.stop

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    @property
    def slice(self) -> slice:
        """For indexing tensors and lists."""
        return slice(self.start, self.stop)

    def overlaps(self, other: Span) -> bool:
        """Whether the two spans share a position."""
        return self.start < other.stop and other.start < self.stop


SpanLike = Union[Span, "tuple[int, int]", slice]
"""A Span, or how Python writes one: ``(start, stop)`` or ``slice(start, stop)``."""


def as_span(name: str, value: SpanLike) -> Span:
    """The value as a Span. Raises SpanError for what is not a range of positions."""
    if isinstance(value, Span):
        return value
    parts = (value.start, value.stop) if isinstance(value, slice) and value.step in (None, 1) else value
    try:
        start, stop = (index(part) for part in parts)  # type: ignore[union-attr]
    except (TypeError, ValueError):
        raise SpanError(
            f"{name} must be a Span(start, stop) of token positions, or (start, stop), got {value!r}"
        ) from None
    return Span(start, stop)


def check_spans(length: int, prompt_length: int, target: Span, reasoning: Span | None) -> None:
    """Raises SpanError unless prompt, reasoning and target follow each other inside ``length`` tokens."""
    if not 0 < prompt_length < length:
        raise SpanError(
            f"the prompt has {prompt_length} of {length} tokens; it needs at least one, and so does the generation"
        )
    for name, span in (("target", target), ("reasoning", reasoning)):
        if span is not None and not (prompt_length <= span.start and span.stop <= length):
            raise SpanError(
                f"{name} {span} is outside the generation {prompt_length}:{length}; "
                "positions count from the first token of the prompt"
            )
    if reasoning is None:
        return
    if reasoning.overlaps(target):
        raise SpanError(f"reasoning {reasoning} and target {target} overlap; end one where the other begins")
    if reasoning.start > target.start:
        raise SpanError(f"reasoning {reasoning} comes after target {target}; only what precedes a target can cause it")


Chars = tuple[int, int]
"""Half-open range of characters."""

_BOXED = re.compile(r"\\boxed\s*\{")


def find_parts(generation: str) -> tuple[Chars, Chars | None]:
    """Where the answer and the reasoning are in a generated text, as character ranges (target, reasoning).

    ``<think>…</think>`` is reasoning (the opening tag may be part of the prompt) and what follows is the target.
    The last ``<answer>…</answer>`` after it, and then the last ``\\boxed{…}``, narrow the target; one inside the
    thinking does not count. Without thinking tags, what precedes a narrowed target is the reasoning; with
    nothing to go by, all of the generation is the target.

    Raises SpanError when the thinking does not end or nothing follows it.
    """
    reasoning, begin = _thinking(generation)
    answer = _narrowed(generation, begin)
    target = trim(generation, answer or (begin, len(generation)))
    if target is None:
        what = "the answer's tag is empty" if answer else "nothing follows the reasoning"
        raise SpanError(f"{what}, so there is no target; pass target=... to choose one")
    if answer and begin == 0:
        reasoning = trim(generation, (0, _tag_start(generation, answer[0])))
    return target, reasoning


def _thinking(text: str) -> tuple[Chars | None, int]:
    """The thinking, and where the text after it begins."""
    end = text.rfind("</think>")
    if end < 0:
        if "<think>" in text:
            raise SpanError(
                "the generation has <think> but no </think>: the thinking was cut off before an answer; "
                "generate more tokens, or pass target=... and reasoning=..."
            )
        return None, 0
    opening = text.find("<think>", 0, end)
    begin = 0 if opening < 0 else opening + len("<think>")
    return trim(text, (begin, end)), end + len("</think>")


def thinking_before(generation: str, begin: int) -> Chars | None:
    """The thinking that has ended where character ``begin`` is reached; None if there is none."""
    if generation.rfind("</think>") < 0:
        return None
    thinking, end = _thinking(generation)
    return thinking if end <= begin else None


def _narrowed(text: str, begin: int) -> Chars | None:
    """The last <answer>, and the last \\boxed in it (or in the text) from ``begin`` on; None if there is neither."""
    found, end = None, len(text)
    close = text.rfind("</answer>", begin)
    opening = text.rfind("<answer>", begin, close) if close >= 0 else -1
    if opening >= 0:
        found = begin, end = opening + len("<answer>"), close
    return _last_boxed(text, begin, end) or found


def _last_boxed(text: str, begin: int, end: int) -> Chars | None:
    for match in reversed(list(_BOXED.finditer(text, begin, end))):
        close = _closing_brace(text, match.end(), end)
        if close is not None:
            return match.end(), close
    return None


def _closing_brace(text: str, begin: int, end: int) -> int | None:
    depth = 1
    for i in range(begin, end):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return None


def _tag_start(text: str, inside: int) -> int:
    """Start of the tag that ends where the narrowed target begins."""
    return max(text.rfind("<answer>", 0, inside), text.rfind("\\boxed", 0, inside))


def trim(text: str, chars: Chars) -> Chars | None:
    """The range without white space at its ends; None if nothing is left."""
    part = text[chars[0] : chars[1]]
    if not part.strip():
        return None
    begin = chars[0] + len(part) - len(part.lstrip())
    return begin, begin + len(part.strip())


def find_text(text: str, piece: str, name: str) -> Chars:
    """Where ``piece`` is in ``text``. Raises SpanError unless it is there exactly once."""
    count = text.count(piece) if piece.strip() else 0
    if count != 1:
        how = "is empty" if not piece.strip() else f"occurs {count} times in the generation"
        raise SpanError(f"{name} {piece!r} {how}; it must occur once, or pass a Span of token positions")
    begin = text.index(piece)
    return trim(text, (begin, begin + len(piece))) or (begin, begin + len(piece))


def tokens_over(offsets: Sequence[Chars], chars: Chars, name: str) -> tuple[int, int]:
    """Indices ``first:stop`` of the tokens that share a character with ``chars``."""
    hit = [i for i, (a, b) in enumerate(offsets) if a < chars[1] and chars[0] < b]
    if not hit:
        raise SpanError(f"no token covers the characters {chars[0]}:{chars[1]} of the {name}; pass a Span instead")
    return hit[0], hit[-1] + 1

"""Spans of tokens and of characters, and how one becomes the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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


def check_spans(length: int, prompt_length: int, target: Span, reasoning: Span | None, found: str = "") -> None:
    """Raises SpanError unless prompt, reasoning and target follow each other inside ``length`` tokens.

    found: which rules found the spans that the caller did not give, for the message
    """
    if not 0 < prompt_length < length:
        raise SpanError(
            f"the prompt has {prompt_length} of {length} tokens; it needs at least one, and so does the generation"
        )
    for name, span in (("target", target), ("reasoning", reasoning)):
        if span is not None and not (prompt_length <= span.start and span.stop <= length):
            raise SpanError(
                f"{name} {span} is outside the generation {prompt_length}:{length}; "
                f"positions count from the first token of the prompt{found}"
            )
    if reasoning is None:
        return
    if reasoning.overlaps(target):
        raise SpanError(f"reasoning {reasoning} and target {target} overlap; end one where the other begins{found}")
    if reasoning.start > target.start:
        raise SpanError(
            f"reasoning {reasoning} comes after target {target}; only what precedes a target can cause it{found}"
        )


Chars = tuple[int, int]
"""Half-open range of characters."""


def trim(text: str, chars: Chars) -> Chars | None:
    """The range without white space at its ends; None if nothing is left."""
    part = text[chars[0] : chars[1]]
    if not part.strip():
        return None
    begin = chars[0] + len(part) - len(part.lstrip())
    return begin, begin + len(part.strip())


def occurrences(text: str, piece: str, start: int = 0, stop: int | None = None) -> list[int]:
    """Where a piece that is not empty begins in ``text[start:stop]``; places that overlap count each."""
    found = []
    at = text.find(piece, start, stop)
    while at >= 0:
        found.append(at)
        at = text.find(piece, at + 1, stop)
    return found


def find_text(text: str, piece: str, name: str) -> Chars:
    """Where ``piece`` is in ``text``. Raises SpanError unless it is there exactly once."""
    places = occurrences(text, piece) if piece.strip() else []
    if len(places) != 1:
        how = "is empty" if not piece.strip() else f"occurs {len(places)} times in the generation"
        raise SpanError(f"{name} {piece!r} {how}; it must occur once, or pass a Span of token positions")
    begin = places[0]
    return trim(text, (begin, begin + len(piece))) or (begin, begin + len(piece))


def tokens_over(offsets: Sequence[Chars], chars: Chars, name: str) -> tuple[int, int]:
    """Indices ``first:stop`` of the tokens that share a character with ``chars``."""
    hit = [i for i, (a, b) in enumerate(offsets) if a < chars[1] and chars[0] < b]
    if not hit:
        raise SpanError(f"no token covers the characters {chars[0]}:{chars[1]} of the {name}; pass a Span instead")
    return hit[0], hit[-1] + 1

"""How text falls into words, lines, sentences, paragraphs and steps of reasoning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Union

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.spans import Chars

Splitter = Callable[[str], "Iterable[Union[str, Chars]]"]
"""A text -> its pieces in order, as texts or as character ranges. White space between pieces may be left out."""


def split(text: str, splitter: Splitter, name: str) -> list[Chars]:
    """Character ranges that a splitter makes of a text, without white space at their ends.

    name: of the splitter, for errors

    Raises InputError for pieces that overlap, are not in the text, or leave out more than white space.
    """
    ranges, cursor = [], 0
    for piece in splitter(text):
        start, stop = _place(text, piece, cursor, name)
        if text[cursor:start].strip():
            raise InputError(
                f"the splitter {name!r} leaves out {text[cursor:start].strip()!r}; it must cover the text"
            )
        cursor = stop
        inside = text[start:stop]
        if inside.strip():
            start += len(inside) - len(inside.lstrip())
            ranges.append((start, start + len(inside.strip())))
    if text[cursor:].strip():
        raise InputError(f"the splitter {name!r} leaves out {text[cursor:].strip()!r}; it must cover the text")
    return ranges


def _place(text: str, piece: object, cursor: int, name: str) -> Chars:
    if isinstance(piece, str):
        start = text.find(piece, cursor)
        if start < 0:
            raise InputError(f"the splitter {name!r} gave {piece!r}, which does not follow in the text")
        return start, start + len(piece)
    try:
        start, stop = (int(edge) for edge in piece)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise InputError(f"the splitter {name!r} must give texts or (start, stop), got {piece!r}") from None
    if not cursor <= start < stop <= len(text):
        raise InputError(
            f"the splitter {name!r} gave the characters {start}:{stop} after {cursor} of {len(text)}; pieces must "
            "follow each other without overlapping"
        )
    return start, stop


def _words(text: str) -> list[str]:
    return re.findall(r"\S+", text)


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n[^\S\n]*\n", text)


def _segmented(text: str) -> Iterator[str]:
    """What sentencex makes of a text, less what it breaks on: halves of surrogate pairs, and wide spaces after one
    letter (``A\\xa0.``). Each is another character to it, of the same kind."""
    from sentencex import segment

    at = 0
    for piece in segment("en", _HALVES.sub("\N{REPLACEMENT CHARACTER}", _SPACES.sub(" ", text))):
        yield text[at : at + len(piece)]
        at += len(piece)


_HALVES = re.compile("[\ud800-\udfff]")
_SPACES = re.compile(r"[^\S\x00-\x7f]")


def _sentences(text: str) -> Iterator[str]:
    for block in _blocks(text):
        if _FENCE.match(block):
            yield block
        else:
            yield from _mended(_segmented(block))


def _steps(text: str) -> Iterator[str]:
    """Sentences, and the clauses between semicolons."""
    for sentence in _sentences(text):
        yield from [sentence] if _FENCE.match(sentence) else re.split(r"(?<=;)\s", sentence)


_FENCE = re.compile(r"[^\S\n]*(```|~~~)")
_ITEM = re.compile(r"\s*([-*+•]|\(?(\d{1,3}|[A-Za-z])[.)]|#+)\s+")
"""What begins an item of a list, or a heading."""


def _blocks(text: str) -> Iterator[str]:
    """Lines, those together that one sentence may run through; a fenced block of code is one whole."""
    block, fence = "", ""
    for line in text.splitlines(keepends=True):
        mark = _FENCE.match(line)
        if fence:
            block += line
            if mark and mark[1] == fence:
                yield block
                block, fence = "", ""
        elif mark:
            yield from [block] if block else []
            block, fence = line, mark[1]
        elif block and not _runs_on(block, line):
            yield block
            block = line
        else:
            block += line
    if block:
        yield block


def _runs_on(block: str, line: str) -> bool:
    """Whether a line goes on with a sentence that was broken only to fit a page."""
    return bool(block.strip()) and line[:1].islower() and not _ITEM.match(line) and block.rstrip()[-1] not in ".!?:;"


_UNFINISHED = re.compile(r"\b(Eqs?|Figs?|Secs?|Refs?|Tabs?|Nos?|Chap|Vol|pp?|cf|al|vs|approx)\.\s*$")


def _mended(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces with those joined that were cut after a list's number or an abbreviation, or hold no letter or digit."""
    held = ""
    for piece in pieces:
        alone = _ITEM.fullmatch(held) or _UNFINISHED.search(held) or not any(map(str.isalnum, piece))
        if held and not alone:
            yield held
            held = ""
        held += piece
    if held:
        yield held


SPLITTERS: dict[str, Splitter] = {
    "word": _words,
    "line": str.splitlines,
    "sentence": _sentences,
    "paragraph": _paragraphs,
    "step": _steps,
}
"""Splitters by the name of their unit. Sentences are found by sentencex; words are what stands between white space,
which is no word in scripts that write without spaces: pass a splitter of your own there."""


def sorted_apart(ranges: Iterable[Chars], length: int, name: str) -> list[Chars]:
    """Ranges in the order of the text. Raises InputError for one that is empty or outside, and where two overlap."""
    known = sorted(ranges)
    for start, stop in known:
        if not 0 <= start < stop <= length:
            raise InputError(f"{name}: the characters {start}:{stop} are empty or outside the text's {length}")
    for (a, b), (c, d) in pairwise(known):
        if c < b:
            raise InputError(f"{name}: the characters {a}:{b} and {c}:{d} overlap; a token counts for one unit only")
    return known

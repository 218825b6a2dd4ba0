"""What each token is: content, or what explains nothing by itself, such as a template's token or a sink."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import IntEnum

import torch

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.formats import ENDS, FORMATS, TOOL_CALLS
from flashtrace_plugin.report.flow import segments
from flashtrace_plugin.spans import Chars
from flashtrace_plugin.units.contents import offsets_of
from flashtrace_plugin.units.shares import owned_parts


class Kind(IntEnum):
    """Of a token.

    CONTENT:  what somebody wrote, and what the model wrote before the target
    TEMPLATE: what the chat template or the tokenizer added, and tags of the generated text
    SINK:     what draws mass whatever is explained
    TARGET:   what is explained, and what follows it
    """

    CONTENT = 0
    TEMPLATE = 1
    SINK = 2
    TARGET = 3


def kinds_of(attribution: Attribution) -> list[Kind]:
    """The kind of every token."""
    kinds = [Kind.CONTENT] * len(attribution.tokens)
    for i in _in_template(attribution):
        kinds[i] = Kind.TEMPLATE
    for segment in segments(attribution):
        if segment.part == "rest":
            for i in _tags(attribution.tokens[segment.span.slice], segment.span.start):
                kinds[i] = Kind.TEMPLATE
    for i in range(attribution.target.start, len(kinds)):
        kinds[i] = Kind.TARGET if i < attribution.target.stop or kinds[i] is Kind.CONTENT else kinds[i]
    for i in attribution.sinks:
        kinds[i] = Kind.SINK
    return kinds


def _in_template(attribution: Attribution) -> Iterator[int]:
    """Positions of the prompt that lie in none of its contents."""
    if not attribution.contents:
        return
    tokens = attribution.tokens[attribution.prompt.slice]
    contents = [[(c.start, c.stop)] for c in attribution.contents]
    _, owned, _ = owned_parts("".join(tokens), visible_offsets(tokens), contents)
    yield from sorted(set(range(len(tokens))) - set(owned.tolist()))


def visible_offsets(tokens: tuple[str, ...]) -> list[Chars]:
    """Characters of each token; the later bytes of a character have no text of their own, and belong where it does."""
    return [(a if a < b else max(0, a - 1), b) for a, b in offsets_of(tokens)]


_MARKERS = {m for f in FORMATS.values() for m in (f.opening, f.closing, f.answer, f.stop) if m} | set(ENDS)
_MARKERS |= {m for f in TOOL_CALLS.values() for m in (f.opening, f.closing) if m}
_TAG = re.compile("|".join([*map(re.escape, sorted(_MARKERS, key=len, reverse=True)), r"</?[\w:|-]{1,40}>"]))


def _tags(tokens: tuple[str, ...], first: int) -> Iterator[int]:
    """Positions of tokens that a marker covers, and of all where nothing else is said."""
    text = "".join(tokens)
    ranges = [match.span() for match in _TAG.finditer(text)]
    if not any(map(str.isalnum, _TAG.sub("", text))):
        yield from range(first, first + len(tokens))
        return
    _, token, share = owned_parts(text, visible_offsets(tokens), [ranges] if ranges else [])
    whole = torch.zeros(len(tokens), dtype=torch.float64).index_add(0, token, share)
    yield from (first + i for i in (whole > 0.5).nonzero()[:, 0].tolist())

"""Labels of tokens: those of Captum's own results, and short, harmless ones for plots."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from captum.attr._core.llm_attr import _clean_up_pretty_token, _convert_ids_to_pretty_tokens
from torch import Tensor

_WIDTH = 22
"""Longest label of a single token, in characters."""

_CONTEXT = 26
"""Characters of text to either side of a token shown in context."""


def output_labels(tokenizer: Any, ids: Tensor, texts: Sequence[str]) -> list[str]:
    """The labels that Captum's own results give a response, so that results of two methods can be joined.

    ids: [R]; texts: what each token adds to the response. Captum has no result for a response that is cut inside a
    character, nor with a tokenizer that gives no character offsets; then they are the texts, written as Captum does.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each token that is encoded differently
            return _convert_ids_to_pretty_tokens(ids, tokenizer)
    except (IndexError, KeyError, NotImplementedError, TypeError):
        return [_clean_up_pretty_token(text) for text in texts]


def label(token: str, width: int = _WIDTH) -> str:
    """A token on one line: without the space around it, white space and unprintable characters spelled out."""
    return shortened(_one_line(token.strip(" ")), width) or "␣"


def in_context(tokens: Sequence[str], i: int, width: int = _CONTEXT) -> str:
    """Token i in brackets between what stands before and after it."""
    before, after, k = "", "", 1
    while len(before) < width and i - k >= 0:
        before, k = tokens[i - k] + before, k + 1
    k = 1
    while len(after) < width and i + k < len(tokens):
        after, k = after + tokens[i + k], k + 1
    left, right = _one_line(before)[-width:], _one_line(after)[:width]
    lead = " " if tokens[i].startswith(" ") else ""
    return f"{left}{lead}[{label(tokens[i])}]{right}"


def shortened(text: str, width: int) -> str:
    """The text, its middle cut out if it is longer than ``width``."""
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[:half]}…{text[-half:]}"


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)

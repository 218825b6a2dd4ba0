"""Tokenizers that can do what Captum asks of one (its ``TokenizerLike``), and no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashtrace_captum.errors import CaptumInputError


def require(tokenizer: Any, *names: str) -> Any:
    """The tokenizer itself. Raises CaptumInputError for a method that it lacks."""
    for name in names:
        if not callable(getattr(tokenizer, name, None)):
            raise CaptumInputError(
                f"{type(tokenizer).__name__} has no {name}, which Captum's TokenizerLike has; add it, or use a "
                "tokenizer of transformers"
            )
    return tokenizer


def reader(tokenizer: Any) -> Any:
    """The tokenizer with ``batch_decode``, which Captum does not ask for."""
    return tokenizer if hasattr(tokenizer, "batch_decode") else _Reader(tokenizer)


class _Reader:
    """A tokenizer that decodes rows one by one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def batch_decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return [self._tokenizer.decode(torch.tensor(row, dtype=torch.long)) for row in rows]

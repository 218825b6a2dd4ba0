"""From texts and chat messages to token ids and spans, without losing which character belongs to which token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Union

import torch
from torch import Tensor

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.spans import Chars, Span, SpanLike, as_span, find_parts, find_text, thinking_before, tokens_over

Prompt = Union[str, Sequence[Mapping[str, Any]]]
"""A text, or chat messages ``[{"role": "user", "content": "…"}, …]``."""


@dataclass(frozen=True)
class TokenizedText:
    """A prompt and its generation as token ids, with the generation's characters.

    input_ids:     [N]
    prompt_length: number of prompt tokens
    tokens:        N pieces of text; special tokens by their name
    generation:    text of the generation
    offsets:       characters of ``generation`` for each of its tokens
    """

    input_ids: Tensor
    prompt_length: int
    tokens: tuple[str, ...]
    generation: str
    offsets: tuple[Chars, ...]

    def locate(self, target: SpanLike | str | None, reasoning: SpanLike | str | None) -> tuple[Span, Span | None]:
        """Target and reasoning as spans: given as such, as a piece of the generation, or found in it.

        With a target of the user's and no reasoning, the reasoning is the thinking that ends before that target.
        """
        if target is None:
            target_chars, reasoning_chars = find_parts(self.generation)
            where = self._over("target", target_chars)
        else:
            where = self._span("target", target)
            reasoning_chars = thinking_before(self.generation, self._begin(where))
        if reasoning is not None:
            return where, self._span("reasoning", reasoning)
        return where, None if reasoning_chars is None else self._over("reasoning", reasoning_chars)

    def _begin(self, span: Span) -> int:
        """First character of the span; that of the generation for a span that is not inside it."""
        token = span.start - self.prompt_length
        return self.offsets[token][0] if 0 <= token < len(self.offsets) else 0

    def _span(self, name: str, where: SpanLike | str) -> Span:
        if not isinstance(where, str):
            return as_span(name, where)
        return self._over(name, find_text(self.generation, where, name))

    def _over(self, name: str, chars: Chars) -> Span:
        first, stop = tokens_over(self.offsets, chars, name)
        return Span(self.prompt_length + first, self.prompt_length + stop)


def tokenize(tokenizer: Any, prompt: Prompt, generation: str) -> TokenizedText:
    """Token ids as the model saw them when it wrote ``generation`` after ``prompt``.

    The prompt is tokenized by itself, as it was before generating. The generation keeps the tokens it has in
    the joint text if that text begins with the prompt's tokens, and is tokenized by itself otherwise.

    Raises InputError for an empty prompt or generation, or a tokenizer that cannot reproduce the text.
    """
    if not prompt:
        raise InputError("the prompt is empty; there is nothing to attribute to")
    if not isinstance(generation, str):
        raise InputError(
            f"the generation must be a text, got {type(generation).__name__}; token ids go to attribute_ids"
        )
    if not generation.strip():
        raise InputError("the generation is empty; there is nothing to explain")
    text, special = render(tokenizer, prompt)
    prompt_ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not prompt_ids:
        raise InputError(f"the tokenizer makes no token of the prompt {text!r}")
    if not getattr(tokenizer, "is_fast", False):
        return _without_offsets(tokenizer, prompt_ids, generation)
    joint = tokenizer(text + generation, add_special_tokens=special, return_offsets_mapping=True)
    ids, pairs, shift = joint["input_ids"], joint["offset_mapping"], len(text)
    if ids[: len(prompt_ids)] != prompt_ids or len(ids) == len(prompt_ids):
        alone = tokenizer(generation, add_special_tokens=False, return_offsets_mapping=True)
        ids, pairs, shift = prompt_ids + alone["input_ids"], [(0, 0)] * len(prompt_ids) + alone["offset_mapping"], 0
    offsets = tuple((a - shift, b - shift) for a, b in pairs[len(prompt_ids) :])
    offsets, ids = _without_added_suffix(offsets, ids, len(prompt_ids))
    return TokenizedText(torch.tensor(ids), len(prompt_ids), pieces(tokenizer, ids), generation, offsets)


def _without_added_suffix(
    offsets: tuple[Chars, ...], ids: list[int], start: int
) -> tuple[tuple[Chars, ...], list[int]]:
    """Drops what the tokenizer appends of its own, such as an end token: the model did not write it."""
    keep = len(offsets)
    while keep and offsets[keep - 1][1] <= offsets[keep - 1][0]:
        keep -= 1
    return offsets[:keep], ids[: start + keep]


def _without_offsets(tokenizer: Any, prompt_ids: list[int], generation: str) -> TokenizedText:
    ids = prompt_ids + tokenizer(generation, add_special_tokens=False)["input_ids"]
    found = from_ids(tokenizer, torch.tensor(ids), len(prompt_ids))
    if found.generation.strip() != generation.strip():
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets and does not reproduce the generation; "
            "use a fast tokenizer, or attribute_ids with spans of token positions"
        )
    return found


def from_ids(tokenizer: Any, input_ids: Tensor, prompt_length: int) -> TokenizedText:
    """The same from token ids [N]: the generation's text is what its tokens decode to, piece by piece."""
    ids = input_ids.tolist()
    text, offsets = "", []
    for run, added in _runs(tokenizer, ids[max(0, prompt_length - 1) :]):
        # The prompt's last token is read along, because it decides how the first one behind it is written.
        inside = range(max(run.start, min(prompt_length, 1)), run.stop)
        offsets += [(len(text), len(text) + len(added))] * len(inside)
        text += added if inside else ""
    return TokenizedText(input_ids, prompt_length, pieces(tokenizer, ids), text, tuple(offsets))


def render(tokenizer: Any, prompt: Prompt) -> tuple[str, bool]:
    """The prompt's text, and whether the tokenizer still has to add its special tokens."""
    if isinstance(prompt, str):
        return prompt, True
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("chat messages need a tokenizer with a chat template; pass the prompt as a text instead")
    return tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True), False


def pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds after its predecessor, so that spaces are kept whoever marks them.

    Where several tokens make up one character, the first has its text and the others have none.
    """
    parts: list[str] = []
    for run, text in _runs(tokenizer, list(ids)):
        parts += [text] + [""] * (run.stop - run.start - 1)
    return tuple(parts)


_LONGEST_RUN = 16
"""Bytes of a few characters; what is no text after as many tokens never becomes one."""


def _runs(tokenizer: Any, ids: list[int]) -> Iterator[tuple[slice, str]]:
    """Tokens with the text they add. A run holds one token, or those that share a character of several bytes."""
    parts, i = _single(tokenizer, ids), 0
    while i < len(ids):
        stop, text = i + 1, parts[i]
        while _BROKEN in text and stop < min(len(ids), i + _LONGEST_RUN):
            stop += 1
            text = _added(tokenizer, ids[max(0, i - 1) : i], ids[i:stop])
        if _BROKEN in text:
            stop, text = i + 1, parts[i]
        yield slice(i, stop), text
        i = stop


_BROKEN = "\N{REPLACEMENT CHARACTER}"


def _added(tokenizer: Any, before: list[int], run: list[int]) -> str:
    """What a run of tokens adds to the token before it."""
    alone, both, own = tokenizer.batch_decode([before, before + run, run])
    return both[len(alone) :] if both.startswith(alone) else own


def _single(tokenizer: Any, ids: list[int]) -> list[str]:
    """The same for each token by itself, in two calls of the tokenizer."""
    if not ids:
        return []
    alone = tokenizer.batch_decode([[i] for i in ids])
    pairs = tokenizer.batch_decode([list(pair) for pair in pairwise(ids)])
    added = (
        pair[len(before) :] if pair.startswith(before) else own
        for pair, before, own in zip(pairs, alone[:-1], alone[1:], strict=True)
    )
    return [alone[0], *added]

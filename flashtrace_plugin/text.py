"""From texts and chat messages to token ids and spans, without losing which character belongs to which token."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Union

import torch
from torch import Tensor

from flashtrace_plugin.errors import InputError, SpanError
from flashtrace_plugin.formats import (
    ENDS,
    FormatChoice,
    ReasoningFormat,
    chosen_formats,
    find_parts,
    thinking_before,
)
from flashtrace_plugin.messages import UNRENDERED, check_encodable, check_messages, is_media, rendered
from flashtrace_plugin.positions import Positions, as_span
from flashtrace_plugin.spans import Chars, Span, find_text, tokens_over
from flashtrace_plugin.units.contents import Content, in_order, in_visible_text, of_messages
from flashtrace_plugin.units.targets import Locator

Messages = Sequence[Mapping[str, Any]]
"""Chat messages ``[{"role": "user", "content": "…"}, …]``."""


@dataclass(frozen=True)
class Conversation:
    """Chat messages with what else the tokenizer's template is given.

    tools:   schemas or functions that the model may call
    options: other arguments of the template, such as ``{"enable_thinking": False}``
    """

    messages: Messages
    tools: Sequence[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def rendered(self, tokenizer: Any, *, stop: int | None = None, answer: bool = False) -> str:
        """The text of the first ``stop`` messages; with ``answer`` as the model sees it before it writes its own."""
        return tokenizer.apply_chat_template(
            list(self.messages[:stop]),
            tools=None if self.tools is None else list(self.tools),
            tokenize=False,
            add_generation_prompt=answer,
            **self.options,
        )


Where = Union[Positions, str, Locator]
"""What a target or the reasoning can be given as: positions, a piece of the generation, or what finds one."""

Prompt = Union[str, Messages, Conversation]
"""A text, or chat messages."""


@dataclass(frozen=True)
class Located:
    """Target and reasoning of a text, with the rules that found those which were not given; "" for given ones."""

    target: Span
    reasoning: Span | None
    target_rule: str = ""
    reasoning_rule: str = ""

    def __str__(self) -> str:
        """Which rule found what, as an afterthought of a message; empty if all was given."""
        rules = {"target": self.target_rule, "reasoning": self.reasoning_rule}
        told = [f"the {name} was found as {rule}" for name, rule in rules.items() if rule]
        return f" ({'; '.join(told)}; pass the spans to choose others)" if told else ""


@dataclass(frozen=True)
class TokenizedText:
    """A prompt and its generation as token ids, with the generation's characters.

    input_ids:     [N]
    prompt_length: number of prompt tokens
    tokens:        N pieces of text; special tokens by their name
    generation:    text of the generation
    offsets:       characters of ``generation`` for each of its tokens; none where only ids are known
    ends:          ids that end a text or a turn, or pad it: at the end of the generation they are no part of it
    template:      the tokenizer's chat template, which names the reasoning format
    contents:      where the contents of chat messages are in the text of all tokens
    messages:      how many messages the prompt had; 0 for a text
    inputs:        what else the model is given for the prompt: images, as its processor returns them
    """

    input_ids: Tensor
    prompt_length: int
    tokens: tuple[str, ...]
    generation: str
    offsets: tuple[Chars, ...]
    ends: frozenset[int] = frozenset()
    template: Any = None
    contents: tuple[Content, ...] = ()
    messages: int = 0
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def written(self) -> int:
        """Position where what the model wrote ends: tokens that end a text are left out, one token is kept."""
        return written_length(self.input_ids.tolist(), self.prompt_length, self.ends)

    def locate(
        self, target: Where | None, reasoning: Where | None, format: FormatChoice = None
    ) -> tuple[Span, Span | None]:
        """The spans of :meth:`parts` without the rules."""
        found = self.parts(target, reasoning, format)
        return found.target, found.reasoning

    def parts(self, target: Where | None, reasoning: Where | None, format: FormatChoice = None) -> Located:
        """Target and reasoning as spans: given as positions, as a piece of the generation, or found in it.

        With a target of the caller's and no reasoning, the reasoning is the thinking that ends before that target.
        Raises SpanError where nothing is found or a position is outside.
        """
        formats = chosen_formats(format, self.template)
        if target is None:
            found = find_parts(self._visible(), formats)
            where, rule = self._over("target", found.target), found.target_rule
            chars, through = found.reasoning, found.reasoning_rule
        else:
            where, rule = self.span("target", target, formats), ""
            thinking = thinking_before(self.generation, self._begin(where), formats)
            chars, through = (thinking.chars, thinking.rule) if thinking else (None, "")
        if reasoning is not None:
            return Located(where, self.span("reasoning", reasoning, formats), rule)
        return Located(where, self._over("reasoning", chars) if chars else None, rule, through if chars else "")

    def span(self, name: str, where: Where, formats: Iterable[ReasoningFormat] | None = None) -> Span:
        """Positions, a piece of the generation that occurs once, or what a locator finds, as a span.

        formats: of the reasoning, behind which the answer begins for a locator

        Raises SpanError where there is no such place.
        """
        if not isinstance(where, (str, Locator)):
            return as_span(name, where, len(self.input_ids))
        if not self.offsets:
            raise SpanError(f"{name} {where!r} is a text, but without a tokenizer only positions are known")
        if isinstance(where, str):
            return self._over(name, find_text(self.generation, where, name))
        visible, chars = self.answer(formats)
        return self._over(name, where.locate(visible, chars))

    def answer(self, formats: Iterable[ReasoningFormat] | None = None) -> tuple[str, Chars]:
        """The generation without what ends it, and the characters of it that follow the reasoning."""
        visible = self._visible()
        thinking = thinking_before(visible, len(visible), formats)
        return visible, (thinking.begin if thinking else 0, len(visible))

    def _visible(self) -> str:
        """The generation's text without what ends it."""
        if not self.offsets:
            raise SpanError("without a tokenizer no answer can be found; pass target= as positions")
        return self.generation[: self.offsets[self.written - self.prompt_length - 1][1]]

    def _begin(self, span: Span) -> int:
        """First character of the span; that of the generation for a span that is not inside it."""
        token = span.start - self.prompt_length
        return self.offsets[token][0] if 0 <= token < len(self.offsets) else 0

    def _over(self, name: str, chars: Chars) -> Span:
        first, stop = tokens_over(self.offsets, chars, name)
        return Span(self.prompt_length + first, self.prompt_length + stop)


def written_length(ids: Sequence[int], start: int, ends: Collection[int]) -> int:
    """Where the generation from ``start`` on ends, its trailing end tokens left out; at least one token is kept."""
    stop = len(ids)
    while stop > start + 1 and ids[stop - 1] in ends:
        stop -= 1
    return stop


def end_ids(tokenizer: Any, *owners: Any) -> frozenset[int]:
    """Ids that end a text or a turn, and padding: the one rule for where a generation ends.

    tokenizer: its own end and pad tokens, those of known names that it has as special tokens, and what its chat
               template writes after an assistant's message
    owners:    configurations and generation configurations of the model
    """
    found: set[int] = set()
    for owner in (tokenizer, *owners):
        for name in ("eos_token", "pad_token"):
            value = None if _is_unknown(owner, name) else getattr(owner, f"{name}_id", None)
            found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    special = _special_tokens(tokenizer)
    found.update(special[name] for name in (*ENDS, *_turn_ends(tokenizer, special)) if name in special)
    return frozenset(found)


def _is_unknown(owner: Any, name: str) -> bool:
    """Whether a tokenizer's vocabulary lacks this token of its own, whose id is then that of the unknown token.

    TransformerLens gives a tokenizer without an end token one of a name that few vocabularies have.
    """
    unknown = getattr(owner, "unk_token_id", None)
    return unknown is not None and getattr(owner, f"{name}_id") == unknown and getattr(owner, name) != owner.unk_token


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Special and added tokens by their text; a known name inside the ordinary vocabulary is only text."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {str(token.content): i for i, token in added.items()}


_MARK = "\N{REPLACEMENT CHARACTER}answer\N{REPLACEMENT CHARACTER}"


def _turn_ends(tokenizer: Any, special: Mapping[str, int]) -> list[str]:
    """The special tokens with which the chat template closes an assistant's message."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except UNRENDERED:
        return []  # a template with demands of its own; it is used as it is where a prompt is rendered
    after = text.partition(_MARK)[2].strip()
    return [name for name in special if name and after.startswith(name)]


def tokenize(tokenizer: Any, prompt: Prompt, generation: str, ends: frozenset[int] = frozenset()) -> TokenizedText:
    """Token ids as the model saw them when it wrote ``generation`` after ``prompt``.

    ends: ids that end a text, from :func:`end_ids`

    The prompt is tokenized by itself, as it was before generating. The generation keeps the tokens it has in
    the joint text if that text begins with the prompt's tokens, and is tokenized by itself otherwise.

    Raises InputError for an empty prompt or generation, or a tokenizer that cannot reproduce the text.
    """
    if _holds_media(prompt):
        return _with_media(tokenizer, as_conversation(prompt), generation, ends)  # type: ignore[arg-type]
    tokenizer = text_tokenizer(tokenizer)
    text, special = _checked_text(tokenizer, prompt, generation)
    return with_messages(tokenizer, prompt, _tokenized(tokenizer, text, special, generation, ends), text)


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, or that of a processor, with the processor's chat template if it has none of its own."""
    own = getattr(tokenizer, "tokenizer", None)
    if own is None or not hasattr(tokenizer, "apply_chat_template"):
        return tokenizer
    if getattr(own, "chat_template", None) is None and getattr(tokenizer, "chat_template", None):
        own = copy(own)
        own.chat_template = tokenizer.chat_template
    return own


def _with_media(processor: Any, chat: Conversation, generation: str, ends: frozenset[int]) -> TokenizedText:
    """The same for messages that hold images or videos, which a processor turns into tokens and pixels."""
    tokenizer = text_tokenizer(processor)
    check_messages(chat.messages, media=tokenizer is not processor)
    _check_generation(generation)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    try:
        made = dict(processor.apply_chat_template(list(chat.messages), tools=chat.tools, **options, **chat.options))
    except UNRENDERED as error:
        raise InputError(f"the processor cannot make tokens of the messages: {error}") from error
    prompt, mask = made.pop("input_ids")[0], made.pop("attention_mask", None)
    if mask is not None and not bool(mask.all()):
        raise InputError("the processor pads the prompt; pass one that does not")
    written = tokenizer(generation, add_special_tokens=False)["input_ids"]
    found = from_ids(tokenizer, torch.cat([prompt, torch.tensor(written, dtype=prompt.dtype)]), len(prompt), ends)
    contents = in_order(chat.messages, "".join(found.tokens[: len(prompt)]))
    return replace(found, contents=contents, messages=len(chat.messages), inputs=made)


def with_messages(tokenizer: Any, prompt: Prompt, found: TokenizedText, text: str | None = None) -> TokenizedText:
    """The same text with the places of the prompt's messages. text: the prompt as it is rendered, if that is known"""
    if isinstance(prompt, str):
        return found
    chat, written = as_conversation(prompt), render(tokenizer, prompt)[0] if text is None else text
    return replace(found, contents=_contents(tokenizer, chat, written, found), messages=len(chat.messages))


def ids_of_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt by itself."""
    text, special = render(tokenizer, prompt)
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def _holds_media(prompt: Any) -> bool:
    """Whether a prompt is messages of which one has a part that is no text."""
    messages = prompt.messages if isinstance(prompt, Conversation) else prompt
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        return False
    contents = (message.get("content") for message in messages if isinstance(message, Mapping))
    return any(is_media(part) for content in contents if isinstance(content, (list, tuple)) for part in content)


def as_conversation(prompt: Messages | Conversation) -> Conversation:
    """Chat messages as a conversation."""
    return prompt if isinstance(prompt, Conversation) else Conversation(prompt)


def _contents(tokenizer: Any, chat: Conversation, text: str, found: TokenizedText) -> tuple[Content, ...]:
    """Where the messages' contents are in the text of the prompt's tokens."""

    def rendered_or_none(chat: Conversation, **options: Any) -> str | None:
        try:
            return chat.rendered(tokenizer, **options)
        except UNRENDERED:
            return None  # a template that asks for a certain order or end of the messages, or form of their contents

    def first(count: int) -> str | None:
        return rendered_or_none(chat, stop=count)

    def replaced(index: int, content: Any) -> str | None:
        messages = list(chat.messages)
        messages[index] = {**messages[index], "content": content}
        return rendered_or_none(replace(chat, messages=messages), answer=True)

    fast = getattr(tokenizer, "is_fast", False)
    pairs = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"] if fast else []
    contents = of_messages(chat.messages, text, first, replaced)
    return in_visible_text(contents, text, found.tokens[: found.prompt_length], pairs)


def _checked_text(tokenizer: Any, prompt: Prompt, generation: str) -> tuple[str, bool]:
    """What :func:`render` makes of the prompt. Raises InputError where there is nothing to attribute or explain."""
    if not prompt:
        raise InputError("the prompt is empty; there is nothing to attribute to")
    _check_generation(generation)
    return render(tokenizer, prompt)


def _check_generation(generation: Any) -> None:
    """Raises InputError for what is no text that could be explained."""
    if not isinstance(generation, str):
        raise InputError(
            f"the generation must be a text, got {type(generation).__name__}; token ids go to attribute_ids"
        )
    if not generation.strip():
        raise InputError("the generation is empty; there is nothing to explain")
    check_encodable("generation", generation)


def _tokenized(tokenizer: Any, text: str, special: bool, generation: str, ends: frozenset[int]) -> TokenizedText:
    prompt_ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not prompt_ids:
        raise InputError(f"the tokenizer makes no token of the prompt {text!r}")
    if not getattr(tokenizer, "is_fast", False):
        return _without_offsets(tokenizer, prompt_ids, generation, ends)
    joint = tokenizer(text + generation, add_special_tokens=special, return_offsets_mapping=True)
    ids, pairs, shift = joint["input_ids"], joint["offset_mapping"], len(text)
    if ids[: len(prompt_ids)] != prompt_ids or len(ids) == len(prompt_ids):
        alone = tokenizer(generation, add_special_tokens=False, return_offsets_mapping=True)
        ids, pairs, shift = prompt_ids + alone["input_ids"], [(0, 0)] * len(prompt_ids) + alone["offset_mapping"], 0
    offsets = tuple((a - shift, b - shift) for a, b in pairs[len(prompt_ids) :])
    offsets, ids = _without_added_suffix(offsets, ids, len(prompt_ids))
    return TokenizedText(
        *(torch.tensor(ids), len(prompt_ids), pieces(tokenizer, ids), generation, offsets),
        ends=ends,
        template=getattr(tokenizer, "chat_template", None),
    )


def _without_added_suffix(
    offsets: tuple[Chars, ...], ids: list[int], start: int
) -> tuple[tuple[Chars, ...], list[int]]:
    """Drops what the tokenizer appends of its own, such as an end token: the model did not write it."""
    keep = len(offsets)
    while keep and offsets[keep - 1][1] <= offsets[keep - 1][0]:
        keep -= 1
    return offsets[:keep], ids[: start + keep]


def _without_offsets(tokenizer: Any, prompt_ids: list[int], generation: str, ends: frozenset[int]) -> TokenizedText:
    ids = prompt_ids + tokenizer(generation, add_special_tokens=False)["input_ids"]
    found = from_ids(tokenizer, torch.tensor(ids), len(prompt_ids), ends)
    if found.generation.strip() != generation.strip():
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets and does not reproduce the generation; "
            "use a fast tokenizer, or attribute_ids with spans of token positions"
        )
    return found


def from_ids(
    tokenizer: Any, input_ids: Tensor, prompt_length: int, ends: frozenset[int] = frozenset()
) -> TokenizedText:
    """The same from token ids [N]: the generation's text is what its tokens decode to, piece by piece."""
    ids = input_ids.tolist()
    text, offsets = "", []
    for run, added in _runs(tokenizer, ids[max(0, prompt_length - 1) :]):
        # The prompt's last token is read along, because it decides how the first one behind it is written.
        inside = range(max(run.start, min(prompt_length, 1)), run.stop)
        offsets += [(len(text), len(text) + len(added))] * len(inside)
        text += added if inside else ""
    return TokenizedText(
        *(input_ids, prompt_length, pieces(tokenizer, ids), text, tuple(offsets)),
        ends=ends,
        template=getattr(tokenizer, "chat_template", None),
    )


def without_text(input_ids: Tensor, prompt_length: int) -> TokenizedText:
    """The same where there is no tokenizer: tokens are named by their ids, and spans can only be positions."""
    labels = tuple(f"<{i}>" for i in input_ids.tolist())
    return TokenizedText(input_ids, prompt_length, labels, "", ())


def render(tokenizer: Any, prompt: Prompt) -> tuple[str, bool]:
    """The prompt's text, and whether the tokenizer still has to add its special tokens.

    Raises InputError for what is no text and no list of messages, and for messages that the template does not take.
    """
    if isinstance(prompt, str):
        check_encodable("prompt", prompt)
        return prompt, True
    chat = as_conversation(prompt)
    check_messages(chat.messages)
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("chat messages need a tokenizer with a chat template; pass the prompt as a text instead")
    text = rendered(chat.messages, lambda count: chat.rendered(tokenizer, stop=count, answer=True))
    check_encodable("prompt", text)
    return text, False


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

"""A question in plain text whose evidence is known by characters, so that it serves every tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.spans import Chars
from flashtrace_plugin.text import Messages, Prompt, pieces, render


class Written(NamedTuple):
    """Where a right generation has its answers and its reasoning, in characters; reasoning is None without steps."""

    answers: tuple[Chars, ...]
    reasoning: Chars | None


@dataclass(frozen=True)
class TextSample:
    """A prompt, what a right model writes after it, and which characters of the prompt are the evidence.

    task        name of the task
    prompt      a text, or chat messages of which the last is ``text``
    expected    a right generation, with the space or line end that comes first
    pattern     regular expression that a generation is right by, from its first character on; the groups ``answer0``,
                ``answer1`` … are the answers, ``reasoning`` the written steps if there are any
    evidence    for each answer the character ranges of ``text`` that decide it, without closing marks
    question    character range of ``text`` that asks, up to where the model goes on
    parameters  the arguments that the sample was drawn with
    """

    task: str
    prompt: str | Messages
    expected: str
    pattern: str
    evidence: tuple[tuple[Chars, ...], ...]
    question: Chars
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def text(self) -> str:
        """What the character ranges count in: the prompt, or the content of its last message."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]

    @property
    def answers(self) -> tuple[str, ...]:
        """The expected answers, one for each question."""
        found = self.read(self.expected)
        return () if found is None else tuple(self.expected[a:b] for a, b in found.answers)

    @property
    def evidence_text(self) -> tuple[tuple[str, ...], ...]:
        """The evidence of each answer as text."""
        return tuple(tuple(self.text[a:b] for a, b in ranges) for ranges in self.evidence)

    def read(self, generation: str) -> Written | None:
        """Answers and reasoning of a generation that begins with a right answer; None for any other."""
        match = re.match(self.pattern, generation)
        if match is None:
            return None
        names = sorted(name for name in match.groupdict() if name.startswith("answer"))
        reasoning = match.span("reasoning") if "reasoning" in match.groupdict() else None
        return Written(tuple(match.span(name) for name in names), reasoning)

    def for_model(self, tokenizer: Any) -> Prompt:
        """The prompt as a model is given it: a text begins with the tokenizer's begin token, if it has one.

        Attention parks on the first token of a text, which should therefore be neither evidence nor question.
        """
        if not isinstance(self.prompt, str) or not getattr(tokenizer, "bos_token", None):
            return self.prompt
        adds_it = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        return self.prompt if adds_it else tokenizer.bos_token + self.prompt


def join_labelled(body: Sequence[tuple[str, str]]) -> tuple[str, dict[str, Chars]]:
    """(label, sentence) pairs joined by spaces, and where the labelled ones are without their full stop."""
    text, places = "", {}
    for number, (label, sentence) in enumerate(body):
        text += " " if number else ""
        places[label] = (len(text), len(text) + len(sentence) - 1)
        text += sentence
    return text, places


def positions(tokenizer: Any, sample: TextSample, ranges: Iterable[Chars]) -> tuple[int, ...]:
    """Prompt positions of the tokens that share a character with one of the ranges of ``sample.text``, ascending.

    Raises InputError for a range that no token covers and for a tokenizer that does not keep the text.
    """
    text, offsets = prompt_offsets(tokenizer, sample.for_model(tokenizer))
    shift = text.rfind(sample.text)
    if shift < 0:
        raise InputError(f"{type(tokenizer).__name__} changes the text of the prompt; its evidence cannot be found")
    found: set[int] = set()
    for begin, stop in ranges:
        hit = [i for i, (a, b) in enumerate(offsets) if a < stop + shift and begin + shift < b]
        if not hit:
            raise InputError(f"no token covers the characters {begin}:{stop} of the prompt of {len(sample.text)}")
        found.update(hit)
    return tuple(sorted(found))


def prompt_offsets(tokenizer: Any, prompt: Prompt) -> tuple[str, Sequence[Chars]]:
    """The rendered prompt, and the characters of each of its tokens."""
    text, special = render(tokenizer, prompt)
    if getattr(tokenizer, "is_fast", False):
        return text, tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)["offset_mapping"]
    parts = pieces(tokenizer, tokenizer(text, add_special_tokens=special)["input_ids"])
    offsets, begin = [], 0
    for part in parts:
        offsets.append((begin, begin + len(part)))
        begin += len(part)
    return "".join(parts), offsets

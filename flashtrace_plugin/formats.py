"""How models write their reasoning, their answers and their tool calls: tables, and one search that reads them.

A format is a line of a table. To add one for this process, :func:`register_format`; for one method or call, pass its
markers: ``FlashTrace(model, tokenizer, format=("<plan>", "</plan>"))``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Union

from flashtrace_plugin.errors import InputError, SpanError
from flashtrace_plugin.spans import Chars, trim


@dataclass(frozen=True)
class ReasoningFormat:
    """Markers around the reasoning of a generated text.

    name:    how options and messages call it
    opening: text that begins the reasoning; a chat template may have put it into the prompt already
    closing: text that ends it
    answer:  text that begins the answer, where something else may stand in between
    stop:    text that ends the answer, where the model goes on to write it
    written: whether the model always writes the opening itself, so that a closing marker alone means nothing
    """

    name: str
    opening: str
    closing: str
    answer: str = ""
    stop: str = ""
    written: bool = False

    def __post_init__(self) -> None:
        if not self.opening or not self.closing or self.opening == self.closing:
            raise InputError(
                f"the reasoning format {self.name!r} never closes: opening {self.opening!r} and closing "
                f"{self.closing!r} must be two different texts that are not empty"
            )

    def __str__(self) -> str:
        return f"{self.opening}…{self.closing}"


FORMATS: dict[str, ReasoningFormat] = {
    entry.name: entry
    for entry in (
        # DeepSeek-R1, Qwen3, QwQ, GLM-4.5, SmolLM3, Phi-4-reasoning, Hunyuan, MiniMax-M2, Nemotron, Ernie 4.5
        ReasoningFormat("think", "<think>", "</think>"),
        # Magistral, Ministral 3
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        # gpt-oss (harmony): channels; commentary and tool calls may stand between analysis and final
        ReasoningFormat(
            "harmony", "<|channel|>analysis<|message|>", "<|end|>", "<|channel|>final<|message|>", "<|return|>", True
        ),
        ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
        # OpenThinker, Sky-T1
        ReasoningFormat(
            "thought", "<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>"
        ),
        # Command A Reasoning
        ReasoningFormat("cohere", "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        ReasoningFormat("apertus", "<|inner_prefix|>", "<|inner_suffix|>"),
        # EXAONE Deep
        ReasoningFormat("exaone", "<thought>", "</thought>"),
        # Granite 3.2
        ReasoningFormat("granite", "Here is my thought process:", "Here is my response:", written=True),
        ReasoningFormat("reasoning", "<reasoning>", "</reasoning>"),
        ReasoningFormat("thinking", "<thinking>", "</thinking>"),
        # Kimi-VL
        ReasoningFormat("kimi", "◁think▷", "◁/think▷"),
    )
}
"""Reasoning formats by name; of several that a text holds, that of the chat template counts, then the order here."""


@dataclass(frozen=True)
class ToolCallFormat:
    """Markers around a tool call in a generated text.

    closing: without one, a call runs to the next or to the end of the text
    channel: whether calls have a channel of their own, which may stand before the answer's
    """

    name: str
    opening: str
    closing: str = ""
    channel: bool = False


TOOL_CALLS: dict[str, ToolCallFormat] = {
    entry.name: entry
    for entry in (
        ToolCallFormat("hermes", "<tool_call>", "</tool_call>"),  # Hermes, Qwen2.5, Qwen3
        ToolCallFormat("mistral", "[TOOL_CALLS]"),
        ToolCallFormat("llama", "<|python_tag|>"),  # Llama 3.1
        ToolCallFormat("harmony", "<|channel|>commentary to=", "<|call|>", True),  # gpt-oss
    )
}
"""Tool-call formats by name."""

ENDS = (
    *("</s>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "[EOS]", "<|eos|>", "<|eot|>"),
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end_of_turn|>", "[|endofturn|]"),
    *("<|END_OF_TURN_TOKEN|>", "<|end|>", "<|return|>", "<|call|>", "<|assistant_end|>"),
    "<|user|>",  # GLM ends its turn by beginning the user's
)
"""Tokens that end a turn or a text, by the names that families give them; a tokenizer's own are added to these."""

FormatChoice = Union[None, str, "tuple[str, str]"]
"""A format by its name, by its two markers, or None to look for all of the table."""


def register_format(entry: ReasoningFormat) -> None:
    """Adds or replaces a reasoning format for this process."""
    FORMATS[entry.name] = entry


def chosen_formats(choice: FormatChoice, chat_template: Any = None) -> list[ReasoningFormat]:
    """The formats to look for, those first that the chat template writes itself. Raises InputError for an unknown."""
    if choice is None:
        template = chat_template if isinstance(chat_template, str) else ""
        return sorted(FORMATS.values(), key=lambda f: f.opening not in template and f.closing not in template)
    if isinstance(choice, str):
        if choice not in FORMATS:
            raise InputError(
                f"format must be one of {', '.join(map(repr, FORMATS))}, or a pair of markers, got {choice!r}"
            )
        return [FORMATS[choice]]
    pair = tuple(choice) if isinstance(choice, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(marker, str) for marker in pair):
        raise InputError(f"format must be the name of a reasoning format or a pair (opening, closing), got {choice!r}")
    return [ReasoningFormat("yours", *pair)]


@dataclass(frozen=True)
class Thinking:
    """Where the reasoning of a text is, and where what follows it begins and ends.

    chars: the reasoning without its markers; None where it is empty or there is none
    begin: first character after it
    end:   where the answer ends
    rule:  the format that found it, for messages; "" without reasoning
    """

    chars: Chars | None
    begin: int
    end: int
    rule: str = ""


@dataclass(frozen=True)
class Parts:
    """Answer and reasoning of a generated text as character ranges, with the rules that found them."""

    target: Chars
    reasoning: Chars | None
    target_rule: str
    reasoning_rule: str


_BOXED = re.compile(r"\\boxed\s*\{")
_ANSWER = ("<answer>", "</answer>")


def find_parts(generation: str, formats: Iterable[ReasoningFormat] | None = None) -> Parts:
    """Where the answer and the reasoning are in a generated text.

    The reasoning is what stands between the markers of a format (the opening one may be part of the prompt), what
    follows is the target. The last ``<answer>…</answer>`` after it, and then the last ``\\boxed{…}``, narrow the
    target; one inside the reasoning does not count. Without a format's markers, what precedes a narrowed target is
    the reasoning; with nothing to go by, all of the generation is the target.

    Raises SpanError when the reasoning does not end or nothing follows it.
    """
    thinking = find_thinking(generation, formats)
    answer, rule = _narrowed(generation, thinking.begin, thinking.end)
    target = trim(generation, answer or (thinking.begin, thinking.end))
    if target is None:
        what = "the answer's tag is empty" if answer else "nothing follows the reasoning"
        raise SpanError(f"{what}, so there is no target; pass target=... to choose one")
    reasoning, through = thinking.chars, thinking.rule
    if answer and thinking.begin == 0:
        reasoning, through = trim(generation, (0, _tag_start(generation, answer[0]))), f"all before {rule}"
    after = f"what follows {thinking.rule}" if thinking.rule else "the whole generation"
    return Parts(target, reasoning, rule or after, through if reasoning else "")


def find_thinking(text: str, formats: Iterable[ReasoningFormat] | None = None) -> Thinking:
    """The reasoning of a text by the first format that it holds. Raises SpanError for one that does not end."""
    entries = list(FORMATS.values() if formats is None else formats)
    for entry in entries:
        found = _closed(text, entry)
        if found is not None:
            return found
    for entry in entries:
        if entry.opening in text:
            raise SpanError(
                f"the generation has {entry.opening} but no {_missing(text, entry)}: the thinking was cut off before "
                "an answer; generate more tokens, or pass target=... and reasoning=..."
            )
    return Thinking(None, 0, len(text))


def thinking_before(generation: str, begin: int, formats: Iterable[ReasoningFormat] | None = None) -> Thinking | None:
    """The reasoning that has ended where character ``begin`` is reached; None if there is none."""
    for entry in FORMATS.values() if formats is None else formats:
        found = _closed(generation, entry)
        if found is not None and found.begin <= begin:
            return found
    return None


def find_tool_calls(generation: str, begin: int = 0) -> list[tuple[str, Chars]]:
    """Name of the format and characters of every tool call of a text, markers left out, in the order of the text.

    begin: first character of the answer; what looks like a call in the thinking before it was not made
    """
    found: list[tuple[str, Chars]] = []
    every = (call for entry in TOOL_CALLS.values() for call in _calls(generation, entry, begin))
    for name, chars in sorted(every, key=lambda call: call[1]):
        if not found or found[-1][1][1] <= chars[0]:  # else its marker is inside an argument
            found.append((name, chars))
    return found


def _calls(text: str, entry: ToolCallFormat, answer: int) -> Iterator[tuple[str, Chars]]:
    begin = text.find(entry.opening, 0 if entry.channel else answer)
    while begin >= 0:
        begin += len(entry.opening)
        end = text.find(entry.closing or entry.opening, begin)
        inside = trim(text, (begin, len(text) if end < 0 else end))
        if inside is not None:
            yield entry.name, inside
        begin = text.find(entry.opening, begin if end < 0 else end)


def _closed(text: str, entry: ReasoningFormat) -> Thinking | None:
    """The reasoning between a format's markers, None unless it ends and the answer has begun."""
    answer = text.rfind(entry.answer) if entry.answer else len(text)
    close = text.rfind(entry.closing, 0, answer) if answer >= 0 else -1
    if close < 0:
        return None
    opening = text.find(entry.opening, 0, close)
    if opening < 0 and entry.written:
        return None
    begin = 0 if opening < 0 else opening + len(entry.opening)
    after = answer + len(entry.answer) if entry.answer else close + len(entry.closing)
    stop = text.find(entry.stop, after) if entry.stop else -1
    return Thinking(trim(text, (begin, close)), after, len(text) if stop < 0 else stop, str(entry))


def _missing(text: str, entry: ReasoningFormat) -> str:
    closes = text.find(entry.closing, text.find(entry.opening)) >= 0
    return entry.answer if entry.answer and closes else entry.closing


def _narrowed(text: str, begin: int, end: int) -> tuple[Chars | None, str]:
    """The last <answer>, and the last \\boxed in it (or in the text) from ``begin`` on; None if there is neither."""
    found, rule = None, ""
    close = text.rfind(_ANSWER[1], begin, end)
    opening = text.rfind(_ANSWER[0], begin, close) if close >= 0 else -1
    if opening >= 0:
        found = begin, end = opening + len(_ANSWER[0]), close
        rule = "…".join(_ANSWER)
    boxed = _last_boxed(text, begin, end)
    return (boxed, "\\boxed{…}") if boxed else (found, rule)


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
    return max(text.rfind(_ANSWER[0], 0, inside), text.rfind("\\boxed", 0, inside))

"""From Inseq's texts and options to token ids and spans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from inseq.attr.feat.attribution_utils import check_attribute_positions
from inseq.utils.typing import TokenWithId
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.spans import Span
from flashtrace_plugin.text import from_ids


@dataclass(frozen=True)
class Where:
    """What the user chose to explain in one input.

    target, reasoning: a span, a piece of the generation, or None
    start, stop:       Inseq's ``attr_pos_start`` and ``attr_pos_end``, another way to give the target
    """

    target: Span | str | None = None
    reasoning: Span | str | None = None
    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True)
class Input:
    """A prompt and its generation as the model saw them.

    input_ids:     [N]
    prompt_length: number of prompt tokens
    tokens:        N labels with ids, as Inseq shows them
    host:          Inseq's model
    """

    input_ids: Tensor
    prompt_length: int
    tokens: list[TokenWithId]
    host: Any

    @property
    def written(self) -> int:
        """Number of tokens up to where the generation ends; at least one of it is kept."""
        ids, end, ends = self.input_ids.tolist(), len(self.input_ids), _end_ids(self.host)
        while end > self.prompt_length + 1 and ids[end - 1] in ends:
            end -= 1
        return end

    def locate(self, where: Where) -> tuple[Span, Span | None]:
        """Target and reasoning as spans, given or found.

        End-of-sequence tokens are part of a target only when a span or ``attr_pos_end`` includes them.
        """
        target: Span | str | None = where.target
        if (where.start, where.stop) != (None, None):
            if target is not None:
                raise InputError(
                    f"target={target!r} and attr_pos_start={where.start}, attr_pos_end={where.stop} are two ways to "
                    "choose the target; use one"
                )
            target = self.between(where.start, where.stop)
        text = from_ids(self.host.tokenizer, self.input_ids[: self.written], self.prompt_length)
        return text.locate(target, where.reasoning)

    def between(self, start: int | None, stop: int | None) -> Span:
        """The span between Inseq's positions, which may be negative; prompt tokens are no targets."""
        start = self.prompt_length if start is None else start
        stop = self.written if stop is None else stop
        start, stop = check_attribute_positions(len(self.input_ids), start, stop)
        return Span(max(start, self.prompt_length), stop)

    def attribute(self, method: Method, target: Span, reasoning: Span | None) -> Attribution:
        """Runs a method on the ids."""
        return method.attribute_ids(
            self.input_ids, prompt_length=self.prompt_length, target=target, reasoning=reasoning
        )


def encode(host: Any, prompt: str, text: str, *, special: bool = True, clean: bool = False) -> Input:
    """Token ids of a prompt and of the text that begins with it.

    host:    Inseq's model
    special: whether the tokenizer adds its special tokens
    clean:   whether labels are cleaned of the tokenizer's marks

    The prompt's tokens are those it had before the generation existed, also where the joint text would be cut
    differently. Nothing is truncated: a text that is too long for the model is refused when it is run.
    """
    prompt_ids, ids = _ids(host, prompt, special), _ids(host, text, special)
    if ids[: len(prompt_ids)] != prompt_ids:
        ids = prompt_ids + _ids(host, text[len(prompt) :], False)
    if len(ids) <= len(prompt_ids):
        raise InputError(f"nothing follows the prompt {prompt!r}; generated texts hold the prompt and what follows it")
    labels = host.convert_ids_to_tokens(torch.tensor(ids), skip_special_tokens=False)
    if clean:
        labels = host.clean_tokens(labels)
    tokens = [TokenWithId(label, i) for label, i in zip(labels, ids, strict=True)]
    return Input(torch.tensor(ids), len(prompt_ids), tokens, host)


def _ids(host: Any, text: str, special: bool) -> list[int]:
    """As Inseq encodes one text: a second beginning-of-sequence token, from a chat template, is dropped."""
    ids = host.tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == host.bos_token_id else ids


def _end_ids(host: Any) -> set[int]:
    found: set[int] = set()
    for owner in (host.tokenizer, host.model.config, getattr(host.model, "generation_config", None)):
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(owner, name, None)
            found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found


def plain(value: Any) -> Any:
    """An option as JSON has it, so that a saved result equals the one it was saved from."""
    if isinstance(value, Span):
        return [value.start, value.stop]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def split_options(options: dict[str, Any], n: int, start: int | None, stop: int | None) -> list[Where]:
    """Takes target and reasoning out of the options: what to explain in each of n inputs."""
    target, reasoning = (_each(name, options.pop(name, None), n) for name in ("target", "reasoning"))
    return [Where(t, r, start, stop) for t, r in zip(target, reasoning, strict=True)]


def _each(name: str, value: Any, n: int) -> list[Span | str | None]:
    """One for each of n inputs: the same span or piece of text for all of them, or a list with n entries."""
    if not isinstance(value, list) or _is_pair(value):
        return [_span(name, value)] * n
    if len(value) != n:
        raise InputError(f"{name} has {len(value)} entries for {n} inputs; give one for all, or one for each")
    return [_span(name, item) for item in value]


def _span(name: str, value: Any) -> Span | str | None:
    if value is None or isinstance(value, str):
        return value
    if _is_pair(value):
        return Span(*value)
    raise InputError(f"{name} must be a span [start, stop] of token positions or a piece of the text, got {value!r}")


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(i) is int for i in value)

"""From Inseq's texts and arguments to token ids and to what is explained in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from inseq.attr.feat.attribution_utils import check_attribute_positions
from inseq.utils.typing import TokenWithId

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.positions import Positions
from flashtrace_plugin.spans import Span
from flashtrace_plugin.text import TokenizedText


@dataclass(frozen=True)
class Wanted:
    """What the user chose to explain in one input.

    target, reasoning: as :meth:`~flashtrace_plugin.methods.base.Method.attribute_text` takes them
    start, stop:       Inseq's ``attr_pos_start`` and ``attr_pos_end``, another way to give the target
    """

    target: Positions | str | None = None
    reasoning: Positions | str | None = None
    start: int | None = None
    stop: int | None = None

    def chosen(self, text: TokenizedText) -> Positions | str | None:
        """The target, given in either way; None if it is to be found."""
        if self.start is None and self.stop is None:
            return self.target
        if self.target is not None:
            raise InputError(
                f"target={self.target!r} and attr_pos_start={self.start}, attr_pos_end={self.stop} are two ways to "
                "choose the target; use one"
            )
        return self.between(text)

    def between(self, text: TokenizedText) -> Span:
        """The span between Inseq's positions, by default all that was written; prompt tokens are no targets.

        Tokens that end the text are part of it only when ``attr_pos_end`` includes them.
        """
        start = text.prompt_length if self.start is None else self.start
        stop = text.written if self.stop is None else self.stop
        start, stop = check_attribute_positions(len(text.input_ids), start, stop)
        return Span(max(start, text.prompt_length), stop)


def wanted(target: Any, reasoning: Any, n: int, start: int | None, stop: int | None) -> list[Wanted]:
    """What to explain in each of n inputs. Raises InputError for lists of another length."""
    columns = _each("target", target, n), _each("reasoning", reasoning, n)
    return [Wanted(t, r, start, stop) for t, r in zip(*columns, strict=True)]


def _each(name: str, value: Any, n: int) -> list[Any]:
    """One for each of n inputs: a list with n entries, or the same for all; a pair of numbers is one span."""
    listed = isinstance(value, (list, tuple))
    if not listed or (len(value) == 2 and all(hasattr(part, "__index__") for part in value)):
        return [value] * n
    if len(value) != n:
        raise InputError(f"{name} has {len(value)} entries for {n} inputs; give one for all, or one for each")
    return list(value)


def checked_texts(sources: str | list[str], targets: str | list[str]) -> tuple[list[str], list[str]]:
    """Prompts and texts as lists. Raises InputError unless there is one text for each prompt."""
    prompts, texts = ([one] if isinstance(one, str) else one for one in (sources, targets))
    if not prompts:
        raise InputError("no texts were given; pass a prompt, and the same with its generation, or a list of each")
    if len(prompts) != len(texts):
        raise InputError(
            f"{len(texts)} generated texts for {len(prompts)} prompt{'s' * (len(prompts) > 1)}: num_return_sequences "
            "must be 1 here; generate them by model.generate and pass each text with its prompt"
        )
    return prompts, texts


def encode(host: Any, prompt: str, text: str, special: bool = True) -> tuple[list[int], int]:
    """Token ids of a text that begins with a prompt, and how many are the prompt's.

    host:    Inseq's model
    special: whether the tokenizer adds its special tokens

    The prompt's tokens are those it had before the generation existed, also where the joint text would be cut
    differently. Nothing is truncated: a text that is too long for the model is refused when it is run.
    """
    prompt_ids, ids = _ids(host, prompt, special), _ids(host, text, special)
    if ids[: len(prompt_ids)] != prompt_ids:
        ids = prompt_ids + _ids(host, text[len(prompt) :], False)
    if len(ids) <= len(prompt_ids):
        raise InputError(f"nothing follows the prompt {prompt!r}; generated texts hold the prompt and what follows it")
    return ids, len(prompt_ids)


def _ids(host: Any, text: str, special: bool) -> list[int]:
    """As Inseq encodes one text: a second beginning-of-sequence token, from a chat template, is dropped."""
    ids = host.tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == host.bos_token_id else ids


def labelled(host: Any, ids: Iterable[int], clean: bool = False) -> list[TokenWithId]:
    """The tokens as Inseq shows them, with ids; ``clean`` takes the tokenizer's marks away."""
    ids = list(ids)
    labels = host.convert_ids_to_tokens(torch.tensor(ids), skip_special_tokens=False)
    return [TokenWithId(*pair) for pair in zip(host.clean_tokens(labels) if clean else labels, ids, strict=True)]

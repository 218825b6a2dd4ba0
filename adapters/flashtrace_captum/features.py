"""From scores of prompt tokens to the features of Captum's inputs: tokens, or the slots of a template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from typing import Any, Union

import torch
from captum.attr import TextTemplateInput, TextTokenInput
from torch import Tensor

from flashtrace_captum.errors import CaptumInputError, TemplateError
from flashtrace_captum.tokenizers import reader
from flashtrace_plugin.spans import Chars
from flashtrace_plugin.text import pieces
from flashtrace_plugin.units.shares import token_shares

TextInput = Union[TextTokenInput, TextTemplateInput]

_OPEN, _CLOSE = 0xF0000, 0x100000
"""Private-use characters that mark where a slot's value begins and ends in the filled template: _OPEN + slot."""
_MAX_SLOTS = 0xFFFD


@dataclass(frozen=True)
class Features:
    """The features of an input over its P prompt tokens.

    prompt_ids: [P]
    names:      label of each feature, as Captum has it
    texts:      readable text of each feature
    covered:    [P]   share of each token that belongs to some feature; the rest of its score is unassigned
    collect:    scores [..., P] -> [..., features]
    """

    prompt_ids: Tensor
    names: list[str]
    texts: list[str]
    covered: Tensor
    collect: Callable[[Tensor], Tensor]


def features_of(inp: TextInput, tokenizer: Any) -> Features:
    """Reads Captum's input. Raises TemplateError for a slot that cannot be traced, CaptumInputError otherwise."""
    if isinstance(inp, TextTokenInput):
        return _token_features(inp, tokenizer)
    if isinstance(inp, TextTemplateInput):
        return _template_features(inp, tokenizer)
    raise CaptumInputError(f"inp must be a TextTokenInput or a TextTemplateInput, got {type(inp).__name__}")


def _token_features(inp: TextTokenInput, tokenizer: Any) -> Features:
    ids = inp.to_model_input()[0].cpu()
    kept = torch.ones(len(ids), dtype=torch.bool) if inp.itp_mask is None else inp.itp_mask[0].cpu()
    texts = list(compress(pieces(reader(tokenizer), ids.tolist()), kept.tolist()))
    return Features(ids, list(inp.values), texts, kept.float(), lambda scores: scores[..., kept])


def _template_features(inp: TextTemplateInput, tokenizer: Any) -> Features:
    text, slots = _slot_characters(inp)
    if not getattr(tokenizer, "is_fast", False):
        raise TemplateError(
            f"{type(tokenizer).__name__} gives no character offsets, which tell the tokens of a slot; "
            "use a fast tokenizer, or a TextTokenInput"
        )
    encoded = encode_prompt(tokenizer, text, return_offsets_mapping=True)
    shares = token_shares(text, encoded["offset_mapping"], slots)
    groups = torch.arange(inp.n_features) if inp.mask is None else torch.tensor(inp.formatted_mask)

    def collect(scores: Tensor) -> Tensor:
        by_slot = scores @ shares.T
        by_group = by_slot.new_zeros(*by_slot.shape[:-1], inp.n_itp_features).index_add(-1, groups, by_slot)
        return inp.format_attr(by_group.reshape(-1, inp.n_itp_features)).reshape(*by_slot.shape)

    values = list(inp.values)
    return Features(torch.tensor(encoded["input_ids"]), values, values, shares.sum(0), collect)


def encode_prompt(tokenizer: Any, text: str, **options: Any) -> Any:
    """The tokens of a filled template. Where a chat template wrote the first special token, none is added again."""
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=special, **options)


def _slot_characters(inp: TextTemplateInput) -> tuple[str, list[list[Chars]]]:
    """The filled template, and for each slot the character ranges it fills, several where it is repeated.

    Every value is wrapped in two characters of its own, the template is filled, and the characters are taken out
    again. Raises TemplateError unless the text is then what Captum gives the model.
    """
    text = inp.to_model_input()
    if len(inp.values) > _MAX_SLOTS:
        raise TemplateError(f"the template has {len(inp.values)} slots, at most {_MAX_SLOTS} can be traced")
    if any(ord(char) >= _OPEN for char in text):
        raise TemplateError("the text holds characters of Unicode's private planes, which mark the slots; remove them")
    marked = [_marked(i, value) for i, value in enumerate(inp.values)]
    names = dict(zip(inp.dict_keys, marked, strict=True)) if inp.dict_keys else {}
    filled = inp.format_fn(**names) if names else inp.format_fn(*marked)
    found, slots = _take_out(filled, len(inp.values))
    if found != text:
        raise TemplateError(
            "the template changes its values (by a width, a cut or an order), so their tokens cannot be told; "
            "format the values first and fill them in as they are"
        )
    return text, slots


def _marked(slot: int, value: str) -> str:
    """An empty value stays empty, because templates leave such values out."""
    return f"{chr(_OPEN + slot)}{value}{chr(_CLOSE + slot)}" if value else value


def _take_out(filled: str, slots: int) -> tuple[str, list[list[Chars]]]:
    """The text without its marks, and the ranges between them."""
    plain: list[str] = []
    opened: dict[int, int] = {}
    ranges: list[list[Chars]] = [[] for _ in range(slots)]
    for char in filled:
        code = ord(char)
        if code < _OPEN:
            plain.append(char)
        elif code < _CLOSE:
            opened[code - _OPEN] = len(plain)
        elif code - _CLOSE in opened:
            ranges[code - _CLOSE].append((opened.pop(code - _CLOSE), len(plain)))
    if opened:
        raise TemplateError(f"the template cuts the value of slot {min(opened)}; fill values in as they are")
    return "".join(plain), ranges

"""A ``TextTokenInput`` that is built from token ids or chat messages, so that nothing is tokenized twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from captum.attr import TextTokenInput
from torch import Tensor

from flashtrace_captum.errors import CaptumInputError
from flashtrace_captum.tokenizers import require
from flashtrace_plugin.text import render


class TokenIdsInput(TextTokenInput):
    """Captum's token input for a prompt that is already token ids.

    Captum's own class takes a text and always adds the tokenizer's special tokens, twice if a chat template wrote
    them before. This one passes wherever Captum takes a ``TextTokenInput``, with the same presence mask, baselines and
    labels.

    input_ids:   [N] or [1, N], or a list of ids
    baselines:   id or text of the token put in the place of an absent one; by default the pad or end token
    skip_tokens: ids or texts of tokens that are no feature, wherever they occur
    """

    messages: Sequence[Mapping[str, Any]] | None = None
    """The chat messages that the prompt was made of."""

    def __init__(
        self,
        input_ids: Tensor | Sequence[int],
        tokenizer: Any,
        baselines: int | str | None = None,
        skip_tokens: Sequence[int] | Sequence[str] | None = None,
    ) -> None:
        ids = _row(input_ids)
        skipped = {_token_id(tokenizer, token) for token in skip_tokens or ()}
        kept = torch.tensor([[i not in skipped for i in ids[0].tolist()]])
        if not bool(kept.any()):
            raise CaptumInputError(f"skip_tokens leaves none of {ids.shape[1]} tokens to attribute to; skip fewer")
        self.tokenizer = tokenizer
        self.inp_tensor = ids
        self.itp_tensor = ids[kept][None]
        self.itp_mask = kept if skipped else None
        self.skip_tokens = sorted(skipped) or None
        self.values = require(tokenizer, "convert_ids_to_tokens").convert_ids_to_tokens(self.itp_tensor[0].tolist())
        self.n_itp_features = len(self.values)
        self.baselines = _token_id(tokenizer, _default_baseline(tokenizer) if baselines is None else baselines)

    @classmethod
    def from_messages(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        baselines: int | str | None = None,
        skip_tokens: Sequence[int] | Sequence[str] | None = None,
    ) -> TokenIdsInput:
        """The prompt of chat messages, through the tokenizer's template and ready for the assistant's turn."""
        text, special = render(tokenizer, messages)
        made = cls(tokenizer(text, add_special_tokens=special)["input_ids"], tokenizer, baselines, skip_tokens)
        made.messages = messages
        return made


def _row(input_ids: Tensor | Sequence[int]) -> Tensor:
    """The ids as [1, N] on the CPU, where Captum keeps them."""
    ids = torch.as_tensor(input_ids).detach().cpu()
    if ids.is_floating_point() or ids.numel() == 0 or ids.numel() != ids.shape[-1]:
        raise CaptumInputError(
            f"input_ids must be the token ids of one prompt, [N] or [1, N], got {ids.dtype} of shape {list(ids.shape)}"
        )
    return ids.reshape(1, -1).long()


def _token_id(tokenizer: Any, token: int | str) -> int:
    if isinstance(token, int):
        return token
    found = require(tokenizer, "convert_tokens_to_ids").convert_tokens_to_ids(token)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if found is None or (found == unknown and token != tokenizer.unk_token):
        raise CaptumInputError(
            f"the tokenizer has no token {token!r}; pass its id, or its text as the vocabulary has it"
        )
    return int(found)


def _default_baseline(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise CaptumInputError("the tokenizer has neither a pad nor an end token; pass the id to use as baselines=")

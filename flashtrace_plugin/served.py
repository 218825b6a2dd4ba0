"""What a model server answered, as the token ids that the model read and wrote; see docs/served.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.text import Prompt, TokenizedText, end_ids, from_ids, ids_of_prompt, tokenize, with_messages


def read_response(
    tokenizer: Any, response: Mapping[str, Any], prompt: Prompt | None = None, *, choice: int = 0
) -> TokenizedText:
    """A response of an OpenAI-compatible server as a text whose tokens are those that the server's model had.

    tokenizer: of the same model
    response:  of chat/completions or completions, as its JSON: with vLLM's ``prompt_token_ids`` and ``token_ids``
               (the request says ``return_token_ids``), or with ``logprobs``
    prompt:    what was asked, with tools and options of the template as a
               :class:`~flashtrace_plugin.text.Conversation`; not needed where the server gives the prompt's ids, but
               only with it messages can be told apart
    choice:    which of several answers
    result:    for ``method.attribute_text``; ``attribute_ids`` takes its ``input_ids`` and ``prompt_length``

    Raises InputError for a response without ids and ``logprobs``, and where this tokenizer reads or writes prompt or
    answer otherwise than the server did: which token, and what each of them has.
    """
    one = _choice(response, choice)
    asked = _served_ids(response, one, "prompt_token_ids")
    if asked is None and prompt is None:
        raise InputError("the response has no prompt_token_ids; pass prompt=..., or ask vLLM for return_token_ids")
    ours = None if prompt is None else ids_of_prompt(tokenizer, prompt)
    if asked is None or ours is None:
        _check_count(response, ours)
    else:
        _check_prompt(tokenizer, asked, ours)
    written, pieces = _served_ids(response, one, "token_ids"), _pieces(one)
    if written is None and not pieces:
        raise InputError(
            "the response has neither token_ids nor logprobs, so which tokens the model wrote is not known; send the "
            'request with "logprobs": true, or with "return_token_ids": true to vLLM'
        )
    if written is None:
        written = _numbered(pieces) or _ids_of_pieces(tokenizer, asked, prompt, pieces)
    if not written:
        raise InputError("the server's answer has no tokens; there is nothing to explain")
    start = asked if asked is not None else ours or []
    _check_known(tokenizer, [*start, *written])
    found = from_ids(tokenizer, torch.tensor([*start, *written]), len(start), end_ids(tokenizer))
    _check_written(found, one, pieces)
    return found if prompt is None else with_messages(tokenizer, prompt, found)


def _choice(response: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """One answer of the response. Raises InputError where there is none."""
    choices = response.get("choices") if isinstance(response, Mapping) else None
    if not isinstance(choices, Sequence) or not choices:
        raise InputError(
            "the response has no choices; pass the JSON of a chat/completions or completions response as a "
            "dictionary, such as response.model_dump(); streamed chunks must be put together first"
        )
    if not isinstance(index, int) or not 0 <= index < len(choices):
        raise InputError(f"the response has {len(choices)} choices, counted from 0; there is no choice {index!r}")
    return choices[index]


def _served_ids(response: Mapping[str, Any], choice: Mapping[str, Any], name: str) -> list[int] | None:
    """vLLM has a prompt's ids at the response (chat) or at the choice. Raises InputError for what are no ids."""
    ids = choice.get(name) or (response.get(name) if name == "prompt_token_ids" else None)
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise InputError(f"{name} of the response must be a list of token ids, got {str(ids)[:60]}")
    return ids


def _check_count(response: Mapping[str, Any], ours: Sequence[int] | None) -> None:
    """All that is known of a prompt without its ids is how many there were."""
    counted = (response.get("usage") or {}).get("prompt_tokens")
    if ours is not None and counted is not None and counted != len(ours):
        raise InputError(
            f"the server counted {counted} prompt tokens, here the prompt has {len(ours)}. {_REASONS}; with "
            '"return_token_ids": true vLLM tells which they are'
        )


_REASONS = (
    "Reasons are another tokenizer, a begin-of-text token that one of them adds, another chat template or another "
    "date in it, or tools and template options that were not passed here (Conversation(messages, tools=..., "
    "options=...))"
)


def _check_prompt(tokenizer: Any, served: list[int], ours: list[int]) -> None:
    if served == ours:
        return
    if served[1:] == ours or ours[1:] == served:
        more, less = ("the server", "here") if len(served) > len(ours) else ("here", "the server")
        first = tokenizer.decode([(served if len(served) > len(ours) else ours)[0]])
        raise InputError(
            f"the prompt begins with one more token {first!r} {_at(more)} than {_at(less)}; pass the text with it or "
            "without it as the server read it, or leave prompt= out and go by the server's ids"
        )
    i = next((i for i, (a, b) in enumerate(zip(served, ours)) if a != b), min(len(served), len(ours)))
    raise InputError(
        f"token {i} of the prompt is {_shown(tokenizer, served, i)} at the server and {_shown(tokenizer, ours, i)} "
        f"here, after {tokenizer.decode(ours[max(0, i - 8) : i])!r}. {_REASONS}"
    )


def _at(place: str) -> str:
    return place if place == "here" else f"at {place}"


def _shown(tokenizer: Any, ids: Sequence[int], i: int) -> str:
    return f"{ids[i]} ({tokenizer.decode([ids[i]])!r})" if i < len(ids) else "missing"


def _check_known(tokenizer: Any, ids: Sequence[int]) -> None:
    worst = max(ids)
    if worst >= len(tokenizer):
        raise InputError(
            f"the server has the token id {worst}, this tokenizer has {len(tokenizer)} tokens; it is not that model's"
        )


def _pieces(choice: Mapping[str, Any]) -> list[bytes]:
    """The bytes of each token of the answer as ``logprobs`` tells them; none without logprobs."""
    told = choice.get("logprobs") or {}
    rows = told.get("content") or [{"token": token} for token in told.get("tokens") or []]
    return [_piece(row, i) for i, row in enumerate(rows)]


def _piece(row: Mapping[str, Any], i: int) -> bytes:
    if row.get("bytes") is not None:
        return bytes(row["bytes"])
    token = row.get("token")
    if not isinstance(token, str) or "\N{REPLACEMENT CHARACTER}" in token:
        raise InputError(
            f"token {i} of logprobs is {token!r} without bytes, which is no text; ask for token ids instead"
        )
    return token.encode()


_NUMBERED = re.compile(rb"token_id:(\d+)")


def _numbered(pieces: Sequence[bytes]) -> list[int] | None:
    """vLLM writes ids in the place of the texts where the request says ``return_tokens_as_token_ids``."""
    found = [_NUMBERED.fullmatch(piece) for piece in pieces]
    return [int(one[1]) for one in found if one] if all(found) else None


def _ids_of_pieces(
    tokenizer: Any, asked: list[int] | None, prompt: Prompt | None, pieces: Sequence[bytes]
) -> list[int]:
    """Ids of the answer, from this tokenizer: its tokens must be the server's one by one."""
    try:
        text = b"".join(pieces).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the tokens of the answer are no UTF-8 text ({error}); ask for token ids instead") from error
    if prompt is None:
        prompt = tokenizer.decode(asked)  # only what it ends with matters for how the answer falls into tokens
    found = tokenize(tokenizer, prompt, text)
    ours = [len(text[:stop].encode()) for _, stop in found.offsets]
    for i, (begin, stop) in enumerate(zip([0, *accumulate(map(len, pieces))], _whole_characters(pieces, text))):
        here = ours[i] if i < len(ours) else None
        if here != stop:
            written = found.tokens[found.prompt_length + i] if here is not None else None
            raise InputError(
                f"token {i} of the answer is {pieces[i].decode(errors='replace')!r} at the server and {written!r} "
                f"here, after {text.encode()[max(0, begin - 40) : begin].decode(errors='replace')!r}: it is another "
                "tokenizer, or the model spelled the text in tokens that a tokenizer would not choose; ask for token "
                "ids instead"
            )
    return found.input_ids[found.prompt_length :].tolist()


def _whole_characters(pieces: Sequence[bytes], text: str) -> list[int]:
    """Where each piece ends in bytes; one that ends inside a character counts to that character's end."""
    ends = list(accumulate(len(character.encode()) for character in text))
    stops, at = [], 0
    for stop in accumulate(map(len, pieces)):
        while at < len(ends) - 1 and ends[at] < stop:
            at += 1
        stops.append(ends[at])
    return stops


def _check_written(found: TokenizedText, choice: Mapping[str, Any], pieces: Sequence[bytes]) -> None:
    """Raises InputError where this tokenizer reads the server's ids as another text than the server wrote."""
    message = choice.get("message") or {}
    told = choice.get("text") if isinstance(choice.get("text"), str) else message.get("content")
    if pieces and not _numbered(pieces):
        told = b"".join(pieces).decode(errors="replace")
    if isinstance(told, str) and told.strip() not in found.generation:
        at = next((i for i, (a, b) in enumerate(zip(told, found.generation)) if a != b), 0)
        raise InputError(
            f"the server's ids read {found.generation[at : at + 40]!r} with this tokenizer where the server wrote "
            f"{told[at : at + 40]!r} (character {at}); it is not that model's tokenizer"
        )

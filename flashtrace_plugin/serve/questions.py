"""What the page sends, and what its sample files hold: a text in fields, and which target is asked about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import FlashTraceError, InputError
from flashtrace_plugin.serve.view import shown_text, view
from flashtrace_plugin.spans import Span
from flashtrace_plugin.text import Prompt

FORMAT = "flashtrace-sample/1"
_KINDS = ("text", "document", "user", "system", "assistant")


@dataclass(frozen=True)
class Question:
    """A text and a question about it.

    fields:        kind and text of what the prompt is made of: "text", "document", "user", "system", "assistant"
    chat:          whether they are messages for the chat template; else they follow each other, with an empty line
    generation:    what follows the prompt; not needed where there are ids
    ids:           all token ids, where the model wrote the text or a file holds them
    prompt_length: of these, how many are the prompt's
    where:         the target: token positions, a piece of the generation, or None for the answer
    method:        name of a method
    new_tokens:    most tokens that the model is to write
    full:          whether the whole attribution is wanted, for a file
    """

    fields: tuple[tuple[str, str], ...]
    chat: bool = False
    generation: str = ""
    ids: tuple[int, ...] | None = None
    prompt_length: int = 0
    where: Span | str | None = None
    method: str = "recommended"
    new_tokens: int = 512
    full: bool = False

    @property
    def named_fields(self) -> dict[str, str]:
        """The fields by the names that the page gives them, those without text left out."""
        counts = dict.fromkeys(_KINDS, 0)
        named = {}
        for kind, text in self.fields:
            counts[kind] += 1
            if text.strip():
                named[f"{kind.capitalize()} {counts[kind]}"] = text
        return named


def prompt_of(question: Question) -> Prompt:
    """The prompt of the fields; documents stand in the message of the user that follows or precedes them."""
    texts = [(kind, text) for kind, text in question.fields if text.strip()]
    if not question.chat:
        return "\n\n".join(text for _, text in texts)
    messages: list[dict[str, str]] = []
    for kind, text in texts:
        role = kind if kind in ("system", "assistant") else "user"
        if messages and messages[-1]["role"] == role == "user":
            messages[-1]["content"] += f"\n\n{text}"
        else:
            messages.append({"role": role, "content": text})
    return messages


def read_question(data: Any) -> Question:
    """What the page sent, or a sample file held. Raises InputError for anything else, with the part that is wrong."""
    if not isinstance(data, Mapping):
        raise InputError(f"expected an object with fields, got {type(data).__name__}")
    ids = _optional(data, "ids", _ids)
    return Question(
        fields=_fields(data.get("fields")),
        chat=_of_type(data, "chat", bool, False),
        generation=_of_type(data, "generation", str, ""),
        ids=ids,
        prompt_length=_of_type(data, "prompt_length", int, 0),
        where=_where(data.get("target")),
        method=_of_type(data, "method", str, "recommended"),
        new_tokens=_of_type(data, "new_tokens", int, 512),
        full=_of_type(data, "full", bool, False),
    )


def opened(data: Any, model: str) -> dict[str, Any]:
    """A saved file as the page shows it: a sample, or an attribution with its text.

    model: name of the served one; what another model's attribution says can be seen, but not asked further

    Raises InputError for a file that is neither.
    """
    if isinstance(data, Mapping) and data.get("format") == FORMAT:
        return {"sample": _plain(read_question(data))}
    try:
        found = Attribution.from_dict(data)
        _check_whole(found)
        shown = view(found, {})
        json.dumps(shown, allow_nan=False)
        text, maker = shown_text(found.tokens, found.prompt.stop), str(found.settings.get("model"))[:200]
    except FlashTraceError:
        raise
    except (TypeError, KeyError, AttributeError, IndexError, RuntimeError, OverflowError, ValueError) as error:
        raise InputError(
            f"the file is neither a sample of this page nor a whole saved attribution ({str(error)[:200]})"
        ) from error
    other = {"other_model": None if maker == model else maker}
    return {"sample": _plain(_question_of(found)), "text": text, "found": shown} | other


def _check_whole(found: Attribution) -> None:
    """Raises InputError where the parts of a file contradict each other."""
    n, prompt = len(found.tokens), found.prompt.stop
    lengths = {len(found.token_ids), found.hop_scores.shape[-1], n}
    later = [span.stop for span in (found.target, found.reasoning) if span is not None]
    if len(lengths) > 1 or len(found.scores) != prompt or found.prompt.start or not prompt < max(later) <= n:
        raise InputError(f"the parts of the attribution contradict each other: {n} tokens, {sorted(lengths)} numbers")


def _question_of(found: Attribution) -> Question:
    return Question(
        fields=(("text", "".join(found.tokens[: found.prompt.stop])),),
        generation="".join(found.tokens[found.prompt.stop :]),
        ids=found.token_ids,
        prompt_length=found.prompt.stop,
        where=found.target,
        method=found.method,
    )


def _plain(question: Question) -> dict[str, Any]:
    where = [question.where.start, question.where.stop] if isinstance(question.where, Span) else question.where
    plain = {k: v for k, v in vars(question).items() if k not in ("where", "full")}
    return plain | {"fields": [{"kind": k, "text": t} for k, t in question.fields], "target": where}


def _fields(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"fields must be a list, got {type(value).__name__}")
    for i, one in enumerate(value):
        if not isinstance(one, Mapping) or one.get("kind") not in _KINDS or not isinstance(one.get("text"), str):
            raise InputError(f"field {i} must have a kind ({', '.join(_KINDS)}) and a text")
    return tuple((one["kind"], one["text"]) for one in value)


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(i, int) and 0 <= i < 1 << 31 for i in value):
        raise InputError("ids must be a list of token ids")
    return tuple(value)


def _where(value: Any) -> Span | str | None:
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, list) and len(value) == 2 and all(isinstance(edge, int) for edge in value):
        return Span(*value)
    raise InputError("target must be a piece of the text or two token positions")


def _of_type(data: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = data.get(name, default)
    if type(value) is not kind:
        raise InputError(f"{name} must be {kind.__name__}, got {type(value).__name__}")
    return value


def _optional(data: Mapping[str, Any], name: str, read: Any) -> Any:
    return None if data.get(name) is None else read(data[name])

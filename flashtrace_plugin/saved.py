"""Saved results: JSON that is read back as what was written, or refused with the field that does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from math import inf, isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashtrace_plugin.errors import InputError, SpanError
from flashtrace_plugin.images import ImageTokens
from flashtrace_plugin.spans import Span, check_spans
from flashtrace_plugin.units.contents import Content

_MOST = 2**63 - 1
"""The largest whole number that tensors hold."""
_DEEPEST = 32
"""Levels that a setting may be nested; what methods write has two."""
_UNREADABLE = (TypeError, ValueError, KeyError, RuntimeError, OverflowError)
"""What torch raises for values that are no tensor."""


def read_saved(path: str | Path, writer: str) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError for what is none.

    writer: what writes such files, for messages
    """
    try:
        data = json.loads(Path(path).read_bytes().decode("utf-8"))
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply; expected a file written by {writer}") from error
    except ValueError as error:  # no JSON, no UTF-8, or a number of more digits than Python reads
        raise InputError(f"{path} is not JSON ({error}); expected a file written by {writer}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}; expected a file written by {writer}")
    return data


class Saved:
    """The fields of a saved result. Each is given out in the form that is asked for, or refused with InputError.

    data: as JSON has it
    what: "attribution", …, for messages
    """

    def __init__(self, data: Mapping[str, Any], what: str) -> None:
        self.data, self.what = data, what

    @classmethod
    def opened(cls, data: Mapping[str, Any], what: str, format: str, needed: Iterable[str]) -> Saved:
        """The fields of a result of this format. Raises InputError for another one or a missing field."""
        if data.get("format") != format:
            raise InputError(f"not {what}: format is {short(data.get('format'))}, expected {format!r}")
        noun = what.partition(" ")[2]
        missing = [name for name in needed if name not in data]
        if missing:
            raise InputError(f"the {noun} lacks {', '.join(missing)}; was the file cut off?")
        return cls(data, noun)

    def wrong(self, name: str, why: str) -> InputError:
        """The error for a field, to be raised."""
        return InputError(f"this is not what was saved: {name} of the {self.what} {why}; was it edited?")

    def tensor(
        self, name: str, sizes: Sequence[int | None], dtype: torch.dtype = torch.float32, *, least: float = 0.0
    ) -> Tensor:
        """A tensor of these sizes, None for any, with finite numbers >= ``least``."""
        found = self.numbers(name, self.data[name], dtype)
        if found.dim() != len(sizes) or any(s not in (None, n) for s, n in zip(sizes, found.shape, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in sizes)
            raise self.wrong(name, f"has the sizes {list(found.shape)}, the other fields need [{wanted}]")
        if not bool(found.isfinite().all()) or bool((found < least).any()):
            raise self.wrong(name, f"holds numbers that are not finite{'' if least == -inf else f' or below {least}'}")
        return found

    def numbers(self, name: str, value: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of any sizes from nested lists, nan allowed; one without numbers is written as its shape."""
        try:
            if not isinstance(value, Mapping):
                found = torch.tensor(value, dtype=dtype)
                if bool(found.isinf().any()):
                    raise self.wrong(name, "holds numbers that are not finite")
                return found
            shape = [self.whole(name, size, _MOST) for size in value["shape"]]
            if 0 not in shape:
                raise self.wrong(name, f"has a shape {short(shape)} and no numbers")
            return torch.zeros(shape, dtype=dtype)
        except InputError:
            raise
        except _UNREADABLE as error:
            raise self.wrong(name, f"is no tensor ({' '.join(str(error).split())[:80]})") from error

    def texts(self, name: str, count: int | None = None) -> tuple[str, ...]:
        """So many texts."""
        return tuple(self.text(name, one) for one in self.items(name, count))

    def ids(self, name: str, count: int | None = None, stop: int = _MOST) -> tuple[int, ...]:
        """So many whole numbers below ``stop``."""
        return tuple(self.whole(name, one, stop) for one in self.items(name, count))

    def items(self, name: str, count: int | None = None) -> list[Any]:
        """A list of so many items of any kind."""
        found = self.data[name]
        if not isinstance(found, list):
            raise self.wrong(name, f"is {short(found)}, not a list")
        if count is not None and len(found) != count:
            raise self.wrong(name, f"has {len(found)} items, the other fields need {count}")
        return found

    def span(self, name: str) -> Span | None:
        """A span, or None. Raises InputError for positions that are none."""
        found = self.data[name]
        if found is None:
            return None
        if not isinstance(found, list) or len(found) != 2:
            raise self.wrong(name, f"is {short(found)}, not [start, stop]")
        try:
            return Span(*(self.whole(name, edge) for edge in found))
        except SpanError as error:
            raise self.wrong(name, f"is no span ({error})") from error

    def number(self, name: str, least: float = -inf) -> float:
        """A finite number >= ``least``."""
        found = self.data[name]
        usable = isinstance(found, (int, float)) and not isinstance(found, bool) and abs(found) < 1e308
        if not usable or not isfinite(found) or found < least:
            raise self.wrong(name, f"is {short(found)}, not a finite number{'' if least == -inf else f' >= {least}'}")
        return float(found)

    def whole(self, name: str, value: Any, stop: int = _MOST) -> int:
        """A whole number >= 0 and below ``stop``."""
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < stop:
            bound = "" if stop == _MOST else f" below {stop}"
            raise self.wrong(name, f"holds {short(value)}, not a whole number >= 0{bound}")
        return value

    def text(self, name: str, value: Any) -> str:
        """A text that can be written; half of a surrogate pair cannot."""
        if not isinstance(value, str):
            raise self.wrong(name, f"holds {short(value)}, not a text")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise self.wrong(name, "holds half of a character (a lone surrogate)")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """Values by name."""
        found = self.data[name]
        if not isinstance(found, dict):
            raise self.wrong(name, f"is {short(found)}, not a mapping")
        return {self.text(name, key): value for key, value in found.items()}

    def plain(self, name: str) -> dict[str, Any]:
        """Values by name, none of them nested deeper than settings are."""
        self._check_plain(name, self.data[name], _DEEPEST)
        return self.mapping(name)

    def _check_plain(self, name: str, value: Any, depth: int) -> None:
        if not depth:
            raise self.wrong(name, "is nested too deeply")
        if isinstance(value, str):
            self.text(name, value)
        inside = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        for one in inside:
            self._check_plain(name, one, depth - 1)


def read_spans(saved: Saved, length: int) -> dict[str, Any]:
    """Prompt, reasoning and target of ``length`` tokens, which follow each other."""
    prompt, reasoning, target = (saved.span(name) for name in ("prompt", "reasoning", "target"))
    if prompt is None or target is None or prompt.start:
        raise saved.wrong("target" if target is None else "prompt", "is not where it must be")
    try:
        check_spans(length, prompt.stop, target, reasoning)
    except SpanError as error:
        raise saved.wrong("text", f"is cut wrongly ({error})") from error
    return {"prompt": prompt, "reasoning": reasoning, "target": target}


def read_contents(saved: Saved, length: int) -> dict[str, Any]:
    """Where contents are in ``length`` characters, and the number of messages; earlier versions wrote neither."""
    messages = saved.whole("messages", saved.data.get("messages", 0))
    found = []
    for one in saved.items("contents") if "contents" in saved.data else []:
        if not isinstance(one, dict) or not one.keys() <= {f.name for f in fields(Content)}:
            raise saved.wrong("contents", f"holds {short(one)}, not a content")
        start, stop = (saved.whole("contents", one.get(edge), length + 1) for edge in ("start", "stop"))
        message = one.get("message")
        index = None if message is None else saved.whole("contents", message, messages)
        if stop < start:
            raise saved.wrong("contents", f"holds the range {start}:{stop}")
        found.append(Content(start, stop, saved.text("contents", one.get("role", "")), index))
    return {"contents": tuple(found), "messages": messages}


def read_images(saved: Saved, length: int) -> tuple[ImageTokens, ...]:
    """Where images are among ``length`` tokens of the prompt, which earlier versions did not write."""
    found = []
    for one in saved.items("images") if "images" in saved.data else []:
        if not isinstance(one, dict) or one.keys() != {f.name for f in fields(ImageTokens)}:
            raise saved.wrong("images", f"holds {short(one)}, not an image")
        inside = Saved(one, saved.what)
        places, grid = inside.ids("positions", stop=length), inside.ids("grid")
        if not places or list(places) != sorted(set(places)) or (grid and prod(grid) != len(places)):
            raise saved.wrong("images", f"holds {len(places)} positions for the grid {short(list(grid))}")
        found.append(ImageTokens(saved.text("images", one["kind"]), places, grid))
    return tuple(found)


def short(value: Any) -> str:
    """A value as messages show it, however large it is."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    found = repr(value)
    return found if len(found) <= 60 else f"{found[:57]}…"

"""A result as one line of JSON: its head first, so that a folder is read again without reading its numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.runs.rows import Failure, Row

_FAILURE = "flashtrace-failure/1"
_HEAD = re.compile(rb'\{"row": (\d+), "digest": "([0-9a-f]{16})", "format": "([^"]+)"')


@dataclass(frozen=True)
class LineHead:
    """What stands at the beginning of a line."""

    number: int
    digest: str
    failed: bool


def head_of(line: bytes) -> LineHead | None:
    """The head of a line; None where it is no result's."""
    found = _HEAD.match(line)
    return found and LineHead(int(found[1]), found[2].decode(), found[3] == _FAILURE.encode())


def line_of_result(row: Row, found: Attribution, more: dict[str, Any]) -> bytes:
    """The line of a row that was explained. more: what else is known of it"""
    data = found.to_dict()
    data |= {name: _shortest(value) for name, value in vars(found).items() if isinstance(value, Tensor)}
    data["components"] = {name: _shortest(value) for name, value in found.components.items()}
    return _line({"row": row.number, "digest": row.digest, "format": data["format"], "id": row.id} | data | more)


def line_of_failure(row: Failure) -> bytes:
    """The line of a row that was not."""
    head = {"row": row.number, "digest": row.digest, "format": _FAILURE, "id": row.id}
    return _line(head | {"error": row.error, "message": row.message})


def _line(data: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(data, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can name and UTF-8 cannot write
        return json.dumps(data).encode() + b"\n"


def _shortest(value: Tensor) -> Any:
    """Nested lists of the shortest decimals that are these float32 numbers exactly: half of what float64 needs."""
    if not value.numel():
        return {"shape": list(value.shape)}
    numbers = value.numpy()
    short = np.array([float(text) for text in numbers.ravel().astype(str)]).reshape(numbers.shape)
    same = np.array_equal(short.astype(np.float32), numbers, equal_nan=True)
    return (short if same else numbers).tolist()

"""What a model computes from its text without gradients, and then adds to or multiplies with what has them.

To a graph such a tensor looks like a constant: its share would count as a bias, and every sum would still close. So
it is marked where it comes from, the mark is handed on, and it shows when relevance arrives where it was mixed in.
Only tensors of the activation's full shape are looked at: a scale or a route may be frozen, and is by the rules.

Marked are results without a graph of something with one (`torch.no_grad`, whole numbers of 8 bits), and memory that
was left empty for a kernel to fill. What a model detaches itself is a constant, by its own word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
_UNMARKED = {"detach", "detach_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"} | {
    "new_tensor",
    "__get__",
}
_OVERWRITTEN = {"zero_", "fill_", "copy_", "__setitem__"}
"""What stood in the first argument before does not matter."""

_LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""Of the second tensor, only its type or shape matters."""

_Args = list[Tensor]


def tensors(*values: Any) -> _Args:
    """All tensors among arguments, which may be nested."""
    found: _Args = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            found += tensors(*value)
    return found


def _is_severed(x: Tensor) -> bool:
    return hasattr(x, "severed")


def mark(name: str, operands: _Args, result: Any, *, frozen: bool) -> None:
    """Marks the results of a function, if they carry the text on without a graph.

    name:   of the function; operands: its tensors
    frozen: whether a rule takes the result as a constant on purpose
    """
    sources = operands[1:] if name in _OVERWRITTEN else operands[:1] if name in _LIKE else operands
    lost = not frozen and any(x.requires_grad or _is_severed(x) for x in sources)
    for y in tensors(operands[0] if name == "__setitem__" else result):
        if y.requires_grad:
            continue
        if name in _EMPTY or (lost and name not in _UNMARKED and _carries(y)):
            y.severed = name  # type: ignore[attr-defined]
        elif name in _OVERWRITTEN and _is_severed(y):
            delattr(y, "severed")


def mixed_in(operands: _Args, result: Any) -> list[tuple[Tensor, str]]:
    """Results with a graph that have an operand of their own shape without one: these, and where it came from."""
    severed = [x for x in operands if not x.requires_grad and _is_severed(x)]
    return [
        (y, x.severed)  # type: ignore[attr-defined]
        for y in (tensors(result) if severed else [])
        for x in severed
        if y.requires_grad and x.shape == y.shape
    ]


def _carries(y: Tensor) -> bool:
    """Numbers, not indices or conditions."""
    return y.is_floating_point() or y.dtype in (torch.int8, torch.uint8)

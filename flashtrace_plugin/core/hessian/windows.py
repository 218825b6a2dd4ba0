"""Overlapping windows over a long context (HETA, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Window = tuple[int, int]
"""Half-open range of positions."""


def windows(length: int, size: int, overlap: float = 0.5) -> list[Window]:
    """Windows [a, a + size) every size·(1 - overlap) positions that cover 0..length; the last is cut at ``length``."""
    stride = max(1, round(size * (1 - overlap)))
    starts = range(0, max(1, length - size + stride), stride)
    return [(a, min(a + size, length)) for a in starts]


def window_mean(length: int, spans: list[Window], component: Callable[[int, int], Tensor]) -> Tensor:
    """Each token's average over the windows that hold it.

    component: (a, b) -> values of positions a..b   [b - a]
    result:    [length]
    """
    total, count = torch.zeros(2, length, dtype=torch.float32)
    for a, b in spans:
        values = component(a, b).cpu()
        total = total.to(values.dtype)
        total[a:b] += values
        count[a:b] += 1
    return total / count.clamp_min(1)

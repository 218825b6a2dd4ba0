"""What a baseline is, and what baselines share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor

from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from flashtrace_plugin.evaluation.metrics.likelihood import log_likelihood
from flashtrace_plugin.spans import Span

if TYPE_CHECKING:
    from flashtrace_plugin.evaluation.cases import Case


@dataclass(frozen=True)
class Baseline:
    """A simple explanation that a method has to beat.

    explain: ``explain(model, case)`` gives scores [prompt_length] >= 0, float32, higher for what matters more
    passes:  ``passes(case)``, about how many forward passes of the whole text it takes; a backward pass counts two
    about:   what it does, in one sentence
    """

    explain: Callable[[Any, Case], Tensor]
    passes: Callable[[Case], float]
    about: str


ROWS = 16
"""Texts run at once: enough for full speed, and few enough that those in a batch begin alike for long."""


def fixed(passes: float) -> Callable[[Case], float]:
    """The same number of forward passes whatever the text."""
    return lambda case: passes


def generator_of(case: Case) -> torch.Generator:
    """Random numbers that are the same for the same tokens."""
    return torch.Generator().manual_seed(crc32(repr(case.input_ids.tolist()).encode()))


def falls(model: Any, case: Case, groups: list[list[int]], watched: Span) -> Tensor:
    """Fall of log P(watched) when the tokens of a group are replaced, negative where it rises. result: [groups]"""
    rows = case.input_ids.repeat(len(groups) + 1, 1)
    token = replacement_token(model)
    for row, group in zip(rows[1:], groups, strict=True):
        row[group] = token
    found = log_likelihood(model, rows, generation=watched, batch_size=ROWS)
    return (found[0] - found[1:]).float()


def chunks(length: int, size: int) -> list[list[int]]:
    """Consecutive positions, ``size`` at a time."""
    return [list(range(i, min(i + size, length))) for i in range(0, length, size)]


def spread(values: Tensor, groups: list[list[int]], length: int) -> Tensor:
    """A group's value shared equally among its positions. values: [groups]; result: [length]"""
    scores = torch.zeros(length, dtype=torch.float32)
    for value, group in zip(values.tolist(), groups, strict=True):
        scores[group] = value / len(group)
    return scores

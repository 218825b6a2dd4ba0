"""Captum's ``target`` and ``additional_forward_args``, read as spans of token positions, one per example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from flashtrace_captum.errors import CaptumInputError, TargetError
from flashtrace_plugin.spans import Span

Where = Union[int, slice, Span]
"""One token position, or a half-open range of them."""

Target = Union[None, Where, Sequence[Where], Tensor]
"""None is the last token. A list or a 1-D tensor has one entry per example, as everywhere in Captum."""


@dataclass(frozen=True)
class Example:
    """One row of a batch without its padding.

    kept:              positions of ``inputs`` that hold tokens
    target, reasoning: spans counted from the first kept position
    """

    kept: Span
    target: Span
    reasoning: Span | None

    @property
    def prompt_length(self) -> int:
        """Everything before the reasoning, or before the target if there is none."""
        return self.target.start if self.reasoning is None else min(self.reasoning.start, self.target.start)


def read_examples(
    batch: int, length: int, target: Target, additional_forward_args: Any, reasoning: Target
) -> list[Example]:
    """The examples of inputs [batch, length]. Raises TargetError and CaptumInputError for what does not fit."""
    mask = _attention_mask(additional_forward_args, batch, length)
    targets = _per_example("target", target, batch)
    through = _per_example("reasoning", reasoning, batch)
    return [_example(_kept(row), t, r) for row, t, r in zip(mask, targets, through, strict=True)]


def _example(kept: Span, target: Where | None, reasoning: Where | None) -> Example:
    where = _span("target", kept.stop - 1 if target is None else target, kept)
    if where.start == 0:
        raise TargetError(
            f"target starts at position {kept.start}, the first token; something must precede a target to cause it"
        )
    through = None if reasoning is None else _span("reasoning", reasoning, kept)
    if through is not None and through.start == 0:
        raise TargetError(f"reasoning starts at position {kept.start}, the first token; a prompt must precede it")
    return Example(kept, where, through)


def _per_example(name: str, value: Target, batch: int) -> list[Where | None]:
    if isinstance(value, Tensor):
        value = _tensor_target(name, value, batch)
    if value is None or isinstance(value, (int, slice, Span)):
        return [value] * batch
    if not isinstance(value, list):
        raise TargetError(
            f"{name} must be a token position, a slice of them, or a list with one of these per example, got {value!r}"
        )
    if len(value) != batch:
        raise TargetError(
            f"{name} lists {len(value)} entries for {batch} examples, one entry per example; "
            f"a span of tokens is a slice, {name}=slice(start, stop)"
        )
    return value


def _tensor_target(name: str, value: Tensor, batch: int) -> int | list[int]:
    """A tensor as Captum reads it: one number serves all examples, a 1-D tensor has one number per example."""
    if value.is_floating_point() or value.dtype == torch.bool:
        raise TargetError(f"{name} must hold token positions, got a tensor of {value.dtype}")
    if value.numel() == 1:
        return int(value)
    if value.dim() != 1 or len(value) != batch:
        raise TargetError(
            f"{name} of shape {list(value.shape)} does not hold one position for each of {batch} examples; "
            f"a span of tokens is a slice, {name}=slice(start, stop)"
        )
    return value.tolist()


def _span(name: str, where: Where, kept: Span) -> Span:
    """A position or range of ``inputs`` as a span from the first kept position; negative ones count from the end."""
    start, stop = _bounds(name, where, kept.stop)
    if not kept.start <= start < stop <= kept.stop:
        raise TargetError(
            f"{name} {start}:{stop} is empty or outside the tokens {kept.start}:{kept.stop} of the inputs; "
            "positions count from 0 and ranges are half-open"
        )
    return Span(start - kept.start, stop - kept.start)


def _bounds(name: str, where: Where, end: int) -> tuple[int, int]:
    if isinstance(where, bool) or not isinstance(where, (int, slice, Span)):
        raise TargetError(f"{name} must be a token position or a slice of them, got {where!r}")
    if isinstance(where, int):
        return _from_end(where, end), _from_end(where, end) + 1
    if isinstance(where, slice) and where.step not in (None, 1):
        raise TargetError(f"{name} {where} skips positions; a span has no step")
    start = 0 if where.start is None else where.start
    stop = end if where.stop is None else where.stop
    return _from_end(start, end), _from_end(stop, end)


def _from_end(position: int, end: int) -> int:
    return position + end if position < 0 else position


def _attention_mask(additional_forward_args: Any, batch: int, length: int) -> Tensor:
    """The attention mask [batch, length] as booleans; all ones if none is given."""
    args = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
    given = [arg for arg in args if arg is not None]
    if not given:
        return torch.ones(batch, length, dtype=torch.bool)
    if len(given) > 1 or args[0] is None or not isinstance(given[0], Tensor):
        raise CaptumInputError(
            f"additional_forward_args may hold the attention mask and nothing else, got {[type(a) for a in args]}; "
            "options of the method are keywords"
        )
    if given[0].shape != (batch, length):
        raise CaptumInputError(
            f"the attention mask must be {[batch, length]} like the inputs, got {list(given[0].shape)}"
        )
    return given[0].detach().cpu() != 0


def _kept(mask: Tensor) -> Span:
    """The one run of unmasked positions of a row [length]."""
    ones = mask.nonzero()[:, 0].tolist()
    if not ones:
        raise CaptumInputError("the attention mask leaves no token of an example")
    if ones[-1] - ones[0] + 1 != len(ones):
        hole = next(i for i in range(ones[0], ones[-1]) if not mask[i])
        raise CaptumInputError(
            f"the attention mask has a hole at position {hole}; only padding at the ends can be masked, "
            "so remove the hidden tokens from the inputs instead"
        )
    return Span(ones[0], ones[-1] + 1)

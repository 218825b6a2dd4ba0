"""Captum's ``target`` and ``additional_forward_args``, read as spans of token positions, one per example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, Union

import torch
from torch import Tensor

from flashtrace_captum.errors import CaptumInputError, TargetError
from flashtrace_plugin.errors import SpanError
from flashtrace_plugin.positions import as_span, prompt_before
from flashtrace_plugin.spans import Span

_OneTarget = Union[SupportsIndex, slice, Span]
"""One token position, or a half-open range of them."""

Target = Union[None, _OneTarget, Sequence[_OneTarget], Tensor]
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
        return prompt_before(self.target, self.reasoning)


def read_examples(
    batch: int, length: int, target: Target, additional_forward_args: Any, reasoning: Target
) -> list[Example]:
    """The examples of inputs [batch, length]. Raises TargetError and CaptumInputError for what does not fit."""
    mask = _attention_mask(additional_forward_args, batch, length)
    targets = _per_example("target", target, batch)
    through = _per_example("reasoning", reasoning, batch)
    return [_example(_kept(row), t, r) for row, t, r in zip(mask, targets, through, strict=True)]


def _example(kept: Span, target: _OneTarget | None, reasoning: _OneTarget | None) -> Example:
    where = _span("target", kept.stop - 1 if target is None else target, kept)
    if where.start == 0:
        raise TargetError(
            f"target starts at position {kept.start}, the first token; something must precede a target to cause it"
        )
    through = None if reasoning is None else _span("reasoning", reasoning, kept)
    if through is not None and through.start == 0:
        raise TargetError(f"reasoning starts at position {kept.start}, the first token; a prompt must precede it")
    return Example(kept, where, through)


def _per_example(name: str, value: Target, batch: int) -> list[_OneTarget | None]:
    if isinstance(value, Tensor):
        value = _tensor_target(name, value, batch)
    entries: Any = value if isinstance(value, list) else [value] * batch
    if len(entries) != batch:
        raise TargetError(
            f"{name} lists {len(entries)} entries for {batch} examples, one entry per example; "
            f"a span of tokens is a slice, {name}=slice(start, stop)"
        )
    for entry in entries:
        if entry is not None and (isinstance(entry, bool) or not isinstance(entry, (SupportsIndex, slice, Span))):
            raise TargetError(
                f"{name} must be a token position, a slice of them, or a list with one of these per example, "
                f"got {entry!r}"
            )
    return entries


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


def _span(name: str, where: _OneTarget, kept: Span) -> Span:
    """A position or range of ``inputs`` as a span from the first kept position; negative ones count from the end."""
    inside = f"what is outside the tokens {kept} of the inputs is padding or nothing; ranges are half-open"
    try:
        span = as_span(name, where, kept.stop)
    except SpanError as error:
        raise TargetError(f"{error}; {inside}") from error
    if span.start < kept.start:
        raise TargetError(f"{name} {span} begins before the first token; {inside}")
    return Span(span.start - kept.start, span.stop - kept.start)


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

"""Which attention kernel the model uses while a method runs; it has its own again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def same_kernel(model: Any) -> Iterator[None]:
    """The attention implementation is afterwards what it was before."""
    before = model.config._attn_implementation
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


@contextmanager
def without_stored_patterns(model: Any) -> Iterator[None]:
    """Eager attention gives way to what transformers loads by default, while inside.

    Inseq loads models by name with eager attention, which makes a pattern [heads, N, N] in every layer. Its own
    methods read them; those of this package do not. A model without another kernel keeps its own.
    """
    with same_kernel(model):
        if model.config._attn_implementation == "eager" and model._can_set_attn_implementation():
            model.set_attn_implementation(model.get_correct_attn_implementation(None))
        yield

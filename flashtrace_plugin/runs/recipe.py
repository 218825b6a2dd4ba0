"""What a worker needs to make a method of its own, and by what a model is known again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtrace_plugin import reasoner
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.loading import DTYPES, REASONER, load
from flashtrace_plugin.methods.options import one_of
from flashtrace_plugin.methods.registry import METHODS

if TYPE_CHECKING:
    from flashtrace_plugin.methods.base import Method


@dataclass(frozen=True)
class Recipe:
    """A method by name with a model to load; nothing is loaded before there is something to explain.

    model:   as :func:`flashtrace_plugin.loading.load` takes it, as the five settings at the end
    method:  name of a method
    options: of the method
    """

    model: str = REASONER
    method: str = "recommended"
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    device: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        one_of("method", self.method, METHODS)
        try:
            self.settings()
        except TypeError as error:
            raise InputError(str(error)) from error

    def settings(self) -> dict[str, Any]:
        """All options, as results note them."""
        return METHODS[self.method].settings_with(self.options)

    def made(self) -> Method:
        """The method with its model."""
        loading = ("dtype", "device", "attn_implementation", "trust_remote_code", "allow_pickle")
        model, tokenizer = load(self.model, **{name: getattr(self, name) for name in loading})
        return METHODS[self.method](model, tokenizer, **self.options)


def model_name(name: str) -> str:
    """A model's name, the same however its folder is written."""
    path = Path(name).expanduser()
    if name == REASONER or not path.exists():
        return name
    return REASONER if path.resolve() == reasoner.path().resolve() else str(path.resolve())


_SAMPLES = 64
"""Numbers of every weight that are looked at: training changes nearly all of them."""


def fingerprint(method: Method) -> str:
    """16 hexadecimal digits of a method's model and tokenizer: other weights or another vocabulary give others."""
    found = hashlib.sha256()
    for part in (*_weights(method.source.language_model), *_vocabulary(method.tokenizer)):
        found.update(part)
    return found.hexdigest()[:16]


def _weights(model: Any) -> Iterator[bytes]:
    """Names, shapes, types and some numbers of the weights."""
    for name, value in () if model is None else model.state_dict().items():
        yield f"{name} {list(value.shape)} {value.dtype}".encode()
        if not value.is_meta:  # offloaded weights are known by name and shape
            numbers = value.detach().flatten()
            yield numbers[:: max(1, len(numbers) // _SAMPLES)][:_SAMPLES].float().cpu().numpy().tobytes()


def _vocabulary(tokenizer: Any) -> Iterator[bytes]:
    if tokenizer is not None:
        yield repr(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])).encode()
        yield repr(getattr(tokenizer, "chat_template", None)).encode()

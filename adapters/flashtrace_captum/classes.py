"""The Captum class of every registered method, made from its declaration with explicit signatures and docstrings."""

from __future__ import annotations

import inspect
import textwrap
from abc import ABCMeta
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any

from captum.log import log_usage

from flashtrace_captum.delta import TellsDelta
from flashtrace_captum.embeddings import TakesEmbeddings
from flashtrace_captum.methods import MethodAttribution, options_for
from flashtrace_plugin.methods import METHODS
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.options import Declared

_CLASS_DOC = """{description}

Args:

    forward_func (Module): a causal language model of transformers
    tokenizer (optional): the model's tokenizer, only for options that give tokens as texts. Default: None
{options}
Examples::

    >>> attributions = {name}(model).attribute(ids, target=slice(90, 94))
    >>> attributions[0, :90]  # the scores of the tokens before the target
"""


def class_named(name: str) -> type[MethodAttribution]:
    """The Captum class of the registered method whose class has this name. Raises AttributeError if there is none.

    Of two methods with one class name, the one registered first has it; the package's own come before all others.
    """
    for method in () if name.startswith("_") else METHODS.values():
        if method.__name__ == name:
            return class_of(method)
    raise AttributeError(f"module 'flashtrace_captum' has no attribute {name!r}, and no registered method is so named")


@cache
def class_of(method: type[Method]) -> type[MethodAttribution]:
    """The Captum class of a method, always the same object."""
    base = _base_of(method)
    members = {
        "method": method,
        "__init__": _constructor(method, base),
        "attribute": _attribute(method, base),
        "__doc__": _class_doc(method),
        "__module__": "flashtrace_captum",  # where pickle finds it again
    }
    made: Any = ABCMeta(method.__name__, (base,), members)
    return made


def _base_of(method: type[Method]) -> type[MethodAttribution]:
    """HETA also takes embeddings, by which it differentiates; a method that can conserve tells how well it does."""
    if issubclass(method, METHODS["heta"]):
        return TakesEmbeddings
    return MethodAttribution if method.conserves is Method.conserves else TellsDelta


def _constructor(method: type[Method], base: type[MethodAttribution]) -> Callable[..., None]:
    @wraps(base.__init__)
    def __init__(self: MethodAttribution, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)

    return _described(__init__, options_for(method, call=False), None)


def _attribute(method: type[Method], base: type[MethodAttribution]) -> Callable[..., Any]:
    plain = inspect.unwrap(base.attribute)
    options = options_for(method, call=True)
    head, _, rest = inspect.cleandoc(plain.__doc__ or "").partition("    **options")
    doc = f"{head}{_entries(options)}\nReturns:{rest.partition('Returns:')[2]}"
    return _described(log_usage(part_of_slo=True)(plain), options, doc)


def _described(function: Any, options: Iterable[Declared], doc: str | None) -> Any:
    """The function with its ``**options`` spelled out in its signature, and with this docstring."""
    signature = inspect.signature(function)
    kinds = inspect.Parameter
    named = [one for one in signature.parameters.values() if one.kind is not kinds.VAR_KEYWORD]
    named += [kinds(one.name, kinds.KEYWORD_ONLY, default=one.default, annotation=one.type) for one in options]
    function.__signature__ = signature.replace(parameters=named)
    function.__doc__ = doc
    return function


def _class_doc(method: type[Method]) -> str:
    description = (method.__doc__ or "").partition("\nOptions:\n")[0].strip()
    options = _entries(options_for(method, call=False))
    return _CLASS_DOC.format(description=description, options=options, name=method.__name__)


def _entries(options: Iterable[Declared]) -> str:
    """Options as Captum's docstrings list arguments."""
    return "".join(_entry(one) + "\n" for one in options)


def _entry(one: Declared) -> str:
    choices = f" ({', '.join(map(repr, one.choices))})" if one.choices else ""
    text = f"{one.name} ({one.type}, optional): {one.help}{choices}. Default: {one.default!r}"
    return textwrap.fill(text, 110, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)

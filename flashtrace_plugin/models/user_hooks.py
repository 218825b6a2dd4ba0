"""Hooks that a user has placed on a model: they are obeyed, and told of the user's own modules."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_LIBRARIES = {"accelerate", "peft", "torch", "transformer_lens", "transformers", "transformers_modules"}
"""Models are made with these. Their hooks work on the module that they are given; all others are the user's."""

FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in FORWARD_HOOKS)
_ORIGINAL = "_viewed_by_flashtrace"
_ABSENT = object()
_OURS = {"training", "_compiled_call_impl"}
"""Attributes that a view has its own of."""


def as_view_of(original: nn.Module) -> dict[str, nn.Module]:
    """The attribute by which a module of a view knows the user's."""
    return {_ORIGINAL: original}


def original_of(module: Any) -> Any:
    """The user's module behind a module of a view; any other module itself."""
    return vars(module).get(_ORIGINAL, module)


def whole_text(model: Any) -> bool:
    """Whether what follows a position may change its numbers: under hooks, and with some rotary embeddings.

    A hook may count positions from the end, or put in activations of the whole text.
    """
    return hooked(model) or any(kind in ("dynamic", "longrope") for kind in _rotary(model.config.get_text_config()))


def hooked(model: nn.Module) -> bool:
    """Whether forward hooks of the user's act on the model."""
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return True
    of_modules = (getattr(m, name).copy() for m in original_of(model).modules() for name in FORWARD_HOOKS)
    return not all(of_a_library(hook) for hooks in of_modules for hook in hooks.values())


def _rotary(config: Any) -> Iterator[str]:
    """The kinds of rotary embeddings; some families have one for each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    for one in [settings, *(value for value in settings.values() if isinstance(value, dict))]:
        yield one.get("rope_type", "default")


def of_a_library(call: Any) -> bool:
    """Whether a function, and what its closure calls, belongs to a library that models are made with."""
    if isinstance(call, functools.partial):
        return of_a_library(call.func)
    if str(getattr(call, "__module__", "")).partition(".")[0] not in _LIBRARIES:
        return False
    calls = map(content, getattr(call, "__closure__", None) or ())
    return all(of_a_library(one) for one in calls if isinstance(one, (types.FunctionType, functools.partial)))


def content(cell: types.CellType) -> Any:
    """What a closure's cell holds, None if nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def told(hook: Callable[..., Any], original: nn.Module, view: nn.Module) -> Callable[..., Any]:
    """The hook, called with the user's module; what it sets on that is set on the view's module, too.

    It may have done so for another view meanwhile, so that it changes nothing now: since the view was made counts.
    """
    made_from = [one.copy() for one in _attributes(original)]

    def call(module: nn.Module, *values: Any) -> Any:
        result = hook(original, *values)
        for ours, old, new in zip(_attributes(view), made_from, _attributes(original), strict=True):
            ours.update({k: v for k, v in new.copy().items() if old.get(k, _ABSENT) is not v and k not in _OURS})
        return result

    return call


def _attributes(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return vars(module), module._parameters, module._buffers


def call_for_global_hooks() -> Callable[..., Any] | None:
    """How torch calls a module, with its global forward hooks told of the user's modules; None if it has none."""
    hooks = {name: getattr(torch_module, name).copy() for name in _GLOBAL_HOOKS}
    if not any(hooks.values()):
        return None
    told_hooks = {name: {key: _told_globally(hook) for key, hook in found.items()} for name, found in hooks.items()}
    plain: Any = nn.Module._call_impl
    return types.FunctionType(plain.__code__, vars(torch_module) | told_hooks, plain.__name__, plain.__defaults__)


def _told_globally(hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, *values: hook(original_of(module), *values)

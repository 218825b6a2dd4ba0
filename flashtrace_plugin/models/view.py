"""A private view of a model: module objects of its own around the very same weights.

Hooks, attention kernels, wrapped methods and evaluation mode are put on a view, never on the user's modules. Nothing
has to be taken back: other threads may run the model or attribute it meanwhile, and an interrupt leaves nothing.

A view has counterparts of all modules, configurations and hook objects of accelerate, and whatever refers to one of
these (lists, dicts, bound methods, partials, closures) refers to the counterpart. Tensors and all else are shared.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from flashtrace_plugin.errors import UnsupportedModelError
from flashtrace_plugin.models.user_hooks import (
    FORWARD_HOOKS,
    as_view_of,
    call_for_global_hooks,
    content,
    of_a_library,
    original_of,
    told,
)

_Module = TypeVar("_Module", bound=nn.Module)

_HOOKS = {*FORWARD_HOOKS, "_backward_pre_hooks", "_backward_hooks"}
_CALLS = (types.MethodType, types.FunctionType, functools.partial)
_WEAK = {weakref.ref, weakref.ProxyType, weakref.CallableProxyType}
_SHARED = {str, int, float, bool, type(None), Tensor, nn.Parameter}


def view_of(model: _Module) -> _Module:
    """A view of a model for one call, in evaluation mode.

    The user's hooks are called with the user's own modules. What was compiled runs uncompiled.

    Raises UnsupportedModelError for a method that was replaced by something that would run the user's modules.
    """
    return _View(original_of(model)).model


class _View:
    """Counterparts of objects, made once each.

    known: by an object's id, the object (kept, so that its id stays its own) and its counterpart
    """

    def __init__(self, model: Any) -> None:
        self.known: dict[int, tuple[Any, Any]] = {}
        self.todo: list[tuple[Any, Any]] = []
        self.call = call_for_global_hooks()
        self.model = self.of(model)
        while self.todo:  # no recursion, since modules may form long chains
            self._fill(*self.todo.pop())
        self._check_methods(model)

    def of(self, value: Any) -> Any:
        """The counterpart of a value, or the value itself if it has none."""
        if type(value) in _SHARED:
            return value
        if id(value) in self.known:
            return self.known[id(value)][1]
        if _has_counterpart(type(value)):  # type: ignore[arg-type]
            new = object.__new__(type(value))
            self.todo.append((value, new))
        elif type(value) in (dict, OrderedDict, defaultdict):
            new = value.copy()
            new.update([(key, self.of(item)) for key, item in new.items()])
        elif type(value) in (list, tuple, set):
            new = type(value)(map(self.of, tuple(value)))
        elif type(value) in _WEAK:
            new = self._weak(value)
        elif isinstance(value, _CALLS):
            self.known[id(value)] = value, value  # a function may refer to itself
            new = self._call(value)
        else:
            return value
        self.known[id(value)] = value, new
        return new

    def _fill(self, old: Any, new: Any) -> None:
        state = vars(new)
        for name, value in vars(old).copy().items():
            is_hooks = name in _HOOKS and isinstance(old, nn.Module)
            state[name] = self._hooks(value, old, new) if is_hooks else self.of(value)
        if isinstance(old, nn.Module):
            call = None if self.call is None else types.MethodType(self.call, new)
            state.update({"training": False, "_compiled_call_impl": call} | as_view_of(old))

    def _hooks(self, hooks: Any, old: nn.Module, new: nn.Module) -> Any:
        each = hooks.copy().items()
        return OrderedDict((k, self.of(hook) if of_a_library(hook) else told(hook, old, new)) for k, hook in each)

    def _weak(self, value: Any) -> Any:
        """What stands for a weak reference or proxy; it may hold on to the counterpart, which nobody deletes."""
        is_proxy = type(value) is not weakref.ref
        try:
            old = value.__init__.__self__ if is_proxy else value()  # a proxy's methods know the object behind it
        except ReferenceError:
            return value
        new = self.of(old)
        return value if new is old else new if is_proxy else lambda: new

    def _call(self, value: Any) -> Any:
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.of(value.__self__))
        if isinstance(value, functools.partial):
            keywords = {name: self._held(one) for name, one in value.keywords.items()}
            return _like(value, functools.partial(self.of(value.func), *map(self._held, value.args), **keywords), self)
        compiled = getattr(value, "_torchdynamo_orig_callable", None)
        return self._function(value) if compiled is None else self.of(compiled)

    def _function(self, value: types.FunctionType) -> Any:
        held = _held_by(value)
        if all(self._held(one) is one for one in held):
            return value
        closure, defaults = value.__closure__ or (), value.__defaults__ or ()
        ours = tuple(map(self._cell, closure)), tuple(map(self._held, defaults))
        new = types.FunctionType(value.__code__, value.__globals__, value.__name__, ours[1], ours[0])
        new.__kwdefaults__ = {name: self._held(one) for name, one in (value.__kwdefaults__ or {}).items()}
        return _like(value, new, self)

    def _cell(self, cell: types.CellType) -> types.CellType:
        old = content(cell)
        new = self._held(old)
        return cell if new is old else types.CellType(new)

    def _held(self, value: Any) -> Any:
        """What a function holds on to: modules and calls have counterparts; the user's lists are his."""
        return self.of(value) if isinstance(value, (nn.Module, *_CALLS)) else value

    def _check_methods(self, model: nn.Module) -> None:
        """Raises UnsupportedModelError where a method's replacement still leads to the user's modules."""
        for old, new in self.known.values():
            if not isinstance(old, nn.Module):
                continue
            for name, value in vars(new).items():
                is_method = name == "forward" or (type(value) in _CALLS and hasattr(type(old), name))
                if is_method and self._leads_back(value):
                    path = next((path for path, module in model.named_modules() if module is old), "")
                    raise UnsupportedModelError(
                        f"{name} of {path or 'the model'} ({type(old).__name__}) was replaced by something that keeps "
                        "modules of the model where they cannot be followed (in a global variable, a list or an "
                        "object), so that attribution would not see what runs; change the module by a forward hook, a "
                        "subclass, or a function that holds the old method in its closure"
                    )

    def _leads_back(self, value: Any) -> bool:
        seen, todo = set(), [value]
        while todo:
            one = todo.pop()
            if isinstance(one, nn.Module):
                if id(one) in self.known:
                    return True
            elif id(one) not in seen:
                seen.add(id(one))
                todo += _referred(one)
        return False


@functools.cache
def _has_counterpart(kind: type) -> bool:
    if issubclass(kind, (nn.Module, PretrainedConfig)):
        return True
    libraries = {cls.__module__.partition(".")[0] for cls in kind.__mro__}
    ours = libraries & {"accelerate", "transformer_lens"} and not issubclass(kind, (type, Enum))
    return bool(ours) and kind.__new__ is object.__new__ and hasattr(kind, "__dict__")


def _like(old: Any, new: Any, view: _View) -> Any:
    """The new function with the attributes of the old, by which its signature is known."""
    vars(new).update({name: view._held(value) for name, value in vars(old).items()})
    return new


def _referred(value: Any) -> Iterable[Any]:
    """What a call, a container or an object may use when it runs."""
    if isinstance(value, types.MethodType):
        return [value.__self__] if isinstance(value.__self__, nn.Module) else [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.FunctionType):
        held = _held_by(value)
        return held if of_a_library(value) else held + list(_globals(value, value.__code__))
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set)):
        return list(value)
    is_code = isinstance(value, (type, types.ModuleType)) or of_a_library(value)
    return [] if is_code else list(getattr(value, "__dict__", {}).values())


def _held_by(function: types.FunctionType) -> list[Any]:
    """What is in a function's closure and among its defaults."""
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*map(content, function.__closure__ or ()), *defaults]


def _globals(function: types.FunctionType, code: types.CodeType) -> Iterator[Any]:
    """Global variables that a function names, also inside functions that it defines."""
    yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals(function, constant)

"""Token mixers without softmax: what their recurrence reads, from the function of transformers that computes it.

Transformers' linear attention, state space models and short convolutions call one function of their modelling file
for the recurrence, by its global name. A reader gives the ``forward`` of one module of a view a copy of its globals
in which that name stands for a listener; the listener calls the function itself, whichever kernel that is. Values are
what the function is given, so where a short convolution comes before, value j holds the tokens under it, j-3..j.

The coefficients are then run by transformers' own plain function, with everything but the values as it was. That it
computes what the kernel did is part of closure.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashtrace_plugin.errors import UnsupportedModelError
from flashtrace_plugin.models.read.own_attention import shadowed
from flashtrace_plugin.models.user_hooks import content

_Given = dict[str, Any]
"""Arguments of a recurrence's function by name."""

_Around = Callable[[Callable[..., Any], _Given], Any]
"""``around(function, given)`` is called in the place of ``function(**given)``, and gives its result."""


@dataclass(frozen=True)
class RecurrenceCall:
    """What one mixer handed to its recurrence, and what it got.

    v, o: [N, H, d_h]
    read: v [n, H, d_h] -> o [n, H, d_h] in float32, for the first n positions and all else as it was
    """

    v: Tensor
    o: Tensor
    read: Callable[[Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class RecurrenceReader:
    """One kind of recurrence.

    functions: names that its function has in transformers' modelling files
    values:    name of the argument that holds the values
    frozen:    the other arguments for the first n positions, in which its plain function is linear in the values
    name:      as which it is written in a layout
    by_head:   values are [1, N, H, d_h]; else [1, d, N], each channel with coefficients of its own: one head
    """

    functions: tuple[str, ...]
    values: str
    frozen: Callable[[_Given, int], _Given]
    name: str
    by_head: bool = True

    def __repr__(self) -> str:
        return f"recurrence.{self.name}"

    def is_of(self, module: nn.Module) -> bool:
        """Whether the module's class calls one of the functions."""
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        return code is not None and not set(self.functions).isdisjoint(code.co_names)

    @contextmanager
    def __call__(self, module: nn.Module, note: Callable[[nn.Module, Any], Any]) -> Iterator[None]:
        """A reader: tells ``note`` what the module's recurrence works with.

        If ``note`` gives factors [H, d_h], the result is multiplied by them.
        """

        def around(function: Callable[..., Any], given: _Given) -> Any:
            result = function(**given)
            factor = note(module, self.told(inspect.unwrap(function), given, result))
            return result if factor is None else self._times(result, factor)

        with self.intercepted(module, around):
            yield

    @contextmanager
    def intercepted(self, module: nn.Module, around: _Around) -> Iterator[None]:
        """While active, ``around`` stands for the recurrence of this one module."""
        # What accelerate wraps is kept as an attribute.
        method = "_old_forward" if hasattr(module, "_old_forward") else "forward"
        with shadowed(module, method, lambda forward: _calling(forward, self.functions, around)):
            yield

    def frozen_in(self, module: nn.Module) -> AbstractContextManager[None]:
        """While active, gradients through the recurrence of this one module go to its values (and its gate) alone."""

        def around(function: Callable[..., Any], given: _Given) -> Any:
            live = (self.values, "z")
            return function(
                **{k: x if k in live or not isinstance(x, Tensor) else x.detach() for k, x in given.items()}
            )

        return self.intercepted(module, around)

    def told(self, plain: Callable[..., Any], given: _Given, result: Any) -> RecurrenceCall:
        if given.get("initial_state") is not None or given.get("initial_states") is not None:
            raise UnsupportedModelError(
                f"{self.functions[0]} continues from the state of an earlier text, whose tokens are not there to be "
                "named; run the whole text at once, without a cache"
            )
        v = self._heads(given[self.values]).detach()
        read = functools.partial(self.read, plain, _kept(given))
        gated = given.get("z") is not None  # Mamba-1 gates inside of its function
        return RecurrenceCall(v, read(v.float()) if gated else self._heads(_first(result)).detach(), read)

    def read(self, plain: Callable[..., Any], given: _Given, v: Tensor) -> Tensor:
        """What the recurrence makes of other values. v: [n, H, d_h]; result: [n, H, d_h]"""
        values = v[None] if self.by_head else v[:, 0].T[None]
        return self._heads(_first(plain(**self.frozen(given, len(v)) | {self.values: values})))

    def _heads(self, x: Tensor) -> Tensor:
        return x[0] if self.by_head else x[0].T[:, None]

    def _times(self, result: Any, factor: Tensor) -> Any:
        new = _first(result) * (factor if self.by_head else factor.T).to(_first(result))
        return (new, *result[1:]) if isinstance(result, tuple) else new


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _kept(given: _Given) -> _Given:
    """The arguments without graphs, and usable in one: what is made in inference mode is not."""
    with torch.inference_mode(False):
        return {k: x.detach().clone() if isinstance(x, Tensor) else x for k, x in given.items()}


def _delta(given: _Given, n: int) -> _Given:
    wide = {name: given[name][:, :n].float() for name in ("query", "key", "g", "beta")}
    return given | wide | {"output_final_state": False}


def _state_space(given: _Given, n: int) -> _Given:
    cut = {name: given[name][:, :n] for name in ("dt", "B", "C")}
    return given | cut | {"z": None, "return_final_states": False}


def _channel_state_space(given: _Given, n: int) -> _Given:
    cut = {name: given[name][..., :n] for name in ("dt", "B", "C")}
    cut |= {name: cut[name].float() for name in ("B", "C")}
    return given | cut | {"z": None, "return_last_state": False, "use_mambapy": False, "use_associative_scan": False}


def _convolution(given: _Given, n: int) -> _Given:
    if given.get("bias") is not None:
        raise UnsupportedModelError(
            "a short convolution with a bias: the bias is written through the gate at every position, and no token "
            "stands for it"
        )
    return given | {"weight": given["weight"].float()}


DELTA_RULE = RecurrenceReader(
    ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention"), "value", _delta, "DELTA_RULE"
)
"""Gated DeltaNet and Kimi Delta Attention."""

MAMBA2 = RecurrenceReader(("mamba2_chunk_scan",), "hidden_states", _state_space, "MAMBA2")

MAMBA = RecurrenceReader(("mamba_selective_scan",), "hidden_states", _channel_state_space, "MAMBA", by_head=False)

CONVOLUTION = RecurrenceReader(("causal_conv1d_fn",), "hidden_states", _convolution, "CONVOLUTION", by_head=False)
"""A short convolution that is the mixer itself (LFM2), not one that comes before."""


def keeps_state(model: nn.Module) -> bool:
    """Whether a module hands a state on from token to token, which keys and values of a prefix do not hold."""
    kinds = DELTA_RULE, MAMBA2, MAMBA, CONVOLUTION
    return any(kind.is_of(module) for module in model.modules() for kind in kinds)


def kernels(model: nn.Module) -> list[str]:
    """Packages whose functions compute the model's recurrences: transformers itself, unless it found another's."""
    found = set()
    for module in model.modules():
        for kind in (DELTA_RULE, MAMBA2, MAMBA, CONVOLUTION):
            if kind.is_of(module):
                forward = inspect.unwrap(type(module).forward)
                names = set(kind.functions) & set(forward.__code__.co_names)
                found |= {_implementation(forward.__globals__[name]).__module__.partition(".")[0] for name in names}
    return sorted(found)


def _implementation(function: Any) -> Any:
    """What transformers' wrapper around a function calls."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    held = dict(zip(names, map(content, getattr(function, "__closure__", None) or ()), strict=True))
    return held.get("implementation") or function


@contextmanager
def frozen_recurrences(model: nn.Module) -> Iterator[None]:
    """While active, all recurrences of a view of a model are linear in their values also to gradients."""
    with ExitStack() as stack:
        for module in model.modules():
            for kind in (DELTA_RULE, MAMBA2, MAMBA):
                if kind.is_of(module):
                    stack.enter_context(kind.frozen_in(module))
        yield


def _calling(forward: Callable[..., Any], names: tuple[str, ...], around: _Around) -> Callable[..., Any]:
    """The method with ``around`` in the place of the function that it calls by one of these names.

    Raises AttributeError if it calls none of them.
    """
    found = _renamed(forward, names, around, set())
    if found is forward:
        raise AttributeError(f"its forward calls no {' or '.join(names)}")
    return found


def _renamed(call: Any, names: tuple[str, ...], around: _Around, seen: set[int]) -> Any:
    """The call, or one like it if it or what it wraps calls a function by one of these names."""
    if id(call) in seen or not isinstance(call, (types.FunctionType, types.MethodType, functools.partial)):
        return call
    seen.add(id(call))
    if isinstance(call, types.MethodType):
        inner = _renamed(call.__func__, names, around, seen)
        return call if inner is call.__func__ else types.MethodType(inner, call.__self__)
    if isinstance(call, functools.partial):
        inner = _renamed(call.func, names, around, seen)
        return call if inner is call.func else functools.partial(inner, *call.args, **call.keywords)
    old = call.__closure__ or ()
    cells = tuple(_cell(cell, _renamed(content(cell), names, around, seen)) for cell in old)
    heard = {name: _listener(call.__globals__[name], around) for name in names if name in call.__code__.co_names}
    if not heard and all(new is cell for new, cell in zip(cells, old, strict=True)):
        return call
    new = types.FunctionType(call.__code__, call.__globals__ | heard, call.__name__, call.__defaults__, cells)
    new.__kwdefaults__ = call.__kwdefaults__
    return new


def _cell(cell: types.CellType, held: Any) -> types.CellType:
    return cell if held is content(cell) else types.CellType(held)


def _listener(function: Callable[..., Any], around: _Around) -> Callable[..., Any]:
    signature = inspect.signature(inspect.unwrap(function))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        return around(function, given | given.pop("kwargs", {}))

    return call

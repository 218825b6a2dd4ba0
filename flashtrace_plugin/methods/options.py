"""Options as they are declared, once: default, help and check. Hosts, the command line and the docs read them here.

Nothing here needs torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from inspect import formatannotation
from math import inf
from types import MappingProxyType
from typing import Any, Union

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.formats import FormatChoice, chosen_formats

_Check = Callable[[str, Any], Any]
"""``check(name, value)`` gives the value in the form in which it is kept, or raises InputError."""


def option(
    default: Any, help: str, *, choices: Iterable[Any] | None = None, check: _Check | None = None, noted: bool = True
) -> Any:
    """A field of an :class:`Options` class.

    help:    a phrase that says what it does, for help texts and docs
    choices: the values it may have
    check:   what else has to hold
    noted:   whether results note it in their settings; False for what does not change a number
    """
    known = None if choices is None else tuple(choices)
    return field(default=default, metadata={"help": help, "choices": known, "check": check, "noted": noted})


@dataclass(frozen=True)
class Declared:
    """One option as it was declared, see :func:`option`; ``type`` is its annotation as text."""

    name: str
    default: Any
    help: str
    type: str
    choices: tuple[Any, ...] | None
    check: _Check | None
    noted: bool

    def checked(self, value: Any) -> Any:
        """The value in the form in which it is kept. Raises InputError."""
        if self.choices is not None:
            one_of(self.name, value, self.choices)
        return value if self.check is None else self.check(self.name, value)

    def shown(self) -> str:
        """The option and its help in one line, as docstrings and the command line show it."""
        choices = f" ({', '.join(map(repr, self.choices))})" if self.choices else ""
        return f"{self.name}: {self.help}{choices}; default: {self.default!r}"


@dataclass(frozen=True)
class Options:
    """Base of the options of a method: a frozen dataclass whose fields are :func:`option`; values are checked."""

    def __post_init__(self) -> None:
        for one in declared(type(self)):
            object.__setattr__(self, one.name, one.checked(getattr(self, one.name)))

    def noted(self) -> dict[str, Any]:
        """What a result notes of them, in plain values."""
        chosen = {one.name: getattr(self, one.name) for one in declared(type(self)) if one.noted}
        return {name: _plain(value) for name, value in chosen.items()}


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no infinity."""
    return list(value) if isinstance(value, tuple) else "inf" if value == inf else value


def declared(options: type) -> list[Declared]:
    """The options of a class, in the order in which they were declared."""
    found = []
    for f in fields(options):
        default = None if f.default is MISSING else f.default
        meta: dict[str, Any] = {"help": "", "choices": None, "check": None, "noted": True} | dict(f.metadata)
        type_ = f.type if isinstance(f.type, str) else formatannotation(f.type)
        found.append(Declared(f.name, default, type=type_, **meta))
    return found


def one_of(name: str, value: Any, known: Iterable[Any]) -> Any:
    """Raises InputError unless ``value`` is one of the known ones."""
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def at_least(bound: int, *, optional: bool = False) -> _Check:
    """A check for whole numbers >= ``bound``, or None where the option is optional."""

    def check(name: str, value: Any) -> Any:
        if value is None and optional:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise InputError(f"{name} must be a whole number >= {bound}, got {value!r}")
        return value

    return check


Hops = Union[int, float, str]
"""A whole number of hops; "auto", as many as have something to follow; or infinity, all of them at once."""


def _checked_hops(name: str, hops: Any) -> Hops:
    """Raises InputError unless ``hops`` is a whole number >= 0, "auto" or infinity."""
    if hops in ("auto", "inf", inf):
        return inf if hops == "inf" else hops
    if not isinstance(hops, int) or isinstance(hops, bool) or hops < 0:
        raise InputError(
            f"{name} must be a whole number >= 0, 'auto' or infinity, got {hops!r}; 0 explains the target without "
            "recursion"
        )
    return hops


def _checked_ignore(name: str, ignore: Any) -> tuple[str | int, ...]:
    """Raises InputError unless it is a collection of texts and ids."""
    tokens = () if isinstance(ignore, str) or not isinstance(ignore, Iterable) else tuple(ignore)
    if (not tokens and ignore) or not all(isinstance(t, (str, int)) for t in tokens):
        raise InputError(
            f"{name} must be a list of tokens, as texts or ids, got {ignore!r}; for one token use [token]"
        )
    return tokens


def _checked_format(name: str, choice: FormatChoice) -> FormatChoice:
    """Raises InputError unless it is a known reasoning format or a pair of markers."""
    chosen_formats(choice)
    return tuple(choice) if isinstance(choice, list) else choice


def _checked_cost(name: str, cost: float | None) -> float | None:
    """Raises InputError unless it is a number above 0, or None."""
    if cost is not None and (not isinstance(cost, (int, float)) or isinstance(cost, bool) or not cost > 0):
        raise InputError(
            f"{name} must be a number of forward passes above 0, or None (null on the command line) for no bound, got "
            f"{cost!r}"
        )
    return cost


_MAX_COST = 10_000
"""Forward passes of a text: more than an hour where one takes half a second, too long to wait for unasked."""


@dataclass(frozen=True)
class Driving(Options):
    """The options that the driver understands; a method says in ``drives`` which of them mean something for it."""

    hops: Hops = option(
        1,
        "times that importance is followed through the reasoning; 'auto' stops when a thousandth is left; infinity is "
        "all hops at once, for methods with a row for every token",
        check=_checked_hops,
    )
    recursion: str = option(
        "reasoning",
        "what mass is followed through: the reasoning (the paper), reasoning and target, or all before the target",
        choices=("reasoning", "generation", "prompt"),
    )
    positions: str = option(
        "token",
        "which position stands for a token: its own (the paper), or the one to its left, whose logits produced it",
        choices=("token", "predicting"),
    )
    ignore: Iterable[str | int] = option(
        (), "tokens left out of targets and scores, as ids or as texts without space around", check=_checked_ignore
    )
    sinks: str = option(
        "keep",
        "positions of the prompt that draw mass whatever the target: left as they are; measured and told, for one "
        "more hop; or left out of scores and hops as well",
        choices=("keep", "report", "drop"),
    )
    format: FormatChoice = option(
        None, "reasoning format, by name or as its two markers; None looks for all", check=_checked_format
    )
    max_cost: float | None = option(
        _MAX_COST,
        "forward passes of this text that a run may take by its estimate; what takes more is refused before it "
        "begins, with the estimate; None: no bound",
        check=_checked_cost,
        noted=False,
    )


def driven(**defaults: Any) -> Mapping[str, Any]:
    """What a method writes as its ``drives``: the driver's options it takes, by name, with their defaults there.

    Every method finds its spans, and every run takes time, so all of them take ``format`` and ``max_cost``.
    """
    return MappingProxyType({"format": None, "max_cost": _MAX_COST} | defaults)

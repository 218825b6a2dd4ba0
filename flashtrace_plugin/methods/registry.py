"""Methods by name. A method that is registered here exists in every host and on the command line.

Other packages register theirs with :func:`register_method`, or declare them in their ``pyproject.toml`` under the
entry-point group ``flashtrace_plugin.methods``; those are imported when they are asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from flashtrace_plugin.errors import MethodError

if TYPE_CHECKING:
    from flashtrace_plugin.methods.base import Method

_GROUP = "flashtrace_plugin.methods"

BUILT_IN = {
    "recommended": ("flashtrace_plugin.methods.recommended", "Recommended"),
    "flashtrace": ("flashtrace_plugin.methods.flashtrace", "FlashTrace"),
    "ifr": ("flashtrace_plugin.methods.ifr", "IFR"),
    "recursive": ("flashtrace_plugin.methods.recursive", "RecursiveAttribution"),
    "alti": ("flashtrace_plugin.methods.alti", "ALTI"),
    "lrp": ("flashtrace_plugin.methods.lrp", "LRP"),
    "heta": ("flashtrace_plugin.methods.heta", "HETA"),
}
"""The package's own methods: module and class, imported when they are asked for."""

M = TypeVar("M", bound="type[Method]")


class Registry(Mapping[str, "type[Method]"]):
    """Looks classes up by name and imports their module when they are asked for."""

    def __init__(self) -> None:
        self._registered: dict[str, type[Method]] = {}
        self._listeners: list[Callable[[type[Method]], object]] = []

    def __getitem__(self, name: str) -> type[Method]:
        if name in self._registered:
            return self._registered[name]
        if name in BUILT_IN:
            module, cls = BUILT_IN[name]
            return getattr(import_module(module), cls)
        return self._load(_declared_elsewhere()[name])

    def __iter__(self) -> Iterator[str]:
        return iter({**BUILT_IN, **_declared_elsewhere(), **self._registered})

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in set(iter(self))

    def add(self, method: M) -> M:
        """Registers a class under its name and tells the hosts. Raises MethodError for one that cannot be."""
        from flashtrace_plugin.methods.base import Method, check_declaration

        if not (isinstance(method, type) and issubclass(method, Method)):
            raise MethodError(f"register_method takes a subclass of flashtrace_plugin.Method, got {method!r}")
        check_declaration(method)
        owner = self._owner(method.name)
        mine = f"{method.__module__}.{method.__qualname__}"
        if owner not in (None, mine):
            raise MethodError(f"the method name {method.name!r} is taken by {owner}; name {mine} otherwise")
        self._registered[method.name] = method
        for tell in self._listeners:
            tell(method)
        return method

    def subscribe(self, tell: Callable[[type[Method]], object]) -> None:
        """Calls ``tell`` with every method there is, and with every one that is registered later."""
        self._listeners.append(tell)
        for name in self:
            try:
                method = self[name]
            except MethodError as error:  # another package's; the hosts work without it
                warnings.warn(str(error), stacklevel=3)
            else:
                tell(method)

    def _owner(self, name: str) -> str | None:
        """Where the method of this name comes from, as module and class."""
        if name in self._registered:
            cls = self._registered[name]
            return f"{cls.__module__}.{cls.__qualname__}"
        if name in BUILT_IN:
            return ".".join(BUILT_IN[name])
        found = _declared_elsewhere().get(name)
        return None if found is None else found.value.replace(":", ".")

    def _load(self, entry: EntryPoint) -> type[Method]:
        try:
            method: Any = entry.load()
        except (ImportError, AttributeError) as error:
            raise MethodError(
                f"the method {entry.name!r}, declared as {entry.value}, cannot be imported: {error}; mend or "
                "uninstall the package that declares it"
            ) from error
        if getattr(method, "name", None) != entry.name:
            raise MethodError(f"{entry.value} is declared as {entry.name!r}, but its name is not that; rename either")
        return self.add(method)


def _declared_elsewhere() -> dict[str, EntryPoint]:
    """Entry points of other packages by name; the package's own names are never replaced."""
    return {entry.name: entry for entry in entry_points(group=_GROUP) if entry.name not in BUILT_IN}


METHODS = Registry()
"""Methods by name, as hosts and the command line choose them."""


def register_method(method: M) -> M:
    """Makes a method known to all hosts and to the command line, under its ``name``; usable as a decorator.

    Raises MethodError for a class that is no Method, a name that is taken, and options that clash with the driver's.
    """
    return METHODS.add(method)

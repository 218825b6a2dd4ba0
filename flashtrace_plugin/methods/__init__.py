"""The methods, each one declaration, and what a method of your own is declared with (docs/adding-a-method.md).

:mod:`flashtrace_plugin.methods.base` is the door, :mod:`flashtrace_plugin.methods.driver` runs the hops.
"""

from importlib import import_module
from typing import Any

from flashtrace_plugin.methods.options import Options, driven, option
from flashtrace_plugin.methods.registry import BUILT_IN, METHODS, register_method

_LAZY = {
    "Hop": "flashtrace_plugin.core.recursion",
    "Method": "flashtrace_plugin.methods.base",
    "Rows": "flashtrace_plugin.core.recursion",
    "Task": "flashtrace_plugin.methods.task",
    "weighted_flow": "flashtrace_plugin.core.flow.pattern",
} | {cls: module for module, cls in BUILT_IN.values()}

__all__ = ["METHODS", "Options", "driven", "option", "register_method"]


def __getattr__(name: str) -> Any:
    """What needs torch, and the package's own classes, imported on first use."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

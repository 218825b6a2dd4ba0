"""The method that cites and blames: by name, with its options, and without what only draws mass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.options import one_of
from flashtrace_plugin.methods.registry import METHODS


def explainer(model: Any, tokenizer: Any, method: str, options: Mapping[str, Any]) -> Method:
    """A method by its name, with a tokenizer.

    Raises InputError for an unknown method or no tokenizer, TypeError for an option that the method has not.
    """
    cls = METHODS[one_of("method", method, METHODS)]
    # A sink explains nothing, and would count for the unit that it stands in.
    dropped = {"sinks": "drop"} if "sinks" in cls.drives else {}
    made = cls(model, tokenizer, **(dropped | dict(options)))
    if made.tokenizer is None:
        raise InputError("texts need a tokenizer: pass one as the second argument")
    return made

"""What can be compared, by name: every registered method with its options, and every baseline.

scorer_of("lrp:rule=attn:hops=2", model)(case)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

from flashtrace_plugin.errors import InputError, ReasoningWarning
from flashtrace_plugin.evaluation.baselines import ALIASES, BASELINES
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.metrics.scores import Scores
from flashtrace_plugin.methods import METHODS

Scorer = Callable[[Case], Scores]
"""An explanation of one case: an Attribution, or scores [prompt_length], higher for what matters more."""


def scorer(method: Any) -> Scorer:
    """A method as a function of a case."""

    def scores(case: Case) -> Scores:
        with warnings.catch_warnings():
            if case.reasoning is None:  # which is known, so there is nothing to warn about
                warnings.simplefilter("ignore", ReasoningWarning)
            return method.attribute_ids(case.input_ids, **case.spans)

    return scores


def scorer_of(name: str, model: Any) -> Scorer:
    """A contestant by name, ``NAME`` or ``NAME:option=value:option=value`` with values as JSON or plain words.

    Raises InputError for an unknown name or option, before anything is run.
    """
    method, options = _parsed(ALIASES.get(name, name))
    if method in BASELINES:
        if options:
            raise InputError(f"the baseline {method!r} has no options, got {', '.join(options)}")
        explain = BASELINES[method].explain
        return lambda case: explain(model, case)
    if method not in METHODS:
        known = ", ".join([*METHODS, *ALIASES, *BASELINES])
        raise InputError(f"method is {method!r}; known ones are {known}")
    quiet = {"progress": False} if method == "heta" else {}
    try:
        return scorer(METHODS[method](model, **({"max_cost": None} | quiet | options)))
    except TypeError as error:
        raise InputError(f"{name!r}: {error}") from error


def method_label(name: str) -> str:
    """A contestant's name for readers: ``lrp (rule attn, hops 2)``."""
    method, options = _parsed(name)
    if not options:
        return method.replace("_", " ")
    return f"{method} ({', '.join(f'{key} {value}' for key, value in options.items())})"


def _parsed(name: str) -> tuple[str, dict[str, Any]]:
    method, *pairs = name.split(":")
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"{pair!r} in {name!r} is not option=value; write NAME:option=value:option=value")
        options[key] = _typed(value)
    return method, options


def _typed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value

"""The settings of an attribution as Python that makes it again."""

from __future__ import annotations

from pprint import pformat
from typing import Any

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.methods.base import options_of
from flashtrace_plugin.methods.registry import METHODS
from flashtrace_plugin.spans import Span


def as_code(attribution: Attribution) -> str:
    """Python that makes the attribution again, from its token ids; a comment where the method is not known here."""
    options = _options(attribution)
    if options is None:
        return f"# the method {attribution.method!r} is not registered here; its settings are in the list above"
    ids = pformat(list(attribution.token_ids), width=100, compact=True).replace("\n", "\n    ")
    reasoning = "" if attribution.reasoning is None else f", reasoning={_span(attribution.reasoning)}"
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    # What a file names as its model is a string that nobody has checked: repr keeps it one.
    return (
        "import torch\n"
        "from flashtrace_plugin import Span\n"
        "from flashtrace_plugin.evaluation import models\n"
        "from flashtrace_plugin.methods.registry import METHODS\n\n"
        f"model, tokenizer = models.load({str(attribution.settings.get('model', ''))!r})\n"
        f"method = METHODS[{attribution.method!r}](model, tokenizer{arguments})\n"
        f"ids = torch.tensor(\n    {ids}\n)\n"
        f"found = method.attribute_ids(\n    ids, prompt_length={attribution.prompt.stop}, "
        f"target={_span(attribution.target)}{reasoning}\n)\n"
    )


def _options(attribution: Attribution) -> dict[str, Any] | None:
    """The options that are not the method's defaults, as they were noted; None for an unknown method."""
    if attribution.method not in METHODS:
        return None
    defaults = {one.name: one.default for one in options_of(METHODS[attribution.method])}
    known = {name: _read(value) for name, value in attribution.settings.items() if name in defaults}
    return {name: value for name, value in known.items() if value != _read(defaults[name])}


def _read(value: Any) -> Any:
    """A noted option as the method takes it; infinity has a name in JSON."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_read, value))
    return float("inf") if value == "inf" else value


def _span(span: Span) -> str:
    return f"Span({span.start}, {span.stop})"

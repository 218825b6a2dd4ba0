"""Which words of the prompt caused the answer of a language model that reasoned its way to it.

Start with ``FlashTrace(model, tokenizer).attribute(prompt, generation).top(5)``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashtrace_plugin.errors import ClosureError, FlashTraceError, InputError, SpanError, UnsupportedModelError
from flashtrace_plugin.spans import Span

if TYPE_CHECKING:
    from flashtrace_plugin.attribution import Attribution
    from flashtrace_plugin.methods.flashtrace import IFR, FlashTrace, RecursiveAttribution
    from flashtrace_plugin.methods.heta import HETA

__version__ = "0.1.0"

# Imported on first use, so that importing the package does not wait for torch and transformers.
_LAZY = {
    "Attribution": "flashtrace_plugin.attribution",
    "FlashTrace": "flashtrace_plugin.methods.flashtrace",
    "HETA": "flashtrace_plugin.methods.heta",
    "IFR": "flashtrace_plugin.methods.flashtrace",
    "RecursiveAttribution": "flashtrace_plugin.methods.flashtrace",
}

__all__ = [
    "HETA",
    "IFR",
    "Attribution",
    "ClosureError",
    "FlashTrace",
    "FlashTraceError",
    "InputError",
    "RecursiveAttribution",
    "Span",
    "SpanError",
    "UnsupportedModelError",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Which words of the prompt caused the answer of a language model that reasoned its way to it.

Start with ``FlashTrace(model, tokenizer).attribute(prompt, generation).top(5)``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashtrace_plugin.errors import (
    ClosureError,
    CostError,
    FlashTraceError,
    InputError,
    MethodError,
    ReasoningWarning,
    SpanError,
    UnsupportedModelError,
)
from flashtrace_plugin.methods.registry import register_method
from flashtrace_plugin.spans import Span

if TYPE_CHECKING:
    from flashtrace_plugin.attribution import Attribution
    from flashtrace_plugin.graph.result import Graph
    from flashtrace_plugin.methods.alti import ALTI
    from flashtrace_plugin.methods.base import Method
    from flashtrace_plugin.methods.flashtrace import FlashTrace
    from flashtrace_plugin.methods.heta import HETA
    from flashtrace_plugin.methods.ifr import IFR
    from flashtrace_plugin.methods.lrp import LRP
    from flashtrace_plugin.methods.recommended import Recommended, explain
    from flashtrace_plugin.methods.recursive import Recursive, RecursiveAttribution
    from flashtrace_plugin.served import read_response
    from flashtrace_plugin.sources.blame import blame
    from flashtrace_plugin.sources.citations import cite
    from flashtrace_plugin.text import Conversation
    from flashtrace_plugin.units.targets import Line, Sentence, ToolCall

__version__ = "0.1.0"

# Imported on first use, so that importing the package does not wait for torch and transformers.
_LAZY = {
    "ALTI": "flashtrace_plugin.methods.alti",
    "Attribution": "flashtrace_plugin.attribution",
    "Conversation": "flashtrace_plugin.text",
    "FlashTrace": "flashtrace_plugin.methods.flashtrace",
    "Graph": "flashtrace_plugin.graph.result",
    "HETA": "flashtrace_plugin.methods.heta",
    "IFR": "flashtrace_plugin.methods.ifr",
    "LRP": "flashtrace_plugin.methods.lrp",
    "Line": "flashtrace_plugin.units.targets",
    "Method": "flashtrace_plugin.methods.base",
    "Recommended": "flashtrace_plugin.methods.recommended",
    "Recursive": "flashtrace_plugin.methods.recursive",
    "RecursiveAttribution": "flashtrace_plugin.methods.recursive",
    "Sentence": "flashtrace_plugin.units.targets",
    "ToolCall": "flashtrace_plugin.units.targets",
    "blame": "flashtrace_plugin.sources.blame",
    "cite": "flashtrace_plugin.sources.citations",
    "explain": "flashtrace_plugin.methods.recommended",
    "read_response": "flashtrace_plugin.served",
}

__all__ = [
    "ALTI",
    "HETA",
    "IFR",
    "LRP",
    "Attribution",
    "ClosureError",
    "Conversation",
    "CostError",
    "FlashTrace",
    "FlashTraceError",
    "Graph",
    "InputError",
    "Line",
    "Method",
    "MethodError",
    "ReasoningWarning",
    "Recommended",
    "Recursive",
    "RecursiveAttribution",
    "Sentence",
    "Span",
    "SpanError",
    "ToolCall",
    "UnsupportedModelError",
    "blame",
    "cite",
    "explain",
    "read_response",
    "register_method",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Every registered method as an attribution class of Captum, under the name of its class.

``FlashTrace(model).attribute(ids, target=slice(a, b), reasoning=slice(c, d))`` for token ids, and
``LLMTraceAttribution(FlashTrace(model), tokenizer).attribute(inp)`` for Captum's text inputs. A method
that is registered later is here as well: ``flashtrace_captum.Rollout(model)``. ``recursive(Saliency(model))`` follows
what a method of Captum finds through the reasoning.
"""

from typing import Any

from flashtrace_plugin.errors import FlashTraceError
from flashtrace_plugin.methods import METHODS

try:
    from captum.attr._core.llm_attr import BaseLLMAttribution  # noqa: F401
except ImportError as error:
    raise ImportError(
        "flashtrace_captum needs captum >= 0.9 and matplotlib: pip install 'flashtrace-plugin[captum]'"
    ) from error

from flashtrace_captum.base import TokenAttribution, TokenScores
from flashtrace_captum.classes import class_named
from flashtrace_captum.errors import CaptumInputError, TargetError, TemplateError
from flashtrace_captum.inputs import TokenIdsInput
from flashtrace_captum.llm import LLMTraceAttribution
from flashtrace_captum.recursion import RecursiveTokens, recursive
from flashtrace_captum.result import LLMTraceAttributionResult

__all__ = [
    "HETA",
    "IFR",
    "CaptumInputError",
    "FlashTrace",
    "FlashTraceError",
    "LLMTraceAttribution",
    "LLMTraceAttributionResult",
    "RecursiveAttribution",
    "RecursiveTokens",
    "TargetError",
    "TemplateError",
    "TokenAttribution",
    "TokenIdsInput",
    "TokenScores",
    "recursive",
]


def __getattr__(name: str) -> Any:
    """The Captum class of a registered method, by the name of its class."""
    return class_named(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *(method.__name__ for method in METHODS.values())})

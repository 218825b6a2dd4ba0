"""FlashTrace and its kin as attribution methods of Captum.

``FlashTrace(model).attribute(ids, target=slice(a, b), reasoning=slice(c, d))`` for token ids, and
``LLMTraceAttribution(FlashTrace(model), tokenizer).attribute(inp)`` for Captum's text inputs.
"""

from flashtrace_plugin.errors import FlashTraceError

try:
    from captum.attr._core.llm_attr import BaseLLMAttribution  # noqa: F401
except ImportError as error:
    raise ImportError(
        "flashtrace_captum needs captum >= 0.9 and matplotlib: pip install 'flashtrace-plugin[captum]'"
    ) from error

from flashtrace_captum.base import TokenAttribution, TokenScores
from flashtrace_captum.errors import CaptumInputError, TargetError, TemplateError
from flashtrace_captum.heta import HETA
from flashtrace_captum.inputs import TokenIdsInput
from flashtrace_captum.llm import LLMTraceAttribution
from flashtrace_captum.methods import IFR, FlashTrace, RecursiveAttribution
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
    "TargetError",
    "TemplateError",
    "TokenAttribution",
    "TokenIdsInput",
    "TokenScores",
]

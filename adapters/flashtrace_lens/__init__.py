"""FlashTrace for TransformerLens: hand over a ``TransformerBridge`` or an ``ActivationCache``.

    result = flashtrace(bridge, tokens, target=(120, 124), reasoning=(31, 118))

Every registered method is a function of its name here: ``flashtrace_lens.ifr``, ``flashtrace_lens.heta``, and those
that are registered later. ``FlashTrace(bridge)`` and all other classes of flashtrace_plugin take a bridge as well.
"""

from collections.abc import Callable

from flashtrace_lens.host import require_host

require_host()

from flashtrace_lens.analysis import analysis_of, flashtrace  # noqa: E402
from flashtrace_lens.blocks import names_filter  # noqa: E402
from flashtrace_lens.boot import bridge_for  # noqa: E402
from flashtrace_lens.result import FlashTraceResult  # noqa: E402
from flashtrace_lens.sources import source  # noqa: E402
from flashtrace_plugin.methods.registry import METHODS  # noqa: E402

__all__ = ["FlashTraceResult", "bridge_for", "flashtrace", "names_filter", "source"]


def __getattr__(name: str) -> Callable[..., FlashTraceResult]:
    """A registered method as a function of a bridge."""
    if not name.startswith("_") and name in METHODS:
        return analysis_of(METHODS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has the methods {', '.join(METHODS)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *METHODS})

"""FlashTrace for TransformerLens: hand over a ``TransformerBridge`` or an ``ActivationCache``.

    result = flashtrace(bridge, tokens, target=(120, 124), reasoning=(31, 118))

``FlashTrace(bridge)``, ``IFR(bridge)`` and ``RecursiveAttribution(bridge)`` of flashtrace_plugin work as well.
"""

from flashtrace_lens.host import require_host

require_host()

from flashtrace_lens.analysis import FlashTraceResult, flashtrace  # noqa: E402
from flashtrace_lens.blocks import names_filter  # noqa: E402
from flashtrace_lens.boot import bridge_for  # noqa: E402
from flashtrace_lens.sources import source  # noqa: E402

__all__ = ["FlashTraceResult", "bridge_for", "flashtrace", "names_filter", "source"]

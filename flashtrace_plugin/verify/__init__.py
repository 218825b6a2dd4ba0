"""Whether an explanation holds when the text is really changed; see docs/verify.md."""

from flashtrace_plugin.verify.result import Verification

__all__ = ["Verification"]

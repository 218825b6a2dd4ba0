"""An earlier home of :mod:`flashtrace_plugin.models.read.attention`, kept for code that imports it from here."""

from flashtrace_plugin.models.read.attention import AttentionCall

__all__ = ["AttentionCall"]

"""An earlier home of :mod:`flashtrace_plugin.methods.heta`, kept for code that imports it from here."""

from flashtrace_plugin.methods.heta import ABLATIONS, HETA, PRESETS

__all__ = ["ABLATIONS", "HETA", "PRESETS"]

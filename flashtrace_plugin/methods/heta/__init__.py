"""HETA: the method, its three terms read from a model, and the settings that the paper names."""

from flashtrace_plugin.methods.heta.method import HETA
from flashtrace_plugin.methods.heta.options import ABLATIONS, PRESETS

__all__ = ["ABLATIONS", "HETA", "PRESETS"]

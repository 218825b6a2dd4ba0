"""An earlier home of :mod:`flashtrace_plugin.models.read.layouts`, kept for code that imports it from here."""

from flashtrace_plugin.models.read.layouts import Layout, layout_for, register_layout, supported_families

__all__ = ["Layout", "layout_for", "register_layout", "supported_families"]

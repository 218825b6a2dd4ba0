"""An earlier home of :mod:`flashtrace_plugin.evaluation.metrics`, kept for code that imports it from here."""

from flashtrace_plugin.evaluation.metrics import *  # noqa: F403

"""An earlier home of :mod:`flashtrace_plugin.evaluation.tasks`, kept for code that imports it from here."""

from flashtrace_plugin.evaluation.tasks import *  # noqa: F403

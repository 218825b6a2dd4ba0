"""Thousands of answers explained, on one device or many, and nothing lost: see docs/runs.md."""

from flashtrace_plugin.runs.data_set import DataSet
from flashtrace_plugin.runs.engine import Summary, run
from flashtrace_plugin.runs.recipe import Recipe
from flashtrace_plugin.runs.results import failures, read, to_frame

__all__ = ["DataSet", "Recipe", "Summary", "failures", "read", "run", "to_frame"]

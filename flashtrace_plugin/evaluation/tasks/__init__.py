"""Synthetic tasks whose evidence is known, to check explanations against; needs only the standard library."""

from flashtrace_plugin.evaluation.tasks.generators import TASKS, make, needle_retrieval, variable_tracking
from flashtrace_plugin.evaluation.tasks.sample import Sample

__all__ = ["TASKS", "Sample", "make", "needle_retrieval", "variable_tracking"]

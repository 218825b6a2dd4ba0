"""Relevance propagation: a model's own computation, linearised while it runs.

The mode :class:`~flashtrace_plugin.core.relevance.rules.Rules` gives every torch function whose derivative is not
the wanted one the derivative of its linearisation; :mod:`~flashtrace_plugin.core.relevance.nodes` are the steps that
it puts into the graph, :mod:`~flashtrace_plugin.core.relevance.attention` is fused attention, and
:mod:`~flashtrace_plugin.core.relevance.severed` finds what goes past the graph.
"""

"""Errors in both manners: Captum's callers expect AssertionError for wrong arguments, ours FlashTraceError."""

from __future__ import annotations

from flashtrace_plugin.errors import InputError, SpanError


class TargetError(SpanError, AssertionError):
    """A target or reasoning position that the inputs do not have."""


class CaptumInputError(InputError, AssertionError):
    """An argument that Captum would refuse with an assertion."""


class TemplateError(InputError):
    """A template slot that cannot be traced to the characters it fills."""

"""What a report suggests to a reader who could know more."""

from __future__ import annotations

from flashtrace_plugin.attribution import Attribution


def advice(attribution: Attribution) -> str:
    """A sentence for results of the paper's FlashTrace, whose rows are already about the next token; else empty."""
    if attribution.method != "flashtrace" or attribution.settings.get("positions") != "token":
        return ""
    return "The method “recommended” finds the evidence better, see docs/recommended.md"

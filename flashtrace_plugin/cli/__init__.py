"""The command line."""

from flashtrace_plugin.cli.app import app, main

__all__ = ["app", "main"]

"""Runs what is documented as ``python -m module …`` inside the test, as its own main module."""

from __future__ import annotations

import runpy
import shlex
from types import SimpleNamespace
from unittest import mock

import pytest


def run(module: str, arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints; an exit status other than 0 is an error."""
    argv = mock.patch("sys.argv", [module, *shlex.split(arguments)])
    try:
        with argv:
            runpy.run_module(module, run_name="__main__", alter_sys=False)
    except SystemExit as done:
        if done.code:
            raise AssertionError(capsys.readouterr().err) from done
    return capsys.readouterr().out


def script(module: str) -> SimpleNamespace:
    """What a script defines, without running its command."""
    return SimpleNamespace(**runpy.run_module(module, run_name=module))

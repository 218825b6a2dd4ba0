"""Layers look down only: core imports torch alone, the package imports no host, importing it is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flashtrace_plugin

ROOT = Path(flashtrace_plugin.__file__).parent
HOSTS = {"inseq", "captum", "transformer_lens"}


def imports(path: Path) -> set[str]:
    """Top-level names, and for our own package the part below it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found |= {
            n.removeprefix("flashtrace_plugin.").partition(".")[0] if n != "flashtrace_plugin" else n for n in names
        }
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_core_imports_torch_and_the_standard_library_only(path):
    allowed = set(sys.stdlib_module_names) | {"torch", "core", "errors", "flashtrace_plugin"}
    assert imports(path) <= allowed


def at_import(path: Path) -> set[str]:
    """Modules imported when the file is, not inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_package_imports_no_host(path):
    assert not at_import(path) & HOSTS


def test_importing_the_package_does_not_wait_for_torch():
    code = "import flashtrace_plugin, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    for name in flashtrace_plugin.__all__:
        assert getattr(flashtrace_plugin, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = flashtrace_plugin.Nothing

"""Layers look down only, no file imports in a circle, no two things have one name; importing the package is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flashtrace_plugin
from tests import imports, names

ROOT = Path(flashtrace_plugin.__file__).parent
HOSTS = {"inseq", "captum", "transformer_lens"}
ADAPTERS = {"flashtrace_inseq", "flashtrace_captum", "flashtrace_lens"}

LAYERS = (
    {"errors"},
    {"core", "spans", "positions", "formats", "images", "messages", "text", "saved", "served", "frames", "units"},
    {"attribution", "models"},
    {"methods"},
    {"loading", "reasoner", "evaluation", "report", "graph", "verify", "sources"},
    {"cli", "demo", "runs", "serve"},
)
"""The parts of the package, from the bottom up; a part imports from its own layer and from those before it."""

SHIMS = {"heta", "metrics", "tasks", "models.layouts", "models.attention"}
"""Earlier homes that are kept for code which imports from them. They define nothing."""

TWICE = {
    **dict.fromkeys(("FlashTrace", "IFR", "RecursiveAttribution", "HETA"), "Captum's classes have the methods' names"),
    "main": "what a command runs",
    "run": "runs.run(rows, method, out) is documented under this name; the other runs a comparison of methods",
    "failures": "inputs that could not be explained, of a run's folder and of Inseq's output",
    "recursive": "what turns a result or a method of Inseq, of Captum, into its recursive form",
    "load": "reasoner.load() and loading.load(name) are documented under these names",
}
"""Public names that may be defined twice, and why."""


def below(module: str) -> str:
    """The part of the package that a module belongs to; the package itself counts as what it re-exports."""
    return module.split(".")[1] if "." in module else "methods"


def own(module: str) -> bool:
    return module.partition(".")[0] == "flashtrace_plugin" and module.partition(".")[2] not in SHIMS


def test_every_part_looks_down():
    rank = {part: level for level, parts in enumerate(LAYERS) for part in parts}
    modules = [m for m in imports.graph() if own(m) and m != "flashtrace_plugin.__main__"]
    unknown = {below(m) for m in modules} - set(rank)
    assert not unknown, f"say in LAYERS where {unknown} belong"
    up = [(m, d) for m in modules for d in imports.graph()[m] if rank[below(d)] > rank[below(m)]]
    assert not up, "\n".join(f"{m} imports {d}" for m, d in up)


def test_the_package_imports_no_host_and_no_adapter():
    for path in sorted(ROOT.rglob("*.py")):
        assert not {name.partition(".")[0] for name in imports.imported(path)} & (HOSTS | ADAPTERS), path


def test_no_adapter_imports_another():
    for module, found in imports.graph().items():
        home = module.partition(".")[0]
        assert home not in ADAPTERS or not {d.partition(".")[0] for d in found} & (ADAPTERS - {home}), module


def test_nobody_uses_the_earlier_homes():
    homes = {f"flashtrace_plugin.{name}" for name in SHIMS}
    assert not {(m, d) for m, found in imports.graph().items() for d in found & homes if m not in homes}
    for home in homes:
        assert not names.public(ROOT.parent / Path(*home.split(".")).with_suffix(".py"))


def test_no_file_imports_in_a_circle():
    assert not imports.cycle(imports.graph())
    assert imports.cycle({"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("b")}) == ["b", "c", "b"]


def test_core_imports_torch_and_the_standard_library_only():
    allowed = set(sys.stdlib_module_names) | {"torch"}
    for path in sorted((ROOT / "core").rglob("*.py")):
        for name in every_import(path):
            ours = name.startswith(("flashtrace_plugin.core", "flashtrace_plugin.errors"))
            assert ours or name.partition(".")[0] in allowed, f"{path} imports {name}"


def test_tests_and_benchmarks_do_not_import_each_other():
    for folder, other in (("tests", "benchmarks"), ("benchmarks", "tests")):
        for path in sorted((names.ROOT / folder).rglob("*.py")):
            assert other not in {name.partition(".")[0] for name in every_import(path)}, path


def every_import(path: Path) -> set[str]:
    """Modules imported anywhere in a file, inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_no_two_things_have_one_name():
    found = {name: paths for name, paths in names.twice().items() if name not in TWICE}
    assert not found, names.report()


def test_what_only_its_own_module_uses_is_private():
    assert not names.used_at_home(), names.report()


def test_importing_the_package_does_not_wait_for_torch():
    code = "import flashtrace_plugin, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    for name in flashtrace_plugin.__all__:
        assert getattr(flashtrace_plugin, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = flashtrace_plugin.Nothing

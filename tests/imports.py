"""Which module of the package imports which when it is imported itself; imports for type checkers are left out."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from tests.names import ROOT, SOURCES, files


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    root = ROOT if SOURCES[0] in path.parents else SOURCES[1]
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


@cache
def graph() -> dict[str, frozenset[str]]:
    """The modules that every module imports; a name of a package counts as its module if there is one."""
    known = {module_of(path) for path in files()}
    found = {}
    for path in files():
        module = module_of(path)
        nearest = (_nearest(name, known) for name in imported(path))
        found[module] = frozenset(name for name in nearest if name and name != module)
    return found


def imported(path: Path) -> list[str]:
    """Dotted names that a file imports at its top level."""
    found = []
    for node in _statements(ast.parse(path.read_text(encoding="utf-8")).body):
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        found += [prefix + alias.name for alias in node.names]
    return found


def cycle(edges: Mapping[str, frozenset[str]]) -> list[str]:
    """One path of modules that leads back to its first; empty if there is none."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        found = next((c for target in sorted(edges[module]) if (c := follow(target, [*path, module]))), [])
        done.add(module)
        return found

    return next((c for module in sorted(edges) if (c := follow(module, []))), [])


def _statements(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.Try):
            yield from _statements([*node.body, *node.orelse, *(s for h in node.handlers for s in h.body)])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from _statements([*node.body, *node.orelse])


def _nearest(name: str, known: set[str]) -> str:
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name

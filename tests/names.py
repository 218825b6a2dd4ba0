"""The public names of the package: functions, classes and constants of modules, without a leading underscore.

``python -m tests.names`` prints how many there are, which exist twice, and which only their own module uses.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = (ROOT / "flashtrace_plugin", ROOT / "adapters")
USERS = (*SOURCES, *(ROOT / name for name in ("tests", "benchmarks", "docs", "notebooks", "README.md")))


def files() -> list[Path]:
    """The modules of the package and of its adapters."""
    return sorted(path for folder in SOURCES for path in folder.rglob("*.py"))


def public(path: Path) -> list[str]:
    """What a module defines at its top level under a public name; what it imports is not its own."""
    return [name for node in _tree(path).body for name in _defined(node) if not name.startswith("_")]


def places() -> dict[str, list[Path]]:
    """Every public name with the modules that define it."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in files():
        for name in dict.fromkeys(public(path)):
            found[name].append(path)
    return dict(found)


def twice() -> dict[str, list[Path]]:
    """The public names that more than one module defines."""
    return {name: paths for name, paths in places().items() if len(paths) > 1}


def used_at_home() -> list[tuple[str, Path]]:
    """Public names that no other module, test, benchmark or page mentions; such a name can be private."""
    return [
        (name, path)
        for name, paths in places().items()
        for path in paths
        if not any(name in words for other, words in _words().items() if other != path)
    ]


@cache
def _words() -> dict[Path, frozenset[str]]:
    texts = [p for user in USERS for p in ([user] if user.is_file() else user.rglob("*")) if p.suffix in _READ]
    return {path: frozenset(re.findall(r"\w+", path.read_text(encoding="utf-8"))) for path in texts}


_READ = {".py", ".md", ".ipynb"}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


_CODE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, _CODE):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))


def report() -> str:
    """How many there are, and what should be changed."""
    code = sum(isinstance(node, _CODE) and not node.name.startswith("_") for p in files() for node in _tree(p).body)
    total = sum(len(paths) for paths in places().values())
    lines = [f"{total} public names in {len(files())} modules: {code} functions and classes, {total - code} others"]
    for name, paths in twice().items():
        lines.append(f"twice: {name} in {', '.join(str(path.relative_to(ROOT)) for path in paths)}")
    lines += [f"used only where it is defined: {name} in {path.relative_to(ROOT)}" for name, path in used_at_home()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())

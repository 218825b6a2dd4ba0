"""Writes docs/results.md and docs/choosing.md from the folders of runs.

python -m flashtrace_plugin.evaluation.pages runs/reasoner runs/smollm2 --docs docs
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashtrace_plugin.evaluation.pages.choosing import choosing_page
from flashtrace_plugin.evaluation.pages.results import results_page
from flashtrace_plugin.evaluation.run.manifest import write_file


def _pages(
    folders: Annotated[list[Path], typer.Argument(help="folders of `flashtrace-plugin evaluate`")],
    docs: Annotated[Path, typer.Option(help="where the pages are written")] = Path("docs"),
) -> None:
    """Write docs/results.md and docs/choosing.md."""
    for name, page in (("results", results_page), ("choosing", choosing_page)):
        write_file(docs / f"{name}.md", page(folders, docs / "images"))
        typer.echo(docs / f"{name}.md")


if __name__ == "__main__":
    typer.run(_pages)

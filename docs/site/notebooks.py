"""Takes the notebooks, which stand beside the pages in the repository, into the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files: Files, config: Any) -> Files:
    root = Path(config["config_file_path"]).parent
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        files.append(File(f"notebooks/{path.name}", str(root), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../notebooks/", "](notebooks/")

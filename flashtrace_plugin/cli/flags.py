"""Flags that commands share: which model, and how it is loaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

_MODEL: dict[str, Any] = {"rich_help_panel": "Model"}

ModelName = Annotated[
    str, typer.Option(help="Folder, hub name or .gguf file; 'reasoner' is the bundled model.", **_MODEL)
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", **_MODEL)]
Device = Annotated[str | None, typer.Option(help="As torch names it; default: an accelerator, or cpu.", **_MODEL)]
Kernel = Annotated[str | None, typer.Option(help="As transformers names it, such as sdpa.", **_MODEL)]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", **_MODEL)]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read weights that can run code.", **_MODEL)]

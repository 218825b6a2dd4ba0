"""The options that several commands share, each declared once as typer reads it from a signature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from flashtrace_plugin.cli.output import OUTPUT

_MODEL: dict[str, Any] = {"rich_help_panel": "Model"}
TEXT: dict[str, Any] = {"rich_help_panel": "Text"}
METHOD: dict[str, Any] = {"rich_help_panel": "Method"}
"""Panels of the help."""
_PRINTED: dict[str, Any] = {"rich_help_panel": "Output"}

_UNITS = ("word", "sentence", "paragraph", "step", "line", "message")


def _completed(known: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What a shell completes a value to."""
    return lambda incomplete: [name for name in known() if name.startswith(incomplete)]


def _methods() -> list[str]:
    from flashtrace_plugin.methods.registry import METHODS

    return list(METHODS)


ModelOption = Annotated[
    str, typer.Option("--model", help="Folder, hub name or .gguf file; 'reasoner' is the bundled model.", **_MODEL)
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto, float32, bfloat16 or float16.",
        autocompletion=_completed(lambda: ("auto", "float32", "bfloat16", "float16")),
        **_MODEL,
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="As torch names it; default: an accelerator, or cpu.", **_MODEL)
]
AttentionOption = Annotated[
    str | None, typer.Option("--attn-implementation", help="As transformers names it, such as sdpa.", **_MODEL)
]
RemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", **_MODEL)
]
PickleOption = Annotated[bool, typer.Option("--allow-pickle", help="Also read weights that can run code.", **_MODEL)]

PromptOption = Annotated[str | None, typer.Option("--prompt", help="The prompt.", **TEXT)]
PromptFileOption = Annotated[
    Path | None, typer.Option("--prompt-file", help="File with the prompt, read as it is; - is stdin.", **TEXT)
]
MessagesOption = Annotated[
    Path | None,
    typer.Option(
        "--messages-file", help='JSON file with chat messages, [{"role": "user", "content": "…"}, …].', **TEXT
    ),
]
GenerationOption = Annotated[
    str | None,
    typer.Option(
        "--generation", help="What followed the prompt, thinking included; default: let the model write.", **TEXT
    ),
]
GenerationFileOption = Annotated[
    Path | None, typer.Option("--generation-file", help="File with it, read as it is; - is stdin.", **TEXT)
]
NewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Most tokens that the model writes, greedily.", **TEXT)
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="What to explain: a piece of the generation, or token positions a:b, which 'tokens' lists; default: the "
        "answer.",
        **TEXT,
    ),
]
ReasoningOption = Annotated[
    str | None,
    typer.Option(
        "--reasoning", help="What to follow importance through, given likewise; default: the thinking.", **TEXT
    ),
]

MethodOption = Annotated[
    str,
    typer.Option(
        "--method",
        help="Name of a method; 'flashtrace-plugin methods' lists them.",
        autocompletion=_completed(_methods),
        **METHOD,
    ),
]
SettingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="NAME=VALUE",
        help="Any option of the method; may be repeated.",
        **METHOD,
    ),
]
YesOption = Annotated[
    bool,
    typer.Option("--yes", help="Run what takes more than --max-cost, too, and tell the estimate first.", **METHOD),
]

TopOption = Annotated[int, typer.Option("--top", min=1, help="Tokens to print.", **_PRINTED)]
ByOption = Annotated[
    str | None,
    typer.Option(
        "--by",
        help="Also print mass by 'word', 'sentence', 'paragraph', 'step', 'line' or 'message'.",
        autocompletion=_completed(lambda: _UNITS),
        **_PRINTED,
    ),
]
VerifyOption = Annotated[
    bool,
    typer.Option("--verify", help="Replace what is named in the prompt, and tell how far log P falls.", **_PRINTED),
]
VerifyUnitOption = Annotated[
    str | None,
    typer.Option("--verify-unit", help="The same by 'word', 'step', 'paragraph' …; default: 'sentence'.", **_PRINTED),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Save all numbers; - is stdout.", **OUTPUT)]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Write a report; - is stdout.", **OUTPUT)]
MarkdownOption = Annotated[
    Path | None, typer.Option("--markdown", help="Write a text with tables or notes; - is stdout.", **OUTPUT)
]
GenerationOutOption = Annotated[
    Path | None,
    typer.Option("--generation-out", help="Save what the model wrote, as soon as it is written.", **OUTPUT),
]

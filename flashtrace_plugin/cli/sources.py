"""``flashtrace-plugin cite`` and ``blame``: the documents behind every sentence, the messages behind a tool call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flashtrace_plugin.cli.inputs import only, read_file, read_prompt, typed_options
from flashtrace_plugin.cli.output import OUTPUT
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.options import one_of

_MODEL: dict[str, Any] = {"rich_help_panel": "Model"}
_TEXT: dict[str, Any] = {"rich_help_panel": "Text"}
_METHOD: dict[str, Any] = {"rich_help_panel": "Method"}

_Name = Annotated[str, typer.Option("--model", help="Folder, hub name or .gguf file.", **_MODEL)]
_Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.", **_MODEL)]
_Device = Annotated[
    str | None, typer.Option("--device", help="As torch names it; default: an accelerator, or cpu.", **_MODEL)
]
_Method = Annotated[
    str, typer.Option("--method", help="Name of a method; 'flashtrace-plugin methods' lists them.", **_METHOD)
]
_Option = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME=VALUE", help="Any option of it; may be repeated.", **_METHOD),
]
_Json = Annotated[Path | None, typer.Option("--json", help="Write all numbers.", **OUTPUT)]
_Markdown = Annotated[Path | None, typer.Option("--markdown", help="Write a text with tables or notes.", **OUTPUT)]


def cite_command(
    model: _Name,
    dtype: _Dtype = "auto",
    device: _Device = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt, documents and all.", **_TEXT)] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with it; - is stdin.", **_TEXT)] = None,
    messages_file: Annotated[Path | None, typer.Option(help="JSON file with chat messages.", **_TEXT)] = None,
    document: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="A document of the prompt, word for word; may be repeated.", **_TEXT),
    ] = None,
    documents_file: Annotated[
        Path | None, typer.Option(help='JSON file with documents, {"name": "text", …}.', **_TEXT)
    ] = None,
    answer: Annotated[str | None, typer.Option(help="What the model answered, thinking included.", **_TEXT)] = None,
    answer_file: Annotated[Path | None, typer.Option(help="File with it.", **_TEXT)] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Really replace documents, to check the sources.", **_METHOD)
    ] = True,
    method: _Method = "recommended",
    option: _Option = None,
    json_path: _Json = None,
    markdown_path: _Markdown = None,
) -> None:
    """Find the documents that each sentence of an answer comes from."""
    from flashtrace_plugin.sources.citations import cite

    asked = read_prompt(prompt, prompt_file, messages_file)
    written = only("--answer", answer, "--answer-file", read_file(answer_file))
    if written is None:
        raise InputError("no answer was given; give one of --answer and --answer-file")
    documents = _documents(document or [], documents_file)
    options = typed_options(option or [], [])
    found = cite(
        *_load(model, dtype, device), asked, written, documents=documents, method=method, verify=verify, **options
    )
    _deliver(found, json_path, markdown_path)


def blame_command(
    transcript: Annotated[
        Path, typer.Argument(help='JSON file with chat messages, or {"messages": […], "tools": […]}; - is stdin.')
    ],
    model: _Name,
    dtype: _Dtype = "auto",
    device: _Device = None,
    turn: Annotated[
        int | None, typer.Option(help="Index of the message to explain; default: the assistant's last.", **_TEXT)
    ] = None,
    call: Annotated[int | None, typer.Option(help="Index of its tool call; default: 0.", **_TEXT)] = None,
    argument: Annotated[
        str | None, typer.Option(help="An argument of the call, with dots what is inside it.", **_TEXT)
    ] = None,
    target: Annotated[str | None, typer.Option(help="A piece of the message in place of a call.", **_TEXT)] = None,
    injection: Annotated[str | None, typer.Option(help="A text whose share is asked for.", **_TEXT)] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Really replace sentences.", **_METHOD)] = False,
    method: _Method = "recommended",
    option: _Option = None,
    json_path: _Json = None,
    markdown_path: _Markdown = None,
) -> None:
    """Find the messages and sentences that made an agent call a tool."""
    from flashtrace_plugin.sources.blame import blame
    from flashtrace_plugin.units.targets import ToolCall

    if target is not None and (call is not None or argument is not None):
        raise InputError("both --target and a tool call were given; give --target, or --call and --argument")
    messages, tools = _transcript(transcript)
    made = ToolCall(call or 0)
    found = blame(
        *_load(model, dtype, device),
        messages,
        target if target is not None else made if argument is None else made.argument(argument),
        turn=turn,
        tools=tools,
        injection=injection,
        method=method,
        verify=verify,
        **typed_options(option or [], []),
    )
    _deliver(found, json_path, markdown_path)


def _load(model: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    from flashtrace_plugin.loading import DTYPES, load

    return load(model, dtype=one_of("--dtype", dtype, DTYPES), device=device)


def _json(path: Path) -> Any:
    try:
        return json.loads(read_file(path) or "")
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON ({error})") from error


def _documents(pairs: list[str], path: Path | None) -> dict[str, str]:
    """Documents by name. Raises InputError for none, for one that is no text and for a name given twice."""
    found: dict[str, str] = {}
    known = _json(path) if path is not None else {}
    if not isinstance(known, dict) or not all(isinstance(text, str) for text in known.values()):
        raise InputError(f'{path} holds no documents; write {{"name": "text", …}}')
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not equals or not name or not file:
            raise InputError(f"document {pair!r} is not of the form NAME=FILE")
        if name in known | found:
            raise InputError(f"two documents have the name {name!r}; give each its own")
        found[name] = read_file(Path(file)) or ""
    if not known and not found:
        raise InputError("no documents were given; give --document NAME=FILE or --documents-file")
    return known | found


def _transcript(path: Path) -> tuple[list[Any], list[Any] | None]:
    found = _json(path)
    messages, tools = (found.get("messages"), found.get("tools")) if isinstance(found, dict) else (found, None)
    if not isinstance(messages, list) or not messages or not isinstance(tools, (list, type(None))):
        raise InputError(
            f'{path} holds no transcript; write [{{"role": "user", "content": "…"}}, …], or an object with "messages" '
            'and "tools"'
        )
    return messages, tools


def _deliver(found: Any, json_path: Path | None, markdown_path: Path | None) -> None:
    """Writes the files that were asked for and prints the result."""
    if json_path is not None:
        json_path.write_text(json.dumps(found.to_dict(), ensure_ascii=False, indent=1), encoding="utf-8")
    if markdown_path is not None:
        markdown_path.write_text(found.to_markdown(), encoding="utf-8")
    typer.echo(str(found))

"""``flashtrace-plugin cite`` and ``blame``: the documents behind every sentence, the messages behind a tool call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flashtrace_plugin.cli import options as o
from flashtrace_plugin.cli.inputs import only, read_file, read_prompt, typed_options
from flashtrace_plugin.cli.output import console_beside, print_text, write_text
from flashtrace_plugin.cli.progress import telling
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.options import one_of


def cite_command(
    model: o.ModelOption,
    dtype: o.DtypeOption = "auto",
    device: o.DeviceOption = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt, documents and all.", **o.TEXT)] = None,
    prompt_file: o.PromptFileOption = None,
    messages_file: o.MessagesOption = None,
    document: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="A document of the prompt, word for word; may be repeated.", **o.TEXT),
    ] = None,
    documents_file: Annotated[
        Path | None, typer.Option(help='JSON file with documents, {"name": "text", …}.', **o.TEXT)
    ] = None,
    answer: Annotated[str | None, typer.Option(help="What the model answered, thinking included.", **o.TEXT)] = None,
    answer_file: Annotated[Path | None, typer.Option(help="File with it.", **o.TEXT)] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Really replace documents, to check the sources.", **o.METHOD)
    ] = True,
    method: o.MethodOption = "recommended",
    option: o.SettingOption = None,
    json_path: o.JsonOption = None,
    markdown_path: o.MarkdownOption = None,
) -> None:
    """Find the documents that each sentence of an answer comes from."""
    from flashtrace_plugin.sources.citations import cite

    asked = read_prompt(prompt, prompt_file, messages_file)
    written = only("--answer", answer, "--answer-file", read_file(answer_file))
    if written is None:
        raise InputError("no answer was given; give one of --answer and --answer-file")
    documents = _documents(document or [], documents_file)
    options = typed_options(option or [], [])
    with telling() as tell:
        loaded = _load(tell, model, dtype, device)
        found = cite(*loaded, asked, written, documents=documents, method=method, verify=verify, **options)
    _deliver(found, json_path, markdown_path)


def blame_command(
    transcript: Annotated[
        Path, typer.Argument(help='JSON file with chat messages, or {"messages": […], "tools": […]}; - is stdin.')
    ],
    model: o.ModelOption,
    dtype: o.DtypeOption = "auto",
    device: o.DeviceOption = None,
    turn: Annotated[
        int | None, typer.Option(help="Index of the message to explain; default: the assistant's last.", **o.TEXT)
    ] = None,
    call: Annotated[int | None, typer.Option(help="Index of its tool call; default: 0.", **o.TEXT)] = None,
    argument: Annotated[
        str | None, typer.Option(help="An argument of the call, with dots what is inside it.", **o.TEXT)
    ] = None,
    target: Annotated[str | None, typer.Option(help="A piece of the message in place of a call.", **o.TEXT)] = None,
    injection: Annotated[str | None, typer.Option(help="A text whose share is asked for.", **o.TEXT)] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Really replace sentences.", **o.METHOD)] = False,
    method: o.MethodOption = "recommended",
    option: o.SettingOption = None,
    json_path: o.JsonOption = None,
    markdown_path: o.MarkdownOption = None,
) -> None:
    """Find the messages and sentences that made an agent call a tool."""
    from flashtrace_plugin.sources.blame import blame
    from flashtrace_plugin.units.targets import ToolCall

    if target is not None and (call is not None or argument is not None):
        raise InputError("both --target and a tool call were given; give --target, or --call and --argument")
    messages, tools = _transcript(transcript)
    made = ToolCall(call or 0)
    with telling() as tell:
        found = blame(
            *_load(tell, model, dtype, device),
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


def _load(tell: Callable[[str], None], model: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    from flashtrace_plugin.loading import DTYPES, load

    one_of("--dtype", dtype, DTYPES)
    tell(f"Loading {model}")
    loaded = load(model, dtype=dtype, device=device)
    tell("Looking for the sources")
    return loaded


def _json(path: Path) -> Any:
    try:
        return json.loads(read_file(path) or "")
    except (ValueError, RecursionError) as error:
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
    console = console_beside(json_path, markdown_path)
    write_text(json_path, json.dumps(found.to_dict(), ensure_ascii=False, indent=1))
    write_text(markdown_path, found.to_markdown())
    print_text(console, str(found))

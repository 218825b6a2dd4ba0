"""The command line: ``flashtrace-plugin attribute``, ``show`` and ``families``.

torch and transformers are imported by the commands that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flashtrace_plugin import __version__
from flashtrace_plugin.errors import FlashTraceError, InputError
from flashtrace_plugin.spans import Span

if TYPE_CHECKING:
    from flashtrace_plugin.attribution import Attribution
    from flashtrace_plugin.text import Prompt, TokenizedText


class _Group(TyperGroup):
    """Tells errors about the input in one line, with exit code 2, as typer does for its own."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FlashTraceError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Group,
    help="Which words of the prompt caused a reasoning model's answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def main() -> None:
    """Entry point of the console script."""
    app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _writable(path: Path | None) -> Path | None:
    """Refused before the work, not after it."""
    if path is not None and not path.parent.is_dir():
        raise InputError(
            f"cannot write {path}: the folder {path.parent} does not exist; create it, or write elsewhere"
        )
    return path


_OUTPUT: dict[str, Any] = {"dir_okay": False, "callback": _writable, "rich_help_panel": "Output"}
_MODEL, _TEXT, _METHOD = "Model", "Text", "Method"


@app.command()
def attribute(
    model: Annotated[
        str,
        typer.Option(help="Folder, hub name or .gguf file; 'reasoner' is the bundled model.", rich_help_panel=_MODEL),
    ] = "reasoner",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_MODEL)] = "auto",
    device: Annotated[
        str | None, typer.Option(help="As torch names it; default: an accelerator, or cpu.", rich_help_panel=_MODEL)
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="As transformers names it, such as sdpa.", rich_help_panel=_MODEL)
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=_MODEL)
    ] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Also read weights that can run code.", rich_help_panel=_MODEL),
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="The prompt.", rich_help_panel=_TEXT)] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="File with the prompt, read as it is; - is stdin.", rich_help_panel=_TEXT),
    ] = None,
    messages_file: Annotated[
        Path | None,
        typer.Option(
            help='JSON file with chat messages, [{"role": "user", "content": "…"}, …].',
            rich_help_panel=_TEXT,
        ),
    ] = None,
    generation: Annotated[
        str | None,
        typer.Option(
            help="What followed the prompt, thinking included; default: let the model write.", rich_help_panel=_TEXT
        ),
    ] = None,
    generation_file: Annotated[
        Path | None, typer.Option(help="File with it, read as it is.", rich_help_panel=_TEXT)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens that the model writes, greedily.", rich_help_panel=_TEXT)
    ] = 512,
    target: Annotated[
        str | None,
        typer.Option(
            help="What to explain: a piece of the generation, or token positions a:b; default: the answer.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    reasoning: Annotated[
        str | None,
        typer.Option(
            help="What to follow importance through, given likewise; default: the thinking.", rich_help_panel=_TEXT
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="flashtrace, ifr, recursive or heta.", rich_help_panel=_METHOD)
    ] = "flashtrace",
    hops: Annotated[
        int | None, typer.Option(min=0, help="Hops through the reasoning.", rich_help_panel=_METHOD)
    ] = None,
    positions: Annotated[str | None, typer.Option(help="token or predicting.", rich_help_panel=_METHOD)] = None,
    recursion: Annotated[str | None, typer.Option(help="reasoning or generation.", rich_help_panel=_METHOD)] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="Any other option of the method; may be repeated.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens to print.", rich_help_panel="Output")] = 10,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Save the attribution; 'show' reads it.", **_OUTPUT)
    ] = None,
    html_path: Annotated[Path | None, typer.Option("--html", help="Write a report.", **_OUTPUT)] = None,
) -> None:
    """Explain a model's answer by its prompt.

    Prints the strongest tokens of the prompt and where each hop's mass lies.
    """
    from flashtrace_plugin.loading import DTYPES, load, write
    from flashtrace_plugin.methods.base import one_of
    from flashtrace_plugin.methods.flashtrace import METHODS
    from flashtrace_plugin.text import tokenize

    asked = _prompt(prompt, prompt_file, messages_file)
    written = _only("--generation", generation, "--generation-file", _read(generation_file))
    cls = METHODS[one_of("--method", method, METHODS)]
    given = {"hops": hops, "positions": positions, "recursion": recursion}
    options = _options_of(cls, {k: v for k, v in given.items() if v is not None} | _parsed(option or []))
    lm, tokenizer = load(
        model,
        dtype=one_of("--dtype", dtype, DTYPES),
        device=device,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    explain = cls(lm, tokenizer, **options)
    text = write(lm, tokenizer, asked, max_new_tokens) if written is None else tokenize(tokenizer, asked, written)
    found = _run(explain, text, _span(target), _span(reasoning))
    _deliver(found, top, json_path, html_path)


@app.command()
def show(
    saved: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="File written by --json.")],
    top: Annotated[int, typer.Option(min=1, help="Tokens to print.")] = 10,
    html_path: Annotated[Path | None, typer.Option("--html", help="Write a report.", **_OUTPUT)] = None,
) -> None:
    """Print a saved attribution, or turn it into a report."""
    from flashtrace_plugin.attribution import Attribution

    _deliver(Attribution.load(saved), top, None, html_path)


@app.command()
def families() -> None:
    """List the model families that can be explained, as in config.model_type."""
    from flashtrace_plugin.models.read.layouts import supported_families

    for name in supported_families():
        typer.echo(name)


def _prompt(prompt: str | None, prompt_file: Path | None, messages_file: Path | None) -> Prompt:
    given = [x for x in (prompt, prompt_file, messages_file) if x is not None]
    if len(given) != 1:
        raise InputError(f"{len(given)} prompts were given; give one of --prompt, --prompt-file and --messages-file")
    if messages_file is not None:
        return _messages(_read(messages_file) or "", messages_file)
    return prompt if prompt is not None else _read(prompt_file) or ""


def _messages(text: str, path: Path) -> Prompt:
    try:
        messages = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON ({error}); it must hold a list of chat messages") from error
    ok = isinstance(messages, list) and messages
    if not ok or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        raise InputError(f'{path} holds no chat messages; write [{{"role": "user", "content": "…"}}, …]')
    return messages


def _read(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        data = typer.get_binary_stream("stdin").read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


def _only(first: str, one: str | None, second: str, other: str | None) -> str | None:
    if one is not None and other is not None:
        raise InputError(f"both {first} and {second} were given; give one of them")
    return one if other is None else other


def _span(text: str | None) -> Span | str | None:
    """A span if it reads ``a:b``, otherwise a piece of the text."""
    found = re.fullmatch(r"(\d+):(\d+)", text) if text is not None else None
    return text if found is None else Span(int(found[1]), int(found[2]))


def _parsed(options: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs; values are read as JSON, and as plain text if they are none."""
    found = {}
    for item in options:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"option {item!r} is not of the form NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _options_of(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options, if the method takes them all."""
    import inspect

    known = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise InputError(f"the method {cls.name!r} has no option {', '.join(unknown)}; {takes}")  # type: ignore[attr-defined]
    return options


def _run(explain: Any, text: TokenizedText, target: Span | str | None, reasoning: Span | str | None) -> Attribution:
    where, through = text.locate(target, reasoning)
    return explain.attribute_ids(text.input_ids, prompt_length=text.prompt_length, target=where, reasoning=through)


def _deliver(found: Attribution, top: int, json_path: Path | None, html_path: Path | None) -> None:
    from rich.console import Console

    from flashtrace_plugin.report import terminal

    # Files first: whoever reads the output may stop reading, as `head` does.
    if json_path is not None:
        found.save(json_path)
    if html_path is not None:
        found.to_html(html_path)
    terminal.show(found, top=top, console=Console())
    if json_path is not None:
        typer.echo(f"\nSaved: {json_path}")
    if html_path is not None:
        typer.echo(f"\nReport: {html_path.absolute().as_uri()}")

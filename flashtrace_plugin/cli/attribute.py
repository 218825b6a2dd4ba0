"""``flashtrace-plugin attribute``: one answer explained. The flags of the driver come from its declaration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flashtrace_plugin.cli.inputs import only, read_file, read_prompt, read_span, typed, typed_options
from flashtrace_plugin.cli.output import BY, OUTPUT, deliver
from flashtrace_plugin.errors import CostError, InputError
from flashtrace_plugin.methods.options import Driving, declared, one_of

_MODEL: dict[str, Any] = {"rich_help_panel": "Model"}
_TEXT: dict[str, Any] = {"rich_help_panel": "Text"}
_METHOD: dict[str, Any] = {"rich_help_panel": "Method"}


def attribute_command() -> Callable[..., None]:
    """The command with one flag for each option of the driver, as typer reads it from a signature."""
    fixed = list(inspect.signature(attribute, eval_str=True).parameters.values())[:-1]  # without **driving
    flags = [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, typer.Option(help=_help(one.help, one.choices), **_METHOD)],
        )
        for one in declared(Driving)
    ]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in fixed] + flags

    def command(**given: Any) -> None:
        attribute(**given)

    command.__doc__ = attribute.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _help(text: str, choices: tuple[Any, ...] | None) -> str:
    known = f" ({', '.join(map(str, choices))})" if choices else ""
    return f"{text[0].upper()}{text[1:]}{known}."


def attribute(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Option(help="Folder, hub name or .gguf file; 'reasoner' is the bundled model.", **_MODEL)
    ] = "reasoner",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", **_MODEL)] = "auto",
    device: Annotated[
        str | None, typer.Option(help="As torch names it; default: an accelerator, or cpu.", **_MODEL)
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="As transformers names it, such as sdpa.", **_MODEL)
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", **_MODEL)
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read weights that can run code.", **_MODEL)
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="The prompt.", **_TEXT)] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the prompt, read as it is; - is stdin.", **_TEXT)
    ] = None,
    messages_file: Annotated[
        Path | None,
        typer.Option(help='JSON file with chat messages, [{"role": "user", "content": "…"}, …].', **_TEXT),
    ] = None,
    generation: Annotated[
        str | None,
        typer.Option(help="What followed the prompt, thinking included; default: let the model write.", **_TEXT),
    ] = None,
    generation_file: Annotated[Path | None, typer.Option(help="File with it, read as it is.", **_TEXT)] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens that the model writes, greedily.", **_TEXT)
    ] = 512,
    target: Annotated[
        str | None,
        typer.Option(
            help="What to explain: a piece of the generation, or token positions a:b; default: the answer.",
            **_TEXT,
        ),
    ] = None,
    reasoning: Annotated[
        str | None,
        typer.Option(help="What to follow importance through, given likewise; default: the thinking.", **_TEXT),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Name of a method; 'flashtrace-plugin methods' lists them.", **_METHOD)
    ] = "recommended",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="Any option of the method; may be repeated. --NAME VALUE does the same.",
            **_METHOD,
        ),
    ] = None,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", help="Run what takes more than --max-cost, too, and tell the estimate first.", **_METHOD
        ),
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Tokens to print.", rich_help_panel="Output")] = 10,
    by: Annotated[str | None, typer.Option(**BY)] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Save the attribution; 'show' reads it.", **OUTPUT)
    ] = None,
    html_path: Annotated[Path | None, typer.Option("--html", help="Write a report.", **OUTPUT)] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Replace what is named in the prompt, and tell how far log P falls.",
            rich_help_panel="Output",
        ),
    ] = False,
    verify_unit: Annotated[
        str | None,
        typer.Option(help="The same by 'word', 'step', 'paragraph' …; default: 'sentence'.", rich_help_panel="Output"),
    ] = None,
    **driving: Any,
) -> None:
    """Explain a model's answer by its prompt.

    Prints the strongest tokens of the prompt and where each hop's mass lies.
    """
    from flashtrace_plugin.loading import DTYPES, load, write
    from flashtrace_plugin.methods.registry import METHODS
    from flashtrace_plugin.text import tokenize

    asked = read_prompt(prompt, prompt_file, messages_file)
    written = only("--generation", generation, "--generation-file", read_file(generation_file))
    cls = METHODS[one_of("--method", method, METHODS)]
    flags = {name: typed(value) for name, value in driving.items() if value is not None}
    options = _options_of(cls, flags | typed_options(option or [], ctx.args))
    lm, tokenizer = load(
        model,
        dtype=one_of("--dtype", dtype, DTYPES),
        device=device,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    explain = cls(lm, tokenizer, **options)
    text = (
        write(lm, tokenizer, asked, max_new_tokens)
        if written is None
        else tokenize(tokenizer, asked, written, explain.end_ids())
    )
    where = {"target": read_span(target), "reasoning": read_span(reasoning)}
    try:
        found = explain.attribute_text(text, **where)
    except CostError as error:
        if not yes:
            raise
        typer.echo(error.estimate, err=True)
        found = cls(lm, tokenizer, **options | {"max_cost": None}).attribute_text(text, **where)
    deliver(found, top, json_path, html_path, by)
    if verify or verify_unit is not None:
        typer.echo(f"\n{found.verify(unit=verify_unit or 'sentence')}")


def _options_of(cls: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options, if the method takes them all. Raises InputError before a model is loaded."""
    from flashtrace_plugin.methods.base import options_of, takes

    known = {one.name: one for one in options_of(cls)}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise InputError(f"the method {cls.name!r} has no option {', '.join(unknown)}; {takes(cls)}")
    return {name: known[name].checked(value) for name, value in options.items()}

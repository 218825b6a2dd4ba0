"""``flashtrace-plugin attribute`` and ``tokens``: one answer explained, and the positions of its tokens.

The flags of the driver come from its declaration.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashtrace_plugin.cli import options as o
from flashtrace_plugin.cli.inputs import only, read_file, read_prompt, read_span, typed, typed_options
from flashtrace_plugin.cli.output import console_beside, deliver, kept, print_text
from flashtrace_plugin.cli.progress import TokenCount, telling
from flashtrace_plugin.errors import CostError, InputError, SpanError
from flashtrace_plugin.methods.options import Driving, declared, one_of

if TYPE_CHECKING:
    from flashtrace_plugin.text import Prompt, TokenizedText


def attribute_command() -> Callable[..., None]:
    """The command with one flag for each option of the driver, as typer reads it from a signature."""
    fixed = list(inspect.signature(attribute, eval_str=True).parameters.values())[:-1]  # without **driving
    flags = [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, typer.Option(help=_help(one.help, one.choices), **o.METHOD)],
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
    model: o.ModelOption = "reasoner",
    dtype: o.DtypeOption = "auto",
    device: o.DeviceOption = None,
    attn_implementation: o.AttentionOption = None,
    trust_remote_code: o.RemoteCodeOption = False,
    allow_pickle: o.PickleOption = False,
    prompt: o.PromptOption = None,
    prompt_file: o.PromptFileOption = None,
    messages_file: o.MessagesOption = None,
    generation: o.GenerationOption = None,
    generation_file: o.GenerationFileOption = None,
    max_new_tokens: o.NewTokensOption = 512,
    target: o.TargetOption = None,
    reasoning: o.ReasoningOption = None,
    method: o.MethodOption = "recommended",
    option: o.SettingOption = None,
    yes: o.YesOption = False,
    top: o.TopOption = 10,
    by: o.ByOption = None,
    json_path: o.JsonOption = None,
    html_path: o.HtmlOption = None,
    generation_out: o.GenerationOutOption = None,
    verify: o.VerifyOption = False,
    verify_unit: o.VerifyUnitOption = None,
    **driving: Any,
) -> None:
    """Explain a model's answer by its prompt.

    Prints what the model wrote, the strongest tokens of the prompt and where each hop's mass lies. What stands as
    --NAME VALUE and is no option here is one of the method.
    """
    console = console_beside(json_path, html_path, generation_out)
    asked, written = _given(prompt, prompt_file, messages_file, generation, generation_file)
    flags = {name: typed(value) for name, value in driving.items() if value is not None}
    where = {"target": read_span(target), "reasoning": read_span(reasoning)}
    how = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    with telling() as tell:  # importing torch takes seconds, too
        cls = _method(method)
        chosen = _options_of(cls, flags | typed_options(option or [], ctx.args))
        lm, tokenizer = _loaded(tell, model, dtype, device, allow_pickle=allow_pickle, **how)
        explain = cls(lm, tokenizer, **chosen)
        text = _text(tell, model, lm, tokenizer, asked, written, max_new_tokens)
    if written is None:
        print_text(console, text.generation, "The model wrote")
    with kept(text.generation, generation_out) if written is None else nullcontext(), telling() as tell:
        tell(f"Explaining by {method}: {len(text.tokens)} tokens")
        try:
            found = explain.attribute_text(text, **where)
        except CostError as error:
            if not yes:
                raise
            typer.echo(error.estimate, err=True)
            found = cls(lm, tokenizer, **chosen | {"max_cost": None}).attribute_text(text, **where)
        verdict = None
        if verify or verify_unit is not None:
            tell("Replacing what is named, to verify it")
            verdict = found.verify(unit=verify_unit or "sentence")
    deliver(found, top, json_path, html_path, by)
    if verdict is not None:
        console.print()
        print_text(console, str(verdict))


def tokens_command(
    saved: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="File written by --json, or give a text.")
    ] = None,
    model: o.ModelOption = "reasoner",
    prompt: o.PromptOption = None,
    prompt_file: o.PromptFileOption = None,
    messages_file: o.MessagesOption = None,
    generation: o.GenerationOption = None,
    generation_file: o.GenerationFileOption = None,
    max_new_tokens: o.NewTokensOption = 512,
) -> None:
    """List the tokens of a text with their positions, for --target a:b and --reasoning a:b."""
    from flashtrace_plugin.attribution import Attribution
    from flashtrace_plugin.loading import load
    from flashtrace_plugin.spans import Span

    if saved is not None:
        known = Attribution.load(saved)
        _list_tokens(known.tokens, known.prompt, known.reasoning, known.target)
        return
    asked, written = _given(prompt, prompt_file, messages_file, generation, generation_file)
    with telling() as tell:
        tell(f"Loading {model}")
        lm, tokenizer = load(model)
        text = _text(tell, model, lm, tokenizer, asked, written, max_new_tokens)
    target = reasoning = None
    try:
        target, reasoning = text.locate(None, None)
    except SpanError as error:
        typer.echo(f"no answer was found: {error}", err=True)
    _list_tokens(text.tokens, Span(0, text.prompt_length), reasoning, target)


def _list_tokens(tokens: tuple[str, ...], prompt: Any, reasoning: Any, target: Any) -> None:
    """A line for each token: position, part, token."""
    from flashtrace_plugin.report.marks import in_table

    parts = {"prompt": prompt, "reasoning": reasoning, "target": target}
    for i, token in enumerate(tokens):
        part = next((name for name, span in parts.items() if span is not None and i in span), "")
        typer.echo(f"{i:6d}  {part:9s}  {in_table(token)}")


def _given(
    prompt: str | None,
    prompt_file: Path | None,
    messages_file: Path | None,
    generation: str | None,
    generation_file: Path | None,
) -> tuple[Prompt, str | None]:
    """The prompt, and the generation if there is one. Raises InputError where two of them are to come from stdin."""
    files = [path for path in (prompt_file, messages_file, generation_file) if path is not None]
    if [str(path) for path in files].count("-") > 1:
        raise InputError("two texts were to come from stdin, which can be read once; give one as a file")
    asked = read_prompt(prompt, prompt_file, messages_file)
    return asked, only("--generation", generation, "--generation-file", read_file(generation_file))


def _loaded(tell: Callable[[str], None], model: str, dtype: str, device: str | None, **how: Any) -> tuple[Any, Any]:
    from flashtrace_plugin.loading import DTYPES, load

    one_of("--dtype", dtype, DTYPES)
    tell(f"Loading {model}")
    return load(model, dtype=dtype, device=device, **how)


def _text(
    tell: Callable[[str], None], model: str, lm: Any, tokenizer: Any, asked: Prompt, written: str | None, most: int
) -> TokenizedText:
    """The tokens of prompt and generation; the model writes one where there is none."""
    from flashtrace_plugin import reasoner
    from flashtrace_plugin.loading import REASONER, write
    from flashtrace_plugin.text import end_ids, render, tokenize

    if model == REASONER and asked:
        reasoner.check_words(tokenizer, f"{render(tokenizer, asked)[0]} {written or ''}")
    if written is None:
        return write(lm, tokenizer, asked, most, streamer=TokenCount(tell, most))
    ends = end_ids(tokenizer, lm.config.get_text_config(), lm.generation_config)
    return tokenize(tokenizer, asked, written, ends)


def _method(name: str) -> Any:
    from flashtrace_plugin.methods.registry import METHODS

    return METHODS[one_of("--method", name, METHODS)]


def _options_of(cls: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options, if the method takes them all. Raises InputError before a model is loaded."""
    from flashtrace_plugin.methods.base import options_of, takes

    known = {one.name: one for one in options_of(cls)}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise InputError(f"the method {cls.name!r} has no option {', '.join(unknown)}; {takes(cls)}")
    return {name: known[name].checked(value) for name, value in options.items()}

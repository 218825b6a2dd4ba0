"""The command line: ``flashtrace-plugin`` with ``attribute``, ``tokens``, ``cite``, ``blame``, ``show`` and others.

torch and transformers are imported by the commands that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flashtrace_plugin import __version__
from flashtrace_plugin.cli.attribute import attribute_command, tokens_command
from flashtrace_plugin.cli.evaluate import evaluate_command
from flashtrace_plugin.cli.inputs import in_flags
from flashtrace_plugin.cli.options import ByOption, HtmlOption, TopOption
from flashtrace_plugin.cli.output import deliver, use_any_terminal
from flashtrace_plugin.cli.run import run_command
from flashtrace_plugin.cli.serve import serve_command
from flashtrace_plugin.cli.sources import blame_command, cite_command
from flashtrace_plugin.errors import FlashTraceError


class _Group(TyperGroup):
    """Tells errors and warnings in one line; errors about the input have exit code 2, as typer's own."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: self._tell(ctx, "warning", message)
            try:
                return super().invoke(ctx)
            except FlashTraceError as error:
                self._tell(ctx, "error", error)
                raise typer.Exit(2) from error
            except OSError as error:
                if error.errno == errno.EPIPE:
                    raise
                self._tell(ctx, "error", error)
                raise typer.Exit(2) from error

    def _tell(self, ctx: Any, kind: str, what: object) -> None:
        """One line on stderr, in the words of the command line."""
        command = self.commands.get(ctx.invoked_subcommand or "")
        flags = {name for one in command.params for name in one.opts} if command else set()
        typer.echo(f"{kind}: {in_flags(' '.join(str(what).split()), flags)}", err=True)


app = typer.Typer(
    cls=_Group,
    help="Which words of the prompt caused a reasoning model's answer.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def main() -> None:
    """Entry point of the console script."""
    use_any_terminal()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of transformers, as our own line
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


# What is no option of the command may be one of the method, so it is let through and read by the command.
app.command("attribute", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    attribute_command()
)
app.command("tokens")(tokens_command)
app.command("run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(run_command)
app.command("cite")(cite_command)
app.command("blame")(blame_command)
app.command("serve")(serve_command)
app.command("evaluate")(evaluate_command)


@app.command()
def show(
    saved: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="File written by --json.")],
    top: TopOption = 10,
    html_path: HtmlOption = None,
    by: ByOption = None,
) -> None:
    """Print a saved attribution, or turn it into a report."""
    from flashtrace_plugin.attribution import Attribution

    deliver(Attribution.load(saved), top, None, html_path, by)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method: its options in full.")] = None) -> None:
    """List the methods, the installed packages' own among them, or the options of one."""
    from flashtrace_plugin.methods.base import options_of
    from flashtrace_plugin.methods.options import one_of
    from flashtrace_plugin.methods.registry import METHODS

    if name is None:
        for each, cls in METHODS.items():
            typer.echo(f"{each}: {(cls.__doc__ or '').splitlines()[0]}")
        return
    cls = METHODS[one_of("method", name, METHODS)]
    typer.echo((cls.__doc__ or "").partition("\n\nOptions:")[0])
    for one in options_of(cls):
        typer.echo(f"\n--{one.name.replace('_', '-')}: {one.shown().partition(': ')[2]}")


@app.command()
def families() -> None:
    """List the model families that can be explained, as in config.model_type."""
    from flashtrace_plugin.models.read.layouts import supported_families

    for name in supported_families():
        typer.echo(name)

"""``flashtrace-plugin run``: the rows of a data set explained into a folder, and gone on with after any stop."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nsmallest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashtrace_plugin.cli import options as o
from flashtrace_plugin.cli.inputs import typed_options
from flashtrace_plugin.errors import InputError

if TYPE_CHECKING:
    from flashtrace_plugin.runs.engine import Summary

_ROWS: dict[str, Any] = {"rich_help_panel": "Rows"}
_RUN: dict[str, Any] = {"rich_help_panel": "Run"}

_SOME_FAILED = 3
"""Exit code of a run with rows that could not be explained; 2 is that of one that explained none."""
_STOPPED = 130
_TOLD = 5


def run_command(
    ctx: typer.Context,
    rows: Annotated[
        str, typer.Argument(help="JSON lines, Parquet, or folder or name of a Hugging Face data set.", metavar="FILE")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results; one that has some is gone on with.", **_RUN)],
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMN", help="What 'prompt', 'generation', … are called there.", **_ROWS),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a Hugging Face data set.", **_ROWS)] = None,
    subset: Annotated[str | None, typer.Option(help="Of a Hugging Face data set.", **_ROWS)] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens that the model writes where a row has no generation.", **_ROWS)
    ] = 512,
    model: o.ModelOption = "reasoner",
    dtype: o.DtypeOption = "auto",
    device: o.DeviceOption = None,
    attn_implementation: o.AttentionOption = None,
    trust_remote_code: o.RemoteCodeOption = False,
    allow_pickle: o.PickleOption = False,
    method: o.MethodOption = "recommended",
    option: o.SettingOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Also explain what takes more than --max-cost.", **o.METHOD)
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Rows that are explained and saved together.", **_RUN)] = 16,
    window: Annotated[int, typer.Option(min=1, help="Rows read ahead to be sorted by length.", **_RUN)] = 1024,
    reports: Annotated[bool, typer.Option("--reports", help="Also write a report for every row.", **_RUN)] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try rows again that failed before.", **_RUN)] = False,
    engine: Annotated[str, typer.Option(help="auto (Ray for several accelerators), local or ray.", **_RUN)] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers of Ray; default: one for each accelerator.", **_RUN)
    ] = None,
) -> None:
    """Explain the rows of a data set, and write a line of JSON for each.

    The same command goes on where a stopped run was. Exit codes: 0, every row is explained; 3, some are not, and the
    results say why; 2, none is, or the run could not begin or go on; 130, stopped by Ctrl-C.
    """
    from flashtrace_plugin.runs import DataSet, Recipe, run

    data = DataSet(rows, dict(_columns(column or [])), split, subset)
    recipe = Recipe(
        model,
        method,
        typed_options(option or [], ctx.args) | ({"max_cost": None} if yes else {}),
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    try:
        summary = run(
            data,
            recipe,
            out,
            batch=batch,
            window=window,
            max_new_tokens=max_new_tokens,
            reports=reports,
            retry=retry,
            engine=engine,
            workers=workers,
        )
    except KeyboardInterrupt as stop:
        typer.echo(f"\nStopped. What was found is in {out}; the same command goes on from there.", err=True)
        raise typer.Exit(_STOPPED) from stop
    _tell(summary)
    if summary.failures:
        raise typer.Exit(2 if summary.failures == summary.total else _SOME_FAILED)


def _columns(pairs: list[str]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not column:
            raise InputError(f"column {pair!r} is not of the form NAME=COLUMN")
        yield name, column


def _tell(summary: Summary) -> None:
    """The first failures, then the summary."""
    from flashtrace_plugin.runs import failures

    for failure in nsmallest(_TOLD, failures(summary.folder), key=lambda failure: failure.number):
        typer.echo(str(failure), err=True)
    if summary.failures > _TOLD:
        typer.echo(f"and {summary.failures - _TOLD} more that failed", err=True)
    typer.echo(str(summary))
    typer.echo(f"Results: {(summary.folder / 'index.html').absolute().as_uri()}")

"""``flashtrace-plugin evaluate``: a suite of methods, tasks and metrics on a model, into a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from flashtrace_plugin.cli.options import AttentionOption, DeviceOption, DtypeOption, PickleOption, RemoteCodeOption
from flashtrace_plugin.errors import InputError

_RUN = {"rich_help_panel": "Run"}


def evaluate_command(
    out: Annotated[Path, typer.Option(help="Folder of the run; what it holds is not computed again.")],
    suite: Annotated[str, typer.Option(help="quick, paper, heta, choice, lengths or wrong.")] = "quick",
    model: Annotated[str, typer.Option(help="reasoner, smollm2, gemma3-270m, or as for attribute.")] = "reasoner",
    methods: Annotated[
        str | None, typer.Option(help="Instead of the suite's, with commas: lrp:rule=attn,ifr,random.")
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Instead of the suite's; may be repeated.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Usable samples of each task.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The same as --suite quick.")] = False,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    length: Annotated[int, typer.Option(help="Tokens of the reasoner's prompts at most.")] = 128,
    steps: Annotated[int | None, typer.Option(min=1, help="Groups of deletion.")] = None,
    answers: Annotated[str | None, typer.Option(help="right, forced or wrong answers.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="TASK=FILE of a data set; may be repeated.")] = None,
    shard: Annotated[str, typer.Option(help="i/n: the i-th of n parts, for n processes.", **_RUN)] = "1/1",
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    attn_implementation: AttentionOption = None,
    trust_remote_code: RemoteCodeOption = False,
    allow_pickle: PickleOption = False,
    progress: Annotated[bool, typer.Option(help="Tell how far it is.", **_RUN)] = True,
) -> None:
    """Measure how good explanations are. Can be killed at any moment; the same command goes on."""
    from flashtrace_plugin.evaluation.run.evaluate import run_suite

    folder = run_suite(
        model,
        "quick" if quick else suite,
        out=out,
        methods=_names(methods),
        tasks=tasks or (),
        samples=samples,
        seed=seed,
        length=length,
        steps=steps,
        answers=answers,
        data=dict(_pair(item) for item in data or ()),
        shard=_shard(shard),
        progress=progress,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    report = (folder / "report.md").read_text(encoding="utf-8")
    typer.echo(f"{report.partition(f'{chr(10)}## ')[0]}\n\nTables and figures: {folder / 'report.md'}")


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _pair(item: str) -> tuple[str, str]:
    task, equals, file = item.partition("=")
    if not equals:
        raise InputError(f"--data {item!r} is not TASK=FILE")
    return task, file


def _shard(text: str) -> Any:
    from flashtrace_plugin.evaluation.run.draws import Shard

    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise InputError(f"--shard {text!r} is not i/n, such as 1/4")
    return Shard(int(found.group(1)), int(found.group(2)))

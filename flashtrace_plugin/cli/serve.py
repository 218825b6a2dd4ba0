"""``flashtrace-plugin serve``: a page to explore one model live."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flashtrace_plugin.cli.options import AttentionOption, DeviceOption, DtypeOption, ModelOption, RemoteCodeOption
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.options import one_of

_LIMITS: dict[str, Any] = {"rich_help_panel": "Limits"}


def serve_command(
    model: ModelOption = "reasoner",
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    attn_implementation: AttentionOption = None,
    trust_remote_code: RemoteCodeOption = False,
    host: Annotated[
        str, typer.Option(help="Where to listen; others than this machine need the printed token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8321,
    token: Annotated[bool, typer.Option("--token", help="Ask for a token on this machine as well.")] = False,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of a text.", **_LIMITS)] = 16_384,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens written at once.", **_LIMITS)] = 4_096,
    max_cost: Annotated[
        float, typer.Option(min=1, help="Forward passes that a run may take, by its estimate.", **_LIMITS)
    ] = 500,
    max_memory: Annotated[float, typer.Option(min=0, help="Gigabytes of recorded passes to keep.", **_LIMITS)] = 4.0,
) -> None:
    """Open a live page: let the model write, and drag over words to see what they came from.

    The short names 'smollm2' and 'gemma3-270m' are English models, of the extra 'models'.
    """
    try:
        from flashtrace_plugin.serve.engine import Limits
        from flashtrace_plugin.serve.run import serve
    except ModuleNotFoundError as error:
        raise InputError(f"{error}; the page needs pip install 'flashtrace-plugin[serve]'") from error
    from flashtrace_plugin.evaluation.models import load
    from flashtrace_plugin.loading import DTYPES

    lm, tokenizer = load(
        model,
        dtype=one_of("--dtype", dtype, DTYPES),
        device=device,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    size = int(max_memory * (1 << 30))
    limits = Limits(tokens=max_tokens, new_tokens=max_new_tokens, cost=max_cost, bytes=size)

    def ready(address: str) -> None:
        typer.echo(f"Open {address}  (Ctrl+C stops it)")

    serve(lm, tokenizer, host=host, port=port, token=token, limits=limits, ready=ready)

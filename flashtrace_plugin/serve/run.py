"""Starts the live page and stays until it is stopped."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.serve.app import live_page
from flashtrace_plugin.serve.engine import Limits
from flashtrace_plugin.serve.guard import Address


def serve(
    model: Any,
    tokenizer: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8321,
    token: bool = False,
    limits: Limits | None = None,
    ready: Callable[[str], Any] = print,
) -> None:
    """Serves the live page of a model until the process is stopped.

    host:   to listen at; where others can reach it, the address holds a random token
    port:   0 takes a free one
    token:  also asks for a token where only this machine can reach it, as other users of it may
    limits: what a page may ask for
    ready:  told the address as soon as the page can be opened

    Raises InputError where it cannot listen there, UnsupportedModelError for a model that cannot be explained.
    """
    address = Address.of(host, token=token)
    app = live_page(model, tokenizer, address, limits)
    with _listening(host, port) as listener:
        number = listener.getsockname()[1]
        shown = "localhost" if host in ("127.0.0.1", "::1") else f"[{host}]" if ":" in host else host
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, server_header=False)
        ready(f"http://{shown}:{number}{address.base}")
        uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen at {host}, port {port}: {error}; choose another --host or --port") from error

"""The routes of the live page."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from flashtrace_plugin.errors import FlashTraceError, InputError
from flashtrace_plugin.report import colours
from flashtrace_plugin.serve.engine import Engine, Limits
from flashtrace_plugin.serve.guard import Address, Guard
from flashtrace_plugin.serve.jobs import Job, Jobs
from flashtrace_plugin.serve.questions import Question, opened, read_question

_PAGE = Path(__file__).parent / "page"


def live_page(model: Any, tokenizer: Any, address: Address, limits: Limits | None = None) -> Starlette:
    """The application: one page, and what it asks for.

    Raises UnsupportedModelError for a model that cannot be explained.
    """
    limits = limits or Limits()
    server = _Server(Engine(model, tokenizer, limits))
    routes = [
        Route("/", server.page("index.html")),
        *(Route(f"/{file.name}", server.page(file.name)) for file in sorted(_PAGE.glob("*.*"))),
        Route("/colours.css", server.colours),
        Route("/info", server.info),
        Route("/write", server.write, methods=["POST"]),
        Route("/explain", server.explain, methods=["POST"]),
        Route("/open", server.open, methods=["POST"]),
    ]
    return Starlette(
        routes=[Mount(address.base.rstrip("/"), routes=routes)],
        middleware=[Middleware(Guard, address=address, max_bytes=limits.request)],
        exception_handlers={FlashTraceError: _told},
        lifespan=server.lifespan,
    )


class _Server:
    """Answers of the routes."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.jobs = engine, Jobs()

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Jobs end with the server."""
        yield
        self.jobs.stop()

    def page(self, name: str) -> Callable[[Request], Response]:
        """A route that gives a file of the page."""
        return lambda request: FileResponse(_PAGE / name)

    def colours(self, request: Request) -> Response:
        """The report's colours as a style sheet."""
        light, dark = (_variables(theme) for theme in (colours.LIGHT, colours.DARK))
        steps = "".join(f".s{i}{{background:var(--s{i})}}" for i in range(1, colours.LEVELS + 1))
        sheet = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{steps}"
        return Response(sheet, media_type="text/css")

    async def info(self, request: Request) -> Response:
        return JSONResponse(self.engine.info())

    async def write(self, request: Request) -> Response:
        return self._stream(read_question(await _json(request)), self.engine.write)

    async def explain(self, request: Request) -> Response:
        return self._stream(read_question(await _json(request)), self.engine.explain)

    async def open(self, request: Request) -> Response:
        found = await run_in_threadpool(opened, await _json(request), self.engine.name)
        return JSONResponse(found)

    def _stream(self, question: Question, work: Callable[[Job, Question], None]) -> Response:
        """Events as lines of JSON, as they come; the job ends with the connection."""

        async def lines() -> AsyncIterator[bytes]:
            async for event in self.jobs.run(lambda job: work(job, question)):
                yield json.dumps(event, ensure_ascii=False, allow_nan=False).encode(errors="replace") + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")


def _variables(theme: Any) -> str:
    named = {"ink": theme.ink, "paper": theme.stops[0], **theme.other}
    named |= {f"s{i}": colour for i, colour in enumerate(colours.palette(theme.stops))}
    return f"color-scheme:{theme.name};" + "".join(f"--{name}:{colour};" for name, colour in named.items())


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise InputError(f"the file or request is not JSON ({str(error)[:200]})") from error


async def _told(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)

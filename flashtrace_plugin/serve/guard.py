"""Who may ask the page's server, and what every answer forbids the browser.

A page of another site must neither read nor start anything: requests need a host name of this machine (a rebound name
of a foreign domain is none), posts an origin that is this server, and where others can reach it, a token in the path.
"""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of every answer: nothing from elsewhere is loaded, run or framed, and nothing is kept."""


@dataclass(frozen=True)
class Address:
    """Where the server listens.

    host:  name or number that it is bound to
    token: first part of every path; "" where only this machine can ask
    """

    host: str
    token: str = ""

    @classmethod
    def of(cls, host: str, *, token: bool = False) -> Address:
        """With a random token if it was asked for, or other machines can reach the host."""
        return cls(host, secrets.token_urlsafe(24) if token or not _is_loopback(host) else "")

    @property
    def base(self) -> str:
        """The path of the page."""
        return f"/{self.token}/" if self.token else "/"

    def knows(self, host: str) -> bool:
        """Whether a request's Host is this machine, and no name that somebody else's server gave to its number."""
        name = urlsplit(f"//{host}").hostname or ""
        if _is_loopback(self.host):
            return _is_loopback(name)
        return name in (self.host.lower(), "localhost", socket.gethostname().lower()) or _is_number(name)


def _is_loopback(host: str) -> bool:
    """Whether a name or number is that of this machine alone."""
    return host == "localhost" or (_is_number(host) and ip_address(host).is_loopback)


def _is_number(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


class Guard:
    """Refuses what :meth:`_refused` names before a route sees it; puts :data:`HEADERS` on every answer."""

    def __init__(self, app: ASGIApp, address: Address, max_bytes: int) -> None:
        self.app, self.address, self.max_bytes = app, address, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refused = self._refused(scope)
        answer: ASGIApp = self.app if refused is None else JSONResponse({"error": refused[1]}, refused[0])
        await answer(scope, receive, with_headers)

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason for a request that is not let through."""
        headers, token = Headers(scope=scope), self.address.token
        host = headers.get("host", "")
        if not self.address.knows(host):
            return 421, f"this server is not {host[:80]!r}"
        if token and not secrets.compare_digest(scope["path"].lstrip("/").partition("/")[0].encode(), token.encode()):
            return 403, "the address lacks the token that was printed when the server started"
        if scope["method"] in ("GET", "HEAD"):
            return None
        if urlsplit(headers.get("origin", "")).netloc != host or not headers.get("origin"):
            return 403, "the request does not come from this page"
        if headers.get("content-type", "").partition(";")[0] != "application/json":
            return 415, "the request must be JSON"
        length = headers.get("content-length", "")
        if not length.isdecimal() or int(length) > self.max_bytes or "transfer-encoding" in headers:
            return 413, f"the request is larger than {self.max_bytes:,} bytes, or does not tell its length"
        return None

"""Who may ask, and how much: what stands before every route.

- A name may be made to point here by a stranger's page (DNS rebinding), so `Host` must be an
  address, `localhost`, or a name that was given; an address cannot be rebound.
- A stranger's page may send requests that carry its `Origin`: it must be our own.
- Where a token is set, all but the health check want it.
- A body ends at `MAX_BODY` bytes and within `BODY_S` seconds.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse

MAX_BODY = 1 << 20  # bytes
HEARD_OUT = 16 * MAX_BODY  # of a longer body, read and thrown away so that its sender hears why
BODY_S = 20.0
OPEN = ("/", "/healthz")  # paths that need no token: the page asks for it
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


class Refused(Exception):
    """An answer of another status than 200, in the form of OpenAI's errors."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers

    def response(self) -> JSONResponse:
        headers = {name.replace("_", "-"): value for name, value in self.headers.items()}
        return JSONResponse(error(self.status, self.message, self.code), self.status, headers)


def error(status: int, message: str, code: str = "") -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    field, colon, _ = message.partition(":")
    param = field if colon and " " not in field else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code or None}}


class Guard:
    """ASGI middleware; `draining` and `active` (requests under way) belong to whoever stops."""

    def __init__(
        self, app: Any, names: Collection[str], token: str, count: Callable[[str, int], None]
    ) -> None:
        self.app, self.token, self.count = app, token, count
        self.names = {name.lower() for name in (*names, "localhost")}
        self.draining, self.active = False, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.count(scope["path"], message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Content-Security-Policy", POLICY)
            await send(message)

        self.active += 1
        try:
            self._check(scope["path"], Headers(scope=scope))
        except Refused as e:
            await e.response()(scope, receive, sent)
        else:
            await self.app(scope, receive, sent)
        finally:
            self.active -= 1

    def _check(self, path: str, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise Refused(421, "Host: not a name of this server (--name adds one)")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != hosts[0].lower():
            raise Refused(403, "Origin: other pages may not ask here")
        if self.token and path not in OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode("latin-1"), self.token.encode()):
                raise Refused(
                    401, "Authorization: expected 'Bearer TOKEN'", "invalid_api_key",
                    WWW_Authenticate="Bearer",
                )  # fmt: skip
        if self.draining and path != "/metrics":
            raise Refused(503, "the server is stopping", Retry_After="5", Connection="close")

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        return name in self.names or is_address(name)


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


async def body(request: Request) -> bytes:
    """The whole body. Raises Refused for one that is too long, too slow, or not said to be JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no page elsewhere sends without asking
        raise Refused(415, "Content-Type: expected application/json", Connection="close")
    whole, n = bytearray(), 0
    stated = request.headers.get("content-length", "0")
    n_stated = int(stated) if stated.isdecimal() else 0
    try:
        async with asyncio.timeout(BODY_S):
            if n_stated <= HEARD_OUT:
                async for part in request.stream():
                    n += len(part)
                    if n > HEARD_OUT:
                        break
                    if n <= MAX_BODY:
                        whole += part
    except TimeoutError:
        raise Refused(408, f"the body took longer than {BODY_S:g} s", Connection="close") from None
    if max(n, n_stated) > MAX_BODY:
        message = f"the body is longer than {MAX_BODY:,} bytes"
        raise Refused(413, message, Connection="close")
    return bytes(whole)

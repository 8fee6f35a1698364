"""uvicorn around the application: connections that dawdle are cut, SIGTERM drains."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxlm.schema import UserError
from jaxlm.serve.app import guarded
from jaxlm.serve.guard import Guard, is_loopback
from jaxlm.serve.service import Service

HEADERS_S = 10.0  # from a connection's or a request's first byte to the end of its headers
STALLED_S = 30.0  # that a client may leave an answer unread
CONNECTIONS = 1024
CLOSING_S = 5


class Protocol(H11Protocol):
    """HTTP/1.1, for clients that neither send nor read at a crawl."""

    _headers: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._headers = self.loop.call_later(HEADERS_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        complete = self.conn.their_state is not h11.IDLE
        if complete and self._headers is not None:
            self._headers.cancel()
            self._headers = None
        elif not complete and self._headers is None:
            self._headers = self.loop.call_later(HEADERS_S, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """At the first signal new requests are refused (503) and those under way have `grace_s`
    seconds; at the second, or then, they are ended."""

    signum = 0
    loop: asyncio.AbstractEventLoop

    def __init__(self, app: Guard, service: Service, grace_s: float) -> None:
        config = uvicorn.Config(
            app, http=Protocol, ws="none", lifespan="off", log_level="warning", access_log=False,
            server_header=False, limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=CLOSING_S,
        )  # fmt: skip
        super().__init__(config)
        self.app, self.service, self.grace_s = app, service, grace_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = self.loop = asyncio.get_running_loop()
        mine = (signal.SIGTERM, signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        for signum in mine if main else ():
            loop.add_signal_handler(signum, self.stop, signum)
        try:
            yield
        finally:
            for signum in mine if main else ():
                loop.remove_signal_handler(signum)

    def stop(self, signum: int = 0) -> None:
        """Drains; once more: ends at once."""
        if self.app.draining:
            self.grace_s = 0
            return
        self.signum, self.app.draining = signum, True
        self._draining = self.loop.create_task(self._drain())

    async def _drain(self) -> None:
        waited = 0.0
        while self.app.active and waited < self.grace_s:
            await asyncio.sleep(0.05)
            waited += 0.05
        await self.loop.run_in_executor(None, self.service.close)
        self.should_exit = True


def listen(host: str, port: int, token: str) -> socket.socket:
    """A socket at that address; 0 is any free port. Raises UserError where no token guards an
    address that others reach, and for an address that is taken."""
    if not is_loopback(host) and not token:
        raise UserError(
            f"--host: {host} can be reached from other machines; set a token"
            " (--token, or JAXLM_TOKEN) or stay at 127.0.0.1"
        )
    try:
        [(family, *_), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as e:
        raise UserError(f"--host, --port: cannot listen at {host}:{port} ({e})") from e


def serve(
    service: Service,
    sock: socket.socket,
    *,
    names: Collection[str] = (),
    token: str = "",
    grace_s: float = 30.0,
    started: Callable[[Server], None] = lambda server: None,
) -> int:
    """Serves until a signal; 128 + its number, when all is answered."""
    server = Server(guarded(service, names, token), service, grace_s)
    started(server)
    try:
        asyncio.run(server.serve([sock]))
    finally:
        service.close()
    return 128 + server.signum if server.signum else 0

"""An application that listens at an address itself, and stops only after answering the requests under way."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.serving.access import send_refusal
from pipeline.serving.http.connections import BACKLOG, bound_connections
from pipeline.serving.limits import HttpLimits

DRAIN_SECONDS = 25.0  # for requests under way; Kubernetes kills a pod 30 s after it told it to stop


class Traffic:
    """The requests under way in a process. While it drains, it accepts no new ones."""

    def __init__(self) -> None:
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._server: uvicorn.Server | None = None

    @property
    def refuses(self) -> bool:
        """Whether new requests are refused. False if its own port is closed: what still arrives is answered."""
        return self._draining and self._server is None

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """One request, from its first byte to the last byte of its answer."""
        self._under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def drain(self, seconds: float = DRAIN_SECONDS) -> int:
        """Accept no new requests and wait for those under way. Returns how many were not answered in time.

        If the application listens itself, its port and idle connections are closed. Requests that arrive through
        Serve's proxies are refused with a 503.
        """
        self._draining = True
        if self._server is not None:
            self._server.should_exit = True
            await asyncio.sleep(0.2)  # uvicorn checks every 0.1 s; requests that arrive until then are accepted
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._under_way

    @asynccontextmanager
    async def listening(
        self, app: ASGIApp, host: str, port: int, limits: HttpLimits = HttpLimits()
    ) -> AsyncIterator[None]:
        """Serve at an address until the block ends. Several processes may listen at the same address."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(DRAIN_SECONDS),
            **bound_connections(limits),
        )
        server = uvicorn.Server(config)
        with socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=True) as listener:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            self._server = server
            try:
                yield
            finally:
                server.should_exit = True
                await serving


class Counted:
    """Counts each request as under way, or refuses it."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self._app, self._traffic = app, traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._traffic.refuses:
            said = "this server is stopping: ask another, or again in a moment"
            await send_refusal(send, 503, said, [(b"retry-after", b"1"), (b"connection", b"close")])
        else:
            with self._traffic.request():
                await self._app(scope, receive, send)

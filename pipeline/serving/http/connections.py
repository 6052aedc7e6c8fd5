"""Connections within limits: uvicorn's protocol, extended by the limits that it lacks.

uvicorn limits only the number of connections and of requests. It does not limit the size of a header, the time a header
may take, or how long an answer may wait to be read. httptools copies the pieces of an incomplete header again with each
new piece.
"""

import asyncio
import functools
import resource
import time
from typing import Any

import orjson
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from pipeline.serving.limits import HttpLimits

BACKLOG = 512  # connections waiting to be accepted, and the most accepted in one turn of the event loop
FILES_FOR_OTHERS = 256  # files that a process may open in addition to connections

_TOO_LONG = "the head of the request is longer than the server takes: send fewer and shorter headers"
_TOO_SLOW = "the head of the request came too slowly: send it again"
_TOO_MANY = "more connections are open than the server bears: ask again later"


class Connections:
    """All connections of a server, those without a request, and those with an unread answer."""

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max = min(limits.connections, max(files - FILES_FOR_OTHERS, files // 2))
        self._open: set[Connection] = set()
        self._waiting: dict[str, dict[Connection, None]] = {}  # by address; the longest waiting first
        self._unread: dict[Connection, float] = {}  # with the time since when

    def __len__(self) -> int:
        return len(self._open)

    def has_room_for(self, connection: "Connection") -> bool:
        """Accept a connection. If there are too many, drops the longest waiting one of the address with the most.

        Returns False if none can be dropped.
        """
        self._open.add(connection)
        if len(self._open) > self._max:
            if not self._waiting:
                return False
            most = max(self._waiting.values(), key=len)
            next(iter(most)).drop()
        self.waits(connection)
        return True

    def waits(self, connection: "Connection") -> None:
        """Note that a connection has no request under way."""
        self._waiting.setdefault(connection.address, {})[connection] = None

    def is_busy(self, connection: "Connection") -> None:
        """Note that a connection has a request under way."""
        same = self._waiting.get(connection.address, {})
        same.pop(connection, None)
        if not same:
            self._waiting.pop(connection.address, None)

    def is_unread(self, connection: "Connection") -> None:
        """Note that an answer waits to be read. Beyond `unread_bytes`, drops the largest bytes x time."""
        self._unread.setdefault(connection, time.monotonic())
        while sum(one.unread_bytes for one in self._unread) > self.limits.unread_bytes:
            now = time.monotonic()
            max(self._unread, key=lambda one: (one.unread_bytes * (now - self._unread[one]), one.unread_bytes)).drop()

    def is_read(self, connection: "Connection") -> None:
        """Note that the answer was read."""
        self._unread.pop(connection, None)

    def gone(self, connection: "Connection") -> None:
        """Note that a connection has ended."""
        self._open.discard(connection)
        self.is_busy(connection)
        self.is_read(connection)


class _HeadTooLong(Exception):
    """Stops the parsing of a request."""


class Connection(HttpToolsProtocol):
    """One connection. A client that is too slow to send its headers, or to read its answer, is dropped."""

    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._connections, self._limits = connections, connections.limits
        self.address = ""
        self._under_way = 0
        self._in_head = self._ended = self._parsed = False
        self._head_bytes = self._num_headers = self._silent_bytes = 0
        self._due: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._left = 0

    @property
    def unread_bytes(self) -> int:
        """Bytes of answers that wait to be read."""
        return 0 if self._ended else self.transport.get_write_buffer_size()

    def drop(self) -> None:
        """Close the connection at once, even with unsent data."""
        self._ended = True
        self._connections.gone(self)
        self.transport.abort()

    # Callbacks of uvicorn and asyncio

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        if self._connections.has_room_for(self):
            self._expect_head()
        else:
            self._answer(503, _TOO_MANY)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._connections.gone(self)
        for timer in (self._due, self._look):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        if not self._under_way and self._due is None:
            self._expect_head()
        self._parsed = False
        super().data_received(data)
        # Bytes without a complete element stay in the parser, which copies them again with each new piece.
        self._silent_bytes = 0 if self._parsed else self._silent_bytes + len(data)
        if self._silent_bytes > self._limits.head_bytes and not self._ended:
            self._answer(431, _TOO_LONG)

    def on_message_begin(self) -> None:
        self._parsed = self._in_head = True
        self._head_bytes = self._num_headers = 0
        if len(self.pipeline) >= self._limits.pipelined:
            raise _HeadTooLong
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._count(len(name) + len(value))
        if self._in_head:  # otherwise it is a trailer; trailers do not change a request under way
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._parsed = False, True
        self._under_way += 1
        self._connections.is_busy(self)
        self._expect_nothing()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._parsed = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._parsed = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._under_way -= 1
        super().on_response_complete()
        if self._ended:
            return
        if self.transport.is_closing():
            self._watch()  # otherwise an answer that nobody reads would stay in memory
        elif not self._under_way:
            self._connections.waits(self)
            self._expect_nothing()

    def send_400_response(self, msg: str) -> None:
        too_long = self._head_bytes > self._limits.head_bytes or self._num_headers > self._limits.headers
        self._answer(*((431, _TOO_LONG) if too_long else (400, f"{msg[:1].lower()}{msg[1:]}: send HTTP/1.1")))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._connections.is_unread(self)
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._connections.is_read(self)
        if self._look is not None and not self.transport.is_closing():
            self._look.cancel()
            self._look = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch()

    # Limits

    def _count(self, num_bytes: int) -> None:
        self._parsed = True
        self._head_bytes += num_bytes
        if self._head_bytes > self._limits.head_bytes or self._num_headers > self._limits.headers:
            raise _HeadTooLong

    def _expect_head(self) -> None:
        self._due = self.loop.call_later(self._limits.head_seconds, self._too_slow)

    def _expect_nothing(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _too_slow(self) -> None:
        self._due = None
        if self._in_head:
            self._answer(408, _TOO_SLOW)
        else:
            self.drop()

    def _watch(self) -> None:
        """Check later that the client has read enough of what is written."""
        if self._look is None and not self._ended:
            self._left = self.unread_bytes
            self._look = self.loop.call_later(self._limits.body_seconds, self._look_again)

    def _look_again(self) -> None:
        self._look = None
        asked = min(self._left, int(self._limits.body_seconds * self._limits.bytes_a_second))
        if self._left - self.unread_bytes < asked or self.unread_bytes == 0:
            self.drop()
        else:
            self._watch()

    def _answer(self, status: int, detail: str) -> None:
        """Refuse from outside the application, and close. With a request under way, close without an answer."""
        if self._under_way:
            self.drop()
            return
        body = orjson.dumps({"detail": detail, "field": None, "request_id": None})
        head = (
            b"content-type: application/json\r\ncontent-length: %d\r\nretry-after: 1\r\nconnection: close\r\n"
            b"x-content-type-options: nosniff\r\ncross-origin-resource-policy: same-origin\r\n\r\n" % len(body)
        )
        self._ended = True
        self._connections.gone(self)
        self._expect_nothing()
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
        self.loop.call_later(1.0, self.transport.abort)  # whether or not the client has read it


def bound_connections(limits: HttpLimits) -> dict[str, Any]:
    """The uvicorn options that apply the limits."""
    return {
        "http": functools.partial(Connection, Connections(limits)),
        "ws": "none",  # no route uses websockets
        "backlog": BACKLOG,
        "timeout_keep_alive": limits.idle_seconds,
    }

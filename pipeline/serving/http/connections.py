"""Connections that a server bears: uvicorn's protocol, with limits that it does not have by itself.

Its only limit is of connections and requests in number. Nothing in it bounds a header, how long one may take, or how
long an answer may wait to be read; httptools joins the pieces of a header anew with each that comes.
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

BACKLOG = 512  # connections that wait to be taken; no more than these are taken in one turn of the event loop
FILES_FOR_OTHERS = 256  # that a process may have open besides connections

_TOO_LONG = "the head of the request is longer than the server takes: send fewer and shorter headers"
_TOO_SLOW = "the head of the request came too slowly: send it again"
_TOO_MANY = "more connections are open than the server bears: ask again later"


class Connections:
    """All connections of a server: those without a request under way, and those whose answer is not taken."""

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max = min(limits.connections, max(files - FILES_FOR_OTHERS, files // 2))
        self._open: set[Connection] = set()
        self._waiting: dict[str, dict[Connection, None]] = {}  # by address, those that wait longest first
        self._unread: dict[Connection, float] = {}  # since when

    def __len__(self) -> int:
        return len(self._open)

    def has_room_for(self, connection: "Connection") -> bool:
        """Take a connection. Where there are too many, of the address with most the one that waits longest goes."""
        self._open.add(connection)
        if len(self._open) > self._max:
            if not self._waiting:
                return False
            most = max(self._waiting.values(), key=len)
            next(iter(most)).drop()
        self.waits(connection)
        return True

    def waits(self, connection: "Connection") -> None:
        """A connection has no request under way."""
        self._waiting.setdefault(connection.address, {})[connection] = None

    def is_busy(self, connection: "Connection") -> None:
        """A connection has one."""
        same = self._waiting.get(connection.address, {})
        same.pop(connection, None)
        if not same:
            self._waiting.pop(connection.address, None)

    def is_unread(self, connection: "Connection") -> None:
        """An answer waits to be taken. Where too many bytes do, the connection goes that has held most for longest."""
        self._unread.setdefault(connection, time.monotonic())
        while sum(one.unread_bytes for one in self._unread) > self.limits.unread_bytes:
            now = time.monotonic()
            max(self._unread, key=lambda one: (one.unread_bytes * (now - self._unread[one]), one.unread_bytes)).drop()

    def is_read(self, connection: "Connection") -> None:
        """It was taken."""
        self._unread.pop(connection, None)

    def gone(self, connection: "Connection") -> None:
        """A connection has ended."""
        self._open.discard(connection)
        self.is_busy(connection)
        self.is_read(connection)


class _HeadTooLong(Exception):
    """Ends the parsing of a request."""


class Connection(HttpToolsProtocol):
    """One connection. Whoever sends no head, or takes no answer, in time is dropped."""

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
        """Bytes of answers that wait to be taken."""
        return 0 if self._ended else self.transport.get_write_buffer_size()

    def drop(self) -> None:
        """Close the connection at once, whatever waits."""
        self._ended = True
        self._connections.gone(self)
        self.transport.abort()

    # What uvicorn and asyncio call

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
        # What has been parsed to no end yet lies in the parser, which joins it anew with each piece.
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
        if self._in_head:  # else it is a trailer, and those change nothing of a request that is being answered
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
            self._watch()  # or what nobody takes would be kept
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
        """See to it that what is written is taken."""
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
        """Refuse from outside of the application, and close; where a request is under way, close without a word."""
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
        self.loop.call_later(1.0, self.transport.abort)  # whether or not it was taken


def bounded(limits: HttpLimits) -> dict[str, Any]:
    """The options of a uvicorn server that bears no more than the limits."""
    return {
        "http": functools.partial(Connection, Connections(limits)),
        "ws": "none",  # nothing here speaks it
        "backlog": BACKLOG,
        "timeout_keep_alive": limits.idle_seconds,
    }

"""Request ids, the access log (one line a request), and answers to unexpected failures.

Nothing that a client sends reaches a log or a header raw. An id that could break a line is replaced by a new one.
Unprintable characters of a path are escaped. Query strings and headers are never logged.
"""

import contextvars
import datetime
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import orjson
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-ID"
MAX_PATH = 200  # characters of a path in a line

WriteLine = Callable[[str], None]

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_SANE_HOST = re.compile(r"[0-9A-Za-z.:_%-]{1,64}")
_UNPRINTABLE = re.compile(r"[^\x21-\x7e]")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asker:
    """The client of a request: its address, and the request's id."""

    client: str
    request_id: str

    def __str__(self) -> str:
        return f"from {self.client}, request {self.request_id}"


_ASKER: contextvars.ContextVar[Asker | None] = contextvars.ContextVar("ASKER", default=None)


def asker() -> Asker | None:
    """The client of the current request; None outside a request."""
    return _ASKER.get()


def request_id() -> str | None:
    """The id of the current request; None outside a request."""
    asking = _ASKER.get()
    return asking.request_id if asking is not None else None


async def send_refusal(send: Send, status: int, detail: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Send a refusal from outside the application."""
    body = orjson.dumps({"detail": detail, "field": None, "request_id": request_id()})
    length = str(len(body)).encode()
    said = [(b"content-type", b"application/json"), (b"content-length", length), *headers]
    await send({"type": "http.response.start", "status": status, "headers": said})
    await send({"type": "http.response.body", "body": body})


def to_logger(line: str) -> None:
    """Write a line of the access log to this module's logger."""
    logger.info(line)


class Pipe:
    """A pipe or file that receives the access log. A slow reader delays no answer: lines are dropped instead."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
        self._left_out = 0

    def __call__(self, line: str) -> None:
        told = f"{self._left_out} lines of the access log were left out\n" if self._left_out else ""
        try:
            os.write(self._file, f"{told}{line}\n".encode())
        except OSError:  # the pipe is full, or its reader has ended
            self._left_out += 1
        else:
            self._left_out = 0


class Access:
    """Gives each request an id, and writes a line to the access log once the request is answered."""

    def __init__(self, app: ASGIApp, write: WriteLine | None) -> None:
        self._app, self._write = app, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        asking = Asker(_client_of(scope), _id_of(scope))
        status: int | None = None

        async def answering(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.get("headers", ())
                message["headers"] = [*headers, (HEADER.lower().encode(), asking.request_id.encode())]
            await send(message)

        before = _ASKER.set(asking)
        try:
            await self._app(scope, receive, answering)
        finally:
            _ASKER.reset(before)
            if self._write is not None:
                self._write(_line(scope, asking, status, time.perf_counter() - began))


class Failures:
    """Answers unexpected errors with a 500 that names the request; the log holds the details."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def answering(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, answering)
        except ClientDisconnect:
            return  # the client is gone
        except Exception as error:
            if scope["type"] != "http":
                raise
            logger.exception("request %s failed", request_id())
            if started:
                raise  # part of the answer is sent already: cut the connection
            said = (
                f"the server failed at this request ({type(error).__name__}): its log says why, under the request's id"
            )
            await send_refusal(send, 500, said)


def _id_of(scope: Scope) -> str:
    """The id that the request came with, if it is safe in a line and a header; otherwise a new one."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _SANE_ID.fullmatch(given[0]):
        sane: str = given[0].decode()
        return sane
    return secrets.token_hex(8)


def _client_of(scope: Scope) -> str:
    client = scope.get("client")
    host = str(client[0]) if client else ""
    return host if _SANE_HOST.fullmatch(host) else "an unknown client"


def _line(scope: Scope, asking: Asker, status: int | None, seconds: float) -> str:
    moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    path = printable((scope.get("raw_path") or scope["path"].encode()).decode("latin-1"))
    answered = status if status is not None else "unanswered"
    method = printable(scope["method"])
    return f"{moment} {asking.client} {method} {path} {answered} {seconds * 1e3:.1f} ms {asking.request_id}"


def printable(text: str) -> str:
    """A client's text, shortened, with characters that could break a line or a terminal escaped."""
    shown = _UNPRINTABLE.sub(lambda found: f"\\x{ord(found[0]):02x}", text[:MAX_PATH])
    return f"{shown}…" if len(text) > MAX_PATH else shown

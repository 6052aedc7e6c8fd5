"""Limits incoming bodies: their length, their speed, and their total size."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving.http.refused import Refused
from pipeline.serving.limits import HttpLimits

_LONGEST_NUMBER = 18  # digits of a length; a longer number is too large whatever its value


@dataclass(eq=False)
class _Upload:
    """How much of a body has arrived, and when it began."""

    began: float = field(default_factory=time.monotonic)
    num_bytes: int = 0
    whole: bool = False
    dropped: bool = False
    waiting: asyncio.Timeout | None = None

    def drop(self) -> None:
        self.dropped = True
        if self.waiting is not None:
            with contextlib.suppress(RuntimeError):  # its timeout expires at this moment anyway
                self.waiting.reschedule(asyncio.get_running_loop().time())


class Uploads:
    """Wraps an application, and refuses bodies while they arrive.

    A body counts until its request is answered. If all bodies together exceed the limit, the incomplete one with the
    largest bytes x time is refused. Small and fast uploads are therefore not refused, whoever else sends.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, limits: HttpLimits) -> None:
        self._app, self._max_bytes, self._limits = app, max_bytes, limits
        self._max_total = max(limits.bodies_bytes, 2 * max_bytes)
        self._total = 0
        self._uploads: set[_Upload] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = _told_length(scope)
        upload: _Upload | None = None

        async def limited() -> Message:
            nonlocal upload
            if upload is None:
                if told > self._max_bytes:  # before anything is read, and before the 100 Continue
                    raise self._too_long()
                upload = _Upload()
                self._uploads.add(upload)
            return await receive() if upload.whole else await self._received(upload, receive)

        try:
            await self._app(scope, limited, send)
        finally:
            if upload is not None:
                self._uploads.discard(upload)
                self._total -= upload.num_bytes

    async def _received(self, upload: _Upload, receive: Receive) -> Message:
        """The next piece of a body. Raises Refused."""
        allowed = self._limits.body_seconds + upload.num_bytes / self._limits.bytes_a_second
        left = upload.began + allowed - time.monotonic()
        try:
            async with asyncio.timeout(max(left, 0)) as upload.waiting:
                message = await receive()
        except TimeoutError:
            if upload.dropped:
                raise _no_room() from None
            raise Refused(408, "the body came too slowly: send it again, faster or in parts", closes=True) from None
        finally:
            upload.waiting = None
        if upload.dropped:
            raise _no_room()
        num_bytes = len(message.get("body", b""))
        upload.whole = not message.get("more_body", False)
        upload.num_bytes += num_bytes
        self._total += num_bytes
        if upload.num_bytes > self._max_bytes:
            raise self._too_long()
        while self._total > self._max_total:
            self._drop_one()
            if upload.dropped:
                raise _no_room()
        return message

    def _drop_one(self) -> None:
        now = time.monotonic()
        coming = [upload for upload in self._uploads if not (upload.whole or upload.dropped)]
        if not coming:  # only the body that has just become complete is left
            raise _no_room()
        worst = max(coming, key=lambda upload: (upload.num_bytes * (now - upload.began), upload.num_bytes))
        worst.drop()
        self._total -= worst.num_bytes
        worst.num_bytes = 0

    def _too_long(self) -> Refused:
        return Refused(413, f"the body is larger than {self._max_bytes >> 20} MiB: send less at once", closes=True)


def _no_room() -> Refused:
    return Refused(429, "more is being sent at once than the server bears: send it again later", closes=True)


def _told_length(scope: Scope) -> int:
    """The length that the headers declare; 0 if they declare none."""
    told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0").strip()
    if not told.isdigit():
        return 0
    return int(told) if len(told) <= _LONGEST_NUMBER else 10**_LONGEST_NUMBER

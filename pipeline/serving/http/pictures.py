"""Makes pictures of entries, in threads of their own, a limited number at once, each within a time limit.

Nothing else uses these threads. A slow, large or missing source delays pictures only.
"""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import ClientDisconnect

from pipeline.errors import Overloaded, Unavailable
from pipeline.images.decoding.decode import Rejected
from pipeline.images.entry_pictures import READ_BYTES, Roots, picture_of
from pipeline.images.reading.bounded import Bound
from pipeline.serving.service.group import Entry
from pipeline.serving.service.service import Limits

PICTURE_PIXELS = 512  # a side
THREADS = 2  # each holds READ_BYTES at most, the unpacked data, and pixels
UNDER_WAY = 64  # unanswered requests for pictures: a page of neighbours
RETRY_SECONDS = 1.0


class Pictures:
    """Makes pictures from what adds have read, and from files below `roots`."""

    def __init__(self, limits: Limits, roots: Roots = ()) -> None:
        self._limits, self._roots = limits, roots
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="picture")
        self._counting = threading.Lock()
        self._under_way = 0  # running or queued; an abandoned picture counts until a thread has dropped it

    async def of(self, entry: Entry, gone: Coroutine[Any, Any, None]) -> bytes | None:
        """A JPEG of an entry: from its source if that still has the same bytes, otherwise the thumbnail.

        None if there is neither. Reading stops once `gone` ends, for then the client has left. Raises Overloaded,
        ClientDisconnect, and Unavailable if it takes too long and there is no thumbnail.
        """
        seconds = self._limits.timeout_seconds
        bound = Bound(READ_BYTES, seconds)
        left = asyncio.ensure_future(gone)
        try:
            made = self._begin(entry, bound)
            either: list[asyncio.Future[Any]] = [made, left]
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if made.done():
                return made.result()
            if left.done():
                left.result()  # raises if the client sent too much instead of leaving
                raise ClientDisconnect
            return self._late(entry)
        finally:
            bound.give_up()
            if left.done() and not left.cancelled():
                left.exception()
            left.cancel()

    def stop(self) -> None:
        """Stop making pictures."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, entry: Entry, bound: Bound) -> "asyncio.Future[bytes | None]":
        with self._counting:
            if self._under_way >= UNDER_WAY:
                raise Overloaded("more pictures are asked for than can be made in time: ask again later", RETRY_SECONDS)
            self._under_way += 1
        made = asyncio.wrap_future(self._pool.submit(self._made, entry, bound))
        made.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # the caller may be gone
        return made

    def _made(self, entry: Entry, bound: Bound) -> bytes | None:
        try:
            bound.check()
            return picture_of(
                entry.original,
                PICTURE_PIXELS,
                roots=self._roots,
                bound=bound,
                max_pixels=self._limits.image_pixels,
            )
        except Rejected:  # the reason is not sent to the client: it may name files of this machine
            return self._late(entry) if bound.seconds_left <= 0 else entry.thumbnail
        finally:
            with self._counting:
                self._under_way -= 1

    def _late(self, entry: Entry) -> bytes:
        """The thumbnail, when the time for a picture is over. Without one the source may still give it later."""
        if entry.thumbnail is None:
            raise Unavailable(f"the picture was not made within {self._limits.timeout_seconds:g} s: ask again later")
        return entry.thumbnail

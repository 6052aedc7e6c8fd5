"""Bounded reads for pictures: a limit of bytes, a deadline, and an end as soon as the caller no longer waits.

On this machine only regular files are opened. From an object store only the needed ranges are requested, and each
request is given up at the deadline. No other network address is contacted.
"""

import asyncio
import concurrent.futures
import functools
import io
import os
import threading
import time
from types import TracebackType
from typing import Any

from pipeline.errors import SourceError
from pipeline.images.decoding.decode import Rejected
from pipeline.images.names.uris import path_of_uri
from pipeline.images.reading.files import file_system, is_remote, open_regular, unreadable

STORES = ("s3://", "s3a://", "gs://", "gcs://")
PICTURE_BYTES = 64 << 20  # largest image file: an uncompressed one of 20 million pixels
LOCAL_CHUNK = 1 << 20  # bytes read between two checks of the deadline
REMOTE_CHUNK = 8 << 20  # bytes of one request: a much smaller one takes a store as long
LOOK_SECONDS = 0.25  # between two checks of whether the caller still waits, during a request to a store
KEEP = "add it again with `add --thumbnails`, which keeps a small picture"


def check_size(num_bytes: int) -> None:
    """Raises Rejected if an image file of this size is too large for a picture."""
    if num_bytes > PICTURE_BYTES:
        raise Rejected("read", f"it is larger than {PICTURE_BYTES >> 20} MiB, too large for a picture: {KEEP}")


class Bound:
    """The limits of the reads for one picture: bytes and seconds. `give_up` ends the reads from another thread."""

    def __init__(self, num_bytes: int, seconds: float) -> None:
        self._left, self._most = num_bytes, num_bytes
        self._until = time.monotonic() + seconds
        self._seconds = seconds
        self._given_up = threading.Event()

    @property
    def read(self) -> int:
        """Bytes read so far."""
        return self._most - self._left

    @property
    def seconds_left(self) -> float:
        return self._until - time.monotonic()

    def give_up(self) -> None:
        """End the reads: the caller no longer waits."""
        self._given_up.set()

    def check(self) -> None:
        """Raises Rejected after the deadline, or if the caller no longer waits."""
        if self._given_up.is_set():
            raise Rejected("read", "nobody waits for it any more")
        if self.seconds_left <= 0:
            raise Rejected("read", f"it was not read within {self._seconds:g} s: {KEEP}")

    def spend(self, num_bytes: int) -> None:
        """Count bytes about to be read. Raises Rejected if they exceed the limit, or as `check` does."""
        self.check()
        if num_bytes > self._left:
            raise Rejected("read", f"more than {self._most >> 20} MiB would have to be read for it: {KEEP}")
        self._left -= num_bytes


class BoundedFile(io.RawIOBase):
    """A regular file of this machine, or an object of a store, as a seekable stream within a bound.

    The caller closes it. The constructor and every read raise Rejected.
    """

    def __init__(self, uri: str, bound: Bound) -> None:
        super().__init__()
        self._bound = bound
        self._at = 0
        self._descriptor = -1
        self._place: tuple[Any, str] | None = None
        if is_remote(uri):
            if not uri.startswith(STORES):
                raise Rejected("read", "its uri is of no store, and nothing is fetched from elsewhere")
            try:
                self._place = file_system(uri)
            except SourceError as error:
                raise Rejected("read", "its store cannot be reached from here") from error
        else:
            try:
                self._descriptor = open_regular(path_of_uri(uri))
            except (OSError, ValueError) as error:
                raise unreadable(error) from error

    @functools.cached_property
    def size(self) -> int:
        """The size in bytes. A file that reports size 0, such as one of /proc, is rejected and not read."""
        size = os.fstat(self._descriptor).st_size if self._place is None else int(self._asked("info")["size"] or 0)
        if not size:
            raise Rejected("read", "the file is empty")
        return size

    @property
    def is_remote(self) -> bool:
        """Whether the file lies in a store."""
        return self._place is not None

    def span(self, offset: int = 0, num_bytes: int | None = None) -> bytes:
        """A piece of the file, or all of it."""
        stop = self.size if num_bytes is None else offset + num_bytes
        if not 0 <= offset < stop or (self._place is None and stop > self.size):
            raise Rejected("read", "the file is not the one that was remembered")
        self._bound.spend(stop - offset)
        step = LOCAL_CHUNK if self._place is None else REMOTE_CHUNK
        pieces = [self._piece(start, min(start + step, stop)) for start in range(offset, stop, step)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def image(self, offset: int = 0, num_bytes: int | None = None) -> bytes:
        """The bytes of an image: a piece of the file, or all of it. Raises Rejected if too large for a picture."""
        check_size(self.size if num_bytes is None else num_bytes)
        return self.span(offset, num_bytes)

    def _piece(self, start: int, stop: int) -> bytes:
        self._bound.check()
        try:
            if self._place is None:
                found = os.pread(self._descriptor, stop - start, start)
            else:
                found = bytes(self._asked("cat_file", start=start, end=stop))
        except OSError as error:
            raise unreadable(error) from error
        if len(found) != stop - start:
            raise Rejected("read", "the file became shorter while it was read")
        return found

    def _asked(self, method: str, **arguments: int) -> Any:
        """The answer of the store, without retries: the caller must not wait for a store that fails."""
        assert self._place is not None  # noqa: S101
        files, path = self._place
        asking = asyncio.run_coroutine_threadsafe(getattr(files, f"_{method}")(path, **arguments), files.loop)
        try:
            while True:
                self._bound.check()
                try:
                    return asking.result(min(LOOK_SECONDS, max(self._bound.seconds_left, 0.001)))
                except concurrent.futures.TimeoutError:
                    if asking.done():  # the request timed out, not this wait
                        raise
        except Rejected:
            raise
        except FileNotFoundError as error:
            raise Rejected("read", "there is no such file") from error
        except Exception as error:  # every file system of fsspec has an error tree of its own
            raise Rejected("read", "the store does not give it out just now") from error
        finally:
            asking.cancel()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        step = LOCAL_CHUNK if self._place is None else REMOTE_CHUNK
        stop = min(self._at + min(len(view), step), self.size)
        if stop <= self._at:
            return 0
        data = self.span(self._at, stop - self._at)
        view[: len(data)] = data
        self._at = stop
        return len(data)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        super().close()

    def __enter__(self) -> "BoundedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

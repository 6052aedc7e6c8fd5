"""Reading the files of a source, on this machine or through fsspec.

Transient errors (a lost connection, a busy store) are retried with back-off and jitter. If all attempts fail, the run
ends; when repeated, it goes on where it was. Permanent errors (missing, forbidden, one object that a healthy store
does not give out) reject that image.
"""

import functools
import io
import os
import random
import stat
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

from pipeline.errors import SourceError, StorageError
from pipeline.extras import needed_for
from pipeline.images.decoding.decode import MAX_FILE_BYTES, Rejected
from pipeline.images.names.uris import path_of_uri

ATTEMPTS = 5  # with botocore, each attempt is three requests
WAIT = 0.2  # seconds at most, times two to the number of the attempt: 0.4, 0.8, 1.6, 3.2
STREAM_BLOCK = 8 << 20
TOO_LARGE = f"the file is larger than {MAX_FILE_BYTES >> 20} MiB"
CHUNK = 1 << 20  # bytes per read of a file that reports size 0

Answer = TypeVar("Answer")


def is_remote(uri: str) -> bool:
    """Whether a uri lies outside of this machine's file system."""
    return "://" in uri and not uri.startswith("file://")


def read_file(uri: str, *, pipes: bool = False) -> bytes:
    """The bytes of the file at a uri. Raises Rejected at stage "read", or StorageError.

    On this machine only a regular file is read. With `pipes`, for a path that the user names in a command, anything
    readable is.
    """
    there = path_of_uri(uri)
    data = retrying(lambda: _remote_bytes(uri), uri) if is_remote(uri) else _local_bytes(there, pipes=pipes)
    if not data:
        raise Rejected("read", "the file is empty")
    return data


def open_file(uri: str, block: int = STREAM_BLOCK) -> BinaryIO:
    """A seekable stream of the file at a uri. It requests at least `block` bytes at once from a store.

    Raises Rejected at stage "read", or StorageError.
    """
    if not is_remote(uri):
        try:
            return os.fdopen(open_regular(path_of_uri(uri)), "rb")  # the caller closes it
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise unreadable(error) from error

    return io.BufferedReader(_RemoteFile(uri), block)


def file_system(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a remote uri, and the path on it. Raises SourceError for an unknown scheme."""
    scheme, _, _ = uri.partition("://")
    try:
        with needed_for(f"reading {uri}"):
            files = _file_system((scheme.lower(), os.getpid()))  # a fork must not use its parent's connections
    except (ValueError, ImportError) as error:
        raise SourceError(f"{uri} cannot be read ({error}): give a path, or a URI that fsspec knows") from error
    return files, str(files._strip_protocol(path_of_uri(uri)))  # fsspec has no public name for it


@functools.lru_cache(maxsize=8)
def _file_system(key: tuple[str, int]) -> Any:
    from pipeline.store.storage.file_systems import file_system_of

    return file_system_of(key[0])


def open_regular(path: str) -> int:
    """A descriptor of a regular file, for reading. Raises Rejected for other kinds, OSError, or ValueError for a NUL.

    Other kinds are not opened: opening a pipe hangs, and opening some devices has effects. If something else replaces
    the file between the check and the opening, it is detected too and does not hang.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise _not_regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


def _not_regular(path: str) -> Rejected:
    what = "a folder" if os.path.isdir(path) else "a pipe, a device or something else that is no file"
    return Rejected("read", f"the file cannot be read: it is {what}")


def _local_bytes(path: str, *, pipes: bool) -> bytes:
    try:
        with open(path if pipes else open_regular(path), "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size  # 0 for a pipe, and for a file of /proc
            if size > MAX_FILE_BYTES:
                raise Rejected("read", TOO_LARGE)
            chunks, left = [], MAX_FILE_BYTES + 1
            while left and (chunk := stream.read(min(left, size + 1 if size else CHUNK))):
                chunks.append(chunk)
                left -= len(chunk)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise unreadable(error) from error
    if not left:
        raise Rejected("read", TOO_LARGE)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def unreadable(error: OSError | ValueError) -> Rejected:
    """Why a file of this machine could not be read, as a reject."""
    if isinstance(error, FileNotFoundError):
        return Rejected("read", "there is no such file")
    return Rejected("read", f"the file cannot be read: {getattr(error, 'strerror', None) or error}")


def _remote_bytes(uri: str) -> bytes:
    files, path = file_system(uri)
    # One stream is one request. With more streams s3fs first asks for the size, which doubles the time of a small file.
    one_request = {"max_concurrency": 1} if "s3" in files.protocol else {}
    return bytes(files.cat_file(path, **one_request))


class _RemoteFile(io.RawIOBase):
    """A remote file, read in ranges. A range is retried if the connection breaks."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._files, self._path = file_system(uri)
        self._size = int(retrying(lambda: self._files.info(self._path)["size"], uri))
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        start = self._at
        data = retrying(lambda: self._files.cat_file(self._path, start=start, end=end), self._uri)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def retrying(ask: Callable[[], Answer], uri: str) -> Answer:
    """The answer of `ask` about a remote uri, with retries. Raises Rejected, SourceError or StorageError."""
    from pipeline.store.storage.store_errors import (
        DENIED,
        THROTTLED,
        code_of,
        explanation,
        is_transient,
        lacks_credentials,
    )

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except (Rejected, SourceError):
            raise
        except Exception as error:  # every file system of fsspec has an error tree of its own
            code = code_of(error)
            if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
                raise Rejected("read", "there is no such file") from error
            if lacks_credentials(error):
                raise StorageError(explanation(error, uri, "read", uri)) from error
            if code in DENIED or isinstance(error, PermissionError):
                raise Rejected("read", "these credentials may not read it") from error
            if code and not is_transient(error):
                raise Rejected("read", f"the store does not give it out ({code})") from error
            if attempt == ATTEMPTS:
                if code not in THROTTLED and _is_there(uri):  # the store works, except for this object
                    raise Rejected("read", f"the store did not give it out in {ATTEMPTS} attempts") from error
                raise StorageError(
                    f"{uri} could not be read in {ATTEMPTS} attempts ({explanation(error, uri, 'read', uri)}): "
                    "try again when the store is well, an add goes on where it was"
                ) from error
            time.sleep(random.uniform(0, WAIT) * 2**attempt)  # noqa: S311, it only spreads the readers in time
    raise AssertionError("the last attempt returns or raises")


def _is_there(uri: str) -> bool:
    """Whether the store answers and has the object."""
    files, path = file_system(uri)
    try:
        return bool(files.info(path))
    except Exception:  # any error means no
        return False

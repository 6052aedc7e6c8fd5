"""References to files of a memory (path, size and hash), as in versions and completion marks."""

import contextlib
import errno
import hashlib
import os
import struct
import threading
import time
import tokenize
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipeline.errors import DamagedFile
from pipeline.store.layout import NAMED, way_out
from pipeline.store.storage.interface import Storage, missing_file
from pipeline.store.values import Count, Digest, EntryId, PathInside, Sha256

HASHES_KEPT = 65_536  # of files, about 200 bytes each
RACY_NS = 50_000_000  # file system clocks tick every 1 to 10 ms: two changes in one tick have the same time

# The errors that FAISS, Arrow, NumPy and the standard library are known to raise for malformed bytes.
UNREADABLE = (
    OSError,
    ValueError,  # includes UnicodeDecodeError, JSONDecodeError and pydantic's errors
    ArithmeticError,
    LookupError,
    RuntimeError,  # FAISS has no other error type of its own
    MemoryError,
    AssertionError,
    TypeError,
    AttributeError,
    EOFError,
    SystemError,
    SyntaxError,  # NumPy parses the header of an array as Python, and an old kind of header by tokens
    tokenize.TokenError,
    struct.error,
    pa.ArrowException,
)
_SHORT_OF = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # this machine lacks resources; the file may be fine


class FileRef(BaseModel):
    """A published file: its path in the memory, rows (0 if it has no rows), length and hexadecimal sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: PathInside
    rows: Count = 0
    num_bytes: Count
    sha256: Sha256


class RowsFile(FileRef):
    """A Parquet file of rows with ids, all of them within [first_id, last_id]."""

    first_id: EntryId
    last_id: EntryId

    @property
    def has_every_id(self) -> bool:
        """Whether no id is missing between the first and the last: rejected images leave holes."""
        return self.rows == self.last_id - self.first_id + 1


class DigestsFile(FileRef):
    """A Parquet file of digests and ids, ordered by digest, all digests within [first, last]."""

    first: Digest
    last: Digest


def describe(path: str, local: Path, rows: int = 0) -> FileRef:
    """Hash a file that is about to be published as `path`."""
    with local.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRef(path=path, rows=rows, num_bytes=local.stat().st_size, sha256=digest)


def check_path(storage: Storage, file: FileRef) -> Path:
    """The path where a named file can be read on this machine.

    Raises DamagedFile if the file is missing or its length differs from the published one.
    """
    local = storage.local_path(file.path)
    try:
        found = local.stat().st_size
    except FileNotFoundError as error:  # removed just now
        raise missing_file(storage.uri, file.path) from error
    if found != file.num_bytes:
        raise DamagedFile(
            f"{file.path} in the memory at {storage.uri} has {found:,} bytes where {file.num_bytes:,} were written: "
            f"{way_out(file.path)}"
        )
    return local


def unaltered_path(storage: Storage, file: FileRef) -> Path:
    """The path where a named file can be read, after its hash was checked: once in this process, until it changes.

    Hashing from memory takes 1.4 GB/s for each core (OpenSSL's SHA-256 with the processor's instructions for it).
    Raises DamagedFile.
    """
    local = check_path(storage, file)
    with reading(storage.uri, file.path):
        found = sha256_of(local)
    if found != file.sha256:
        raise DamagedFile(
            f"{file.path} in the memory at {storage.uri} cannot be read, for it was altered: {way_out(file.path)}"
        )
    return local


def sha256_of(local: Path) -> str:
    """The hexadecimal sha256 of a file on this machine; cached while inode, length and time are the same."""
    with local.open("rb") as stream:
        stat = os.fstat(stream.fileno())
        signature = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
        with _hashing:
            known = _hashes.get(signature)
        if known is not None:
            return known
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time_ns() - stat.st_mtime_ns > RACY_NS:
        with _hashing:
            if len(_hashes) >= HASHES_KEPT:
                _hashes.pop(next(iter(_hashes)))
            _hashes[signature] = digest
    return digest


_hashes: dict[tuple[int, int, int, int], str] = {}
_hashing = threading.Lock()


@contextlib.contextmanager
def reading(uri: str, path: str) -> Iterator[None]:
    """Turn errors over the contents of a file, while it is read or searched, into DamagedFile.

    Errors of this library pass unchanged, and so do errors for lack of file descriptors or memory.
    """
    try:
        yield
    except FileNotFoundError as error:  # removed just now
        raise missing_file(uri, path) from error
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno in _SHORT_OF:
            raise
        raise unreadable(uri, path, error) from error


def unreadable(uri: str, path: str, reason: object) -> DamagedFile:
    """The error for an existing file of the memory at `uri` that cannot be parsed."""
    said = (str(reason).splitlines() or [""])[0].rstrip(" .:")
    because = f" ({said or type(reason).__name__})"
    return DamagedFile(f"{path} in the memory at {uri} cannot be read{because}: {way_out(path)}")


def check_places(files: Iterable[FileRef], places: Collection[str] = NAMED) -> None:
    """Raises ValueError unless the first folder of each path is one of `places`."""
    for file in files:
        first, _, rest = file.path.partition("/")
        if first not in places or not rest:
            raise ValueError(f"{file.path} is no place for such a file")

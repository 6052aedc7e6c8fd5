"""References to files of a memory: path, size and hash, as versions and completion marks name them."""

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
from pipeline.store.values import Count, EntryId, PathInside, Sha256

HASHES_KEPT = 65_536  # of files, some 200 bytes each
RACY_NS = 50_000_000  # clocks of file systems tick every 1 to 10 ms: what was changed just now may change unseen

# What FAISS, Arrow, NumPy and the standard library are known to raise over bytes that are not what they should be.
UNREADABLE = (
    OSError,
    ValueError,  # UnicodeDecodeError, JSONDecodeError and pydantic's among them
    ArithmeticError,
    LookupError,
    RuntimeError,  # FAISS has no other of its own
    MemoryError,
    AssertionError,
    TypeError,
    AttributeError,
    EOFError,
    SystemError,
    SyntaxError,  # NumPy parses the header of an array as Python, and one of an old kind by tokens
    tokenize.TokenError,
    struct.error,
    pa.ArrowException,
)
_SHORT_OF = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # what this machine lacks, whatever the file holds


class FileRef(BaseModel):
    """A published file: its path in the memory, rows (0 where it has none), length and hexadecimal sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: PathInside
    rows: Count = 0
    num_bytes: Count
    sha256: Sha256


class RowsFile(FileRef):
    """A Parquet file of rows with ids, all of them within [first_id, last_id]."""

    first_id: EntryId
    last_id: EntryId


def describe(path: str, local: Path, rows: int = 0) -> FileRef:
    """Hash a file that is about to be published as `path`."""
    with local.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRef(path=path, rows=rows, num_bytes=local.stat().st_size, sha256=digest)


def checked_path(storage: Storage, file: FileRef) -> Path:
    """Where a named file can be read on this machine.

    Raises DamagedFile when it is missing or has not the length it was published with.
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
    """Where a named file can be read, every byte of it hashed, once in this process while nobody changes it.

    From memory 1.4 GB/s and core (OpenSSL's SHA-256 with the processor's instructions for it). Raises DamagedFile.
    """
    local = checked_path(storage, file)
    with reading(storage.uri, file.path):
        found = sha256_of(local)
    if found != file.sha256:
        raise DamagedFile(
            f"{file.path} in the memory at {storage.uri} cannot be read, for it was altered: {way_out(file.path)}"
        )
    return local


def sha256_of(local: Path) -> str:
    """The hexadecimal sha256 of a file on this machine, known from before while inode, length and time are the same."""
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
    """Whatever goes wrong over the contents of a file while it is read or searched is damage of that file.

    What this library raises on purpose passes, and so does a want of files or memory. Raises DamagedFile.
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
    """The error for a file of the memory at `uri` that is there, and cannot be made sense of."""
    said = (str(reason).splitlines() or [""])[0].rstrip(" .:")
    because = f" ({said or type(reason).__name__})"
    return DamagedFile(f"{path} in the memory at {uri} cannot be read{because}: {way_out(path)}")


def check_places(files: Iterable[FileRef], places: Collection[str] = NAMED) -> None:
    """Raises ValueError unless each file lies in one of some folders, given by their first name."""
    for file in files:
        first, _, rest = file.path.partition("/")
        if first not in places or not rest:
            raise ValueError(f"{file.path} is no place for such a file")

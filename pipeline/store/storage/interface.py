"""The only interface to the bytes of a memory.

Paths are relative to the memory and use "/". All other code uses a store only through the methods of `Storage`. They
are chosen so that an object store can implement all of them: whole objects, exclusive creation, listing by prefix.
This module does not know the meaning of files. No path leads out of the memory: each storage checks a path first.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.errors import DamagedFile, MissingFile, NotPermitted
from pipeline.store.layout import ERASURES, VERSIONS, folder_at_the_top, way_out
from pipeline.store.storage.beneath import is_inside

# The largest file that `read` accepts, by folder: far more than is ever written, so that a file made to be huge is
# refused. A checkpoint has about 300 bytes for each file, the plan of an erasure about 100 bytes for each entry.
MOST_BYTES = {VERSIONS: 1 << 30, ERASURES: 4 << 30}
MOST_BYTES_ELSEWHERE = 64 << 20


class AlreadyExists(Exception):
    """The name of an exclusive creation is taken. Internal: callers handle it."""


class Storage(Protocol):
    """The methods of a place that holds a memory.

    Every method raises DamagedFile for a path that leads out of the memory, and for anything that is not a regular file
    or folder, such as a link. Every method raises StorageError if the store cannot be reached, refuses the credentials
    or has no room, and NotPermitted if this user, or these credentials, lack the permission.
    """

    uri: str

    def read(self, path: str) -> bytes:
        """The whole file. Raises DamagedFile if it is missing, or larger than such a file can be."""

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """The bytes of a file from `start` up to `stop`, fewer if the file ends before. Raises DamagedFile."""

    def create(self, path: str, data: bytes) -> None:
        """Publish a file durably and atomically, only if the name is free; else raises AlreadyExists."""

    def replace(self, path: str, data: bytes) -> None:
        """Publish a small file durably and atomically, and replace the old one if there is one."""

    def publishing(self, path: str) -> contextlib.AbstractContextManager[Path]:
        """Yield a local path for writing a large file; at the end publish it durably, and replace an old one.

        The file gets the same mode as every other file, whatever mode its writer gave it.
        """

    def copy_from(self, source: "Storage", path: str) -> bool:
        """Have the store itself copy a file of another memory to the same path here, and replace an old one.

        No byte of it passes through this machine; on S3 it costs a HEAD and a CopyObject. Its bytes are not checked.
        Returns False if nothing was copied: the places are not of one object store, the store cannot copy, these
        credentials may not, or the file is missing. The caller then copies the bytes, and learns which it is.
        """

    def local_path(self, path: str) -> Path:
        """The path where the file can be memory-mapped on this machine. Raises DamagedFile if it is missing.

        Raises NotPermitted if this user may not read it, before a library fails to open it.
        """

    def release(self, path: str) -> None:
        """The caller no longer needs the `local_path`: a local copy may be removed."""

    def list(self, folder: str) -> list[str]:
        """Names directly under a folder, sorted; empty if there is no such folder. Raises DamagedFile for a link."""

    def walk(self, folder: str = "") -> dict[str, int]:
        """Every file below a folder with its size in bytes, including unfinished files; only regular files."""

    def strangers(self) -> Mapping[str, str]:
        """Paths that are neither file nor folder (links, FIFOs, devices), each with its kind. They are never read."""

    def exists(self, path: str) -> bool: ...

    def delete(self, paths: Iterable[str]) -> None:
        """Remove files in the given order, with every older state that the store has; missing files are ignored."""

    def remove_folder(self, folder: str) -> None:
        """Remove everything under a folder. No version may name the folder."""

    def abandoned(self) -> Sequence[str]:
        """Unfinished files of dead processes: no reader sees them, and no process will finish them."""

    def noncurrent(self) -> Sequence[str]:
        """Paths with an older state or a delete marker in the store (S3 versioning)."""


@contextlib.contextmanager
def released(storage: Storage, *paths: str) -> Iterator[None]:
    """Release the local copies of some files at the end, so that a job over many files needs room for few at a time."""
    try:
        yield
    finally:
        for path in paths:
            storage.release(path)


def create_own(storage: Storage, path: str, data: bytes) -> None:
    """Create a file whose `data` holds a nonce, so that only this caller can have written it.

    Raises AlreadyExists if another caller wrote the file. If the store's answer is lost, the retry finds the name taken
    by the caller's own file: that is a success.
    """
    try:
        storage.create(path, data)
    except AlreadyExists:
        with contextlib.suppress(DamagedFile):  # removed meanwhile, so another caller wrote it
            if storage.read(path) == data:
                return
        raise


def may_not(doing: str, uri: str, path: str) -> NotPermitted:
    """The error for a file or folder of the memory at `uri` that this user may not "read" or "write" to."""
    place = f"{path} in the memory at {uri}" if path else f"the memory at {uri}"
    access = "read" if doing == "read" else "write to"
    error = NotPermitted(
        f"permission denied: this user may not {access} {place}: give this user the right to {access} it, and to enter "
        "the folders it lies in"
    )
    error.path = path
    return error


def missing_file(uri: str, path: str) -> DamagedFile:
    """The error for a file that is missing from the memory."""
    return MissingFile(f"{path} is missing from the memory at {uri}: {way_out(path)}", path)


def check_inside(uri: str, path: str) -> None:
    """Raises DamagedFile for a path that leads out of the memory."""
    if not is_inside(path):
        raise DamagedFile(
            f"a file of the memory at {uri} names {path[:200]!r}, which is no path inside of it, and nothing was done "
            "there: restore the memory from a copy, and do not trust where this one came from"
        )


def check_length(uri: str, path: str, num_bytes: int) -> None:
    """Raises DamagedFile if a file is larger than `read` accepts."""
    if num_bytes > most_bytes(path):
        raise DamagedFile(
            f"{path} in the memory at {uri} has {num_bytes:,} bytes, more than such a file can have: "
            "restore it from a copy of the memory"
        )


def most_bytes(path: str) -> int:
    """The largest size in bytes that `read` accepts for a path."""
    return MOST_BYTES.get(folder_at_the_top(path), MOST_BYTES_ELSEWHERE)


def not_a_file(uri: str, path: str, kind: str) -> DamagedFile:
    """The error for a link, a FIFO or a device in the place of a file or a folder of the memory."""
    if kind == "a link":
        said = "is a link, and none is followed inside of a memory: put what it leads to in its place"
    else:
        said = f"is {kind}, which does not belong there: remove it"
    return DamagedFile(f"{path} in the memory at {uri} {said}, or restore it from a copy of the memory")

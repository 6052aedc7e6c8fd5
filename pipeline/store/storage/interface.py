"""The one door to the bytes of a memory.

Paths are relative to the memory and use "/". Everything the rest of the code may ask of a store is a method of
`Storage`, chosen so that an object store can answer all of it: whole objects, exclusive creation, listing by prefix.
Nothing here knows what the files mean, and no path leads out of the memory: whatever holds one checks it first.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.errors import DamagedFile, MissingFile, NotPermitted
from pipeline.store.layout import ERASURES, VERSIONS, folder_at_the_top, way_out
from pipeline.store.storage.beneath import is_inside

# What `read` reads whole at most, by folder: far more than is ever written, so that a file made to be huge is refused.
# A checkpoint names some 300 bytes a file, the plan of an erasure some 100 bytes an entry.
MOST_BYTES = {VERSIONS: 1 << 30, ERASURES: 4 << 30}
MOST_BYTES_ELSEWHERE = 64 << 20


class AlreadyExists(Exception):
    """An exclusive creation found the name taken. Internal: callers decide what that means."""


class Storage(Protocol):
    """What a place that holds a memory must be able to do.

    Every method raises DamagedFile for a path that would lead out of the memory, and for what is not a file or a folder
    of its own but, say, a link.
    Every method raises StorageError when the store cannot be reached, refuses the credentials or has not room, and
    NotPermitted when this user, or these credentials, may not do it.
    """

    uri: str

    def read(self, path: str) -> bytes:
        """The whole file. Raises DamagedFile when it is not there, or larger than such a file can be."""

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """The bytes of a file from `start` up to `stop`, fewer where it ends. Raises DamagedFile."""

    def create(self, path: str, data: bytes) -> None:
        """Publish a file durably, only if the name is free; else AlreadyExists. Never seen half-written."""

    def replace(self, path: str, data: bytes) -> None:
        """Publish a small file durably, whatever was there before. Never seen half-written."""

    def publishing(self, path: str) -> contextlib.AbstractContextManager[Path]:
        """Yield a local path to write a large file to; on leaving, publish it durably, replacing what was there.

        The file gets the mode of every other file, whatever mode its writer gave it.
        """

    def local_path(self, path: str) -> Path:
        """Where the file can be memory-mapped on this machine. Raises DamagedFile when it is not there.

        Raises NotPermitted when this user may not read it, so that no library has to say why it cannot be opened.
        """

    def release(self, path: str) -> None:
        """The caller is done with `local_path`: a copy made for it need not be kept."""

    def list(self, folder: str) -> list[str]:
        """Names directly under a folder, sorted; empty when there is no such folder. Raises DamagedFile for a link."""

    def walk(self, folder: str = "") -> dict[str, int]:
        """Every file below a folder with its bytes, those that are just being written included; nothing but files."""

    def strangers(self) -> Mapping[str, str]:
        """What is neither a file nor a folder (links, FIFOs, devices), each with what it is: nothing reads them."""

    def exists(self, path: str) -> bool: ...

    def delete(self, paths: Iterable[str]) -> None:
        """Remove files, in the order given, with every older state of them that the store keeps; gone ones are fine."""

    def remove_folder(self, folder: str) -> None:
        """Remove everything under a folder that no version names."""

    def abandoned(self) -> Sequence[str]:
        """Files that a process which has died was writing: no reader sees them, and nobody will finish them."""

    def noncurrent(self) -> Sequence[str]:
        """Paths of which the store keeps an older state or a delete marker (S3 versioning)."""


def create_own(storage: Storage, path: str, data: bytes) -> None:
    """Create a file whose `data` holds a nonce, so that only this caller can have written it.

    Raises AlreadyExists for another's. When the answer of a store is lost and it is asked again, it finds the name
    taken by what was asked for.
    """
    try:
        storage.create(path, data)
    except AlreadyExists:
        with contextlib.suppress(DamagedFile):  # gone meanwhile, so it was another's
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
    """The error for a file that should be in the memory and is not."""
    return MissingFile(f"{path} is missing from the memory at {uri}: {way_out(path)}", path)


def check_inside(uri: str, path: str) -> None:
    """Raises DamagedFile for a path that is none inside of a memory."""
    if not is_inside(path):
        raise DamagedFile(
            f"a file of the memory at {uri} names {path[:200]!r}, which is no path inside of it, and nothing was done "
            "there: restore the memory from a copy, and do not trust where this one came from"
        )


def check_length(uri: str, path: str, num_bytes: int) -> None:
    """Raises DamagedFile for a file that is larger than what is read whole can be."""
    if num_bytes > most_bytes(path):
        raise DamagedFile(
            f"{path} in the memory at {uri} has {num_bytes:,} bytes, more than such a file can have: "
            "restore it from a copy of the memory"
        )


def most_bytes(path: str) -> int:
    """What `read` reads of a file at most."""
    return MOST_BYTES.get(folder_at_the_top(path), MOST_BYTES_ELSEWHERE)


def not_a_file(uri: str, path: str, kind: str) -> DamagedFile:
    """The error for a link, a FIFO, a device or the like at a path where a file or a folder of the memory belongs."""
    if kind == "a link":
        said = "is a link, and none is followed inside of a memory: put what it leads to in its place"
    else:
        said = f"is {kind}, which does not belong there: remove it"
    return DamagedFile(f"{path} in the memory at {uri} {said}, or restore it from a copy of the memory")

"""References to files of a memory: path, size and hash, as versions and completion marks name them."""

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline.errors import DamagedFile
from pipeline.store.storage import Storage
from pipeline.store.values import Count, EntryId, PathInside, Sha256


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

    Raises DamagedFile when it is missing or has not the length it was published with. Contents are checked where
    they are read (Parquet pages carry checksums); hashing every byte is left to a full verification.
    """
    local = storage.local_path(file.path)
    found = local.stat().st_size
    if found != file.num_bytes:
        raise DamagedFile(
            f"{file.path} in the memory at {storage.uri} has {found:,} bytes where {file.num_bytes:,} were written: "
            f"{way_out(file.path)}"
        )
    return local


def unaltered_path(storage: Storage, file: FileRef) -> Path:
    """Where a named file can be read, every byte of it hashed: for small files that carry no checksum of their own.

    Raises DamagedFile.
    """
    local = checked_path(storage, file)
    if describe(file.path, local).sha256 != file.sha256:
        raise DamagedFile(f"{file.path} in the memory at {storage.uri} was altered: {way_out(file.path)}")
    return local


def way_out(path: str) -> str:
    """What to do about a damaged file of a memory."""
    if path.startswith("index/"):
        return "run `index --rebuild`, which makes the index anew from the entries"
    return "restore it from a copy of the memory"


# Where files lie that a version may name. What it says of any other place is not by this release.
NAMED = frozenset({"encoder", "index", "labels", "packs", "segments", "tombstones"})


def check_places(files: Iterable[FileRef], places: Collection[str] = NAMED) -> None:
    """Raises ValueError unless each file lies in one of some folders, given by their first name."""
    for file in files:
        first, _, rest = file.path.partition("/")
        if first not in places or not rest:
            raise ValueError(f"{file.path} is no place for such a file")

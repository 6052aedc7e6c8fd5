"""The copies of a server: a folder of a memory's files, shared by the processes of a machine and limited in size.

A server maps the same files for days, in several processes, and maps them again after a restart. So these copies
outlive their process, and are trusted for their hash alone. That takes a file's reference, which a version has. Verbs
use `local_copies.py`, which takes any file by its path.

The name of a copy is the sha256 of its bytes. So a file is fetched once, whichever version or memory names it, and it
is hashed before it is used. A process holds a shared lock on each copy in use (flock, which ends with the process).
When room is needed, copies without a lock are removed, the least recently used first. An interrupted download is
resumed.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from pipeline.errors import DamagedFile, StorageError
from pipeline.plain_log import plain_logger
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.storage.file_refs import FileRef, sha256_of
from pipeline.store.storage.interface import Storage

RANGE_BYTES = 32 << 20  # fetched at a time, and the most that an interrupted download loses
MAX_FETCHES = 2  # of a file that arrives with wrong bytes
SUFFIX_OF_PARTS = ".part"

_HASH = re.compile(r"[0-9a-f]{64}")

logger = plain_logger(__name__)

_Signature = tuple[int, int, int]  # inode, bytes, nanoseconds of the last change


class FileCache:
    """The local copies in `folder`, at most `max_bytes` together. Each process has one object."""

    def __init__(self, folder: Path, max_bytes: int, on_progress: OnProgress = ignore_progress) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._on_progress = on_progress
        self._held: dict[str, tuple[IO[bytes], _Signature]] = {}
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # only users who may read the memory may read copies
        except OSError as error:
            raise StorageError(f"{folder} cannot hold local copies ({error.strerror}): name another folder") from error

    def get(self, storage: Storage, file: FileRef) -> Path:
        """The path of the local copy of a file, with verified bytes. Raises StorageError or DamagedFile."""
        try:
            return self._got(storage, file)
        except PermissionError as error:
            raise StorageError(
                f"permission denied: {error.filename or self.folder} may not be read or written by this user: give "
                "this user the right to, or name another folder for local copies"
            ) from error

    def _got(self, storage: Storage, file: FileRef) -> Path:
        copy = self.folder / _name(storage, file)
        held = self._held.get(file.sha256)
        if held is not None and _signature(copy) == held[1]:
            return copy
        with self._alone(file.sha256):
            for _ in range(MAX_FETCHES + 1):  # one more, as an existing copy may be damaged too
                if not copy.exists():
                    self._fetch(storage, file, copy)
                with contextlib.suppress(FileNotFoundError):  # another process removed it to make room
                    self._hold(copy)
                if _holds(copy, file):
                    return copy
                self.drop(file.sha256)
        raise StorageError(
            f"{file.path} of the memory at {storage.uri} came with other bytes than were published: "
            "`verify` says whether it is damaged there"
        )

    def altered(self) -> list[str]:
        """The names of copies in use that changed after they were hashed: overwritten, cut short or gone."""
        return [name for name, (_, known) in [*self._held.items()] if _signature(self.folder / name) != known]

    def drop(self, name: str) -> None:
        """Release a copy and remove it."""
        held = self._held.pop(name, None)
        if held is not None:
            held[0].close()
        (self.folder / name).unlink(missing_ok=True)

    def keep_only(self, names: Iterable[str]) -> None:
        """Release all other copies, which this process no longer uses; they stay until room is needed."""
        for name in set(self._held) - set(names):
            self._held.pop(name)[0].close()

    def _fetch(self, storage: Storage, file: FileRef, copy: Path) -> None:
        began = time.monotonic()
        stage = f"fetching {file.path}"
        try:
            with _held_part(copy.with_name(copy.name + SUFFIX_OF_PARTS)) as stream:
                done = before = os.fstat(stream.fileno()).st_size
                if done > file.num_bytes:
                    stream.truncate(0)
                    done = before = 0
                self._make_room(file, file.num_bytes - done)
                while done < file.num_bytes:
                    stop = min(done + RANGE_BYTES, file.num_bytes)
                    data = storage.read_range(file.path, done, stop)
                    if not data:
                        break
                    stream.write(data)
                    done += len(data)
                    self._on_progress(Progress(stage, done, file.num_bytes))
                stream.flush()
                os.fsync(stream.fileno())
                Path(stream.name).replace(copy)
        except OSError as error:
            raise StorageError(
                f"{self.folder} cannot hold {file.path} ({error.strerror}): make room there, or name another folder"
            ) from error
        took = max(time.monotonic() - began, 1e-9)
        logger.info("fetched %s: %d bytes, %.0f MB/s", file.path, done - before, (done - before) / took / 1e6)

    def _make_room(self, file: FileRef, needed: int) -> None:
        """Remove copies that no process holds, least recently used first, until there is room. Raises StorageError."""
        sizes: dict[Path, os.stat_result] = {}
        for path in self.folder.iterdir():
            if not path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):  # another process has just removed or renamed it
                    sizes[path] = path.stat()
        total = sum(stat.st_size for stat in sizes.values())
        for path in sorted(sizes, key=lambda path: sizes[path].st_atime_ns):
            if total + needed <= self.max_bytes:
                return
            if path.name.startswith(file.sha256) or path.name in self._held:
                continue
            if _removed_unless_held(path):
                total -= sizes[path].st_size
        if total + needed > self.max_bytes:
            raise StorageError(
                f"the local copies in {self.folder} may take {self.max_bytes:,} bytes, of which {total:,} are in use, "
                f"and {file.path} needs {needed:,} more: allow more, or spread the shards over more groups"
            )

    def _hold(self, copy: Path) -> None:
        stream = copy.open("rb")
        fcntl.flock(stream, fcntl.LOCK_SH)
        # Set the time of the last use, which decides what is removed first. The time of the last change must stay:
        # other processes detect an altered copy by it.
        os.utime(stream.fileno(), ns=(time.time_ns(), os.fstat(stream.fileno()).st_mtime_ns))
        known = self._held.pop(copy.name, None)
        if known is not None:
            known[0].close()
        self._held[copy.name] = stream, _signature(copy) or (0, 0, 0)

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Hold a lock, so that one process at a time fetches a file. Files with the same first two digits share it."""
        with (self.folder / f".{name[:2]}.lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


class CachedStorage:
    """A storage that reads published files from local copies, if their hashes are known."""

    def __init__(self, storage: Storage, cache: FileCache) -> None:
        self._storage = storage
        self._cache = cache
        self._expected: dict[str, FileRef] = {}
        self.uri = storage.uri

    def expect(self, files: Iterable[FileRef]) -> None:
        """Set the files that the version in use names, and release the copies of all other files."""
        self._expected = {file.path: file for file in files}
        self._cache.keep_only({file.sha256 for file in self._expected.values()})

    def drop(self, names: Iterable[str]) -> None:
        """Remove local copies by the hashes of their bytes: an erasure must remove them too."""
        for name in names:
            self._cache.drop(name)

    def altered(self) -> list[str]:
        """The names of local copies in use that were altered."""
        return self._cache.altered()

    def local_path(self, path: str) -> Path:
        """The local copy of a file if its hash is known; else the path that the storage gives."""
        file = self._expected.get(path)
        return self._cache.get(self._storage, file) if file is not None else self._storage.local_path(path)

    def release(self, path: str) -> None:
        self._storage.release(path)

    def copy_from(self, source: Storage, path: str) -> bool:
        return self._storage.copy_from(source, path)

    def read(self, path: str) -> bytes:
        return self._storage.read(path)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        return self._storage.read_range(path, start, stop)

    def create(self, path: str, data: bytes) -> None:
        self._storage.create(path, data)

    def replace(self, path: str, data: bytes) -> None:
        self._storage.replace(path, data)

    def publishing(self, path: str) -> contextlib.AbstractContextManager[Path]:
        return self._storage.publishing(path)

    def list(self, folder: str) -> list[str]:
        return self._storage.list(folder)

    def walk(self, folder: str = "") -> dict[str, int]:
        return self._storage.walk(folder)

    def strangers(self) -> Mapping[str, str]:
        return self._storage.strangers()

    def exists(self, path: str) -> bool:
        return self._storage.exists(path)

    def delete(self, paths: Iterable[str]) -> None:
        self._storage.delete(paths)

    def remove_folder(self, folder: str) -> None:
        self._storage.remove_folder(folder)

    def abandoned(self) -> Sequence[str]:
        return self._storage.abandoned()

    def noncurrent(self) -> Sequence[str]:
        return self._storage.noncurrent()


def _name(storage: Storage, file: FileRef) -> str:
    """The name of a copy. It must be a hash, as the reference may come from anywhere. Raises DamagedFile."""
    if not _HASH.fullmatch(file.sha256):
        raise DamagedFile(
            f"{file.path} in the memory at {storage.uri} is told to have the hash {file.sha256[:80]!r}, which is none: "
            "restore it from a copy of the memory"
        )
    return file.sha256


def _signature(path: Path) -> _Signature | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _holds(copy: Path, file: FileRef) -> bool:
    """Whether a copy exists and has the published bytes."""
    try:
        return copy.stat().st_size == file.num_bytes and sha256_of(copy) == file.sha256
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _held_part(part: Path) -> Iterator[IO[bytes]]:
    """The file of an unfinished download, opened to append, and locked: no process removes it to make room."""
    while True:
        with part.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            there = _signature(part)
            if there is not None and there[0] == os.fstat(stream.fileno()).st_ino:
                yield stream
                return


def _removed_unless_held(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except OSError:  # another process holds or has removed it
        return False
    return True

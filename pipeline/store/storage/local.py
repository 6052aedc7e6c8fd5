"""A memory in a folder of this machine.

A file is written under a private name, synced to disk, and only then linked or renamed to its final name. So no reader
ever sees half of a file, and a crash leaves at most a private file. The private name identifies the writing process.

Nothing outside the folder is read, written or removed, whatever the folder contains: no link is followed (beneath.py).
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from pipeline.errors import StorageError
from pipeline.store.layout import ASIDE, is_aside
from pipeline.store.storage.beneath import NotInside, enter_folder, kind_of, list_names, open_regular
from pipeline.store.storage.interface import (
    AlreadyExists,
    Storage,
    check_inside,
    check_length,
    may_not,
    missing_file,
    not_a_file,
)
from pipeline.store.storage.processes import Process

_ASIDE = re.compile(r"\..*\.(?P<place>[0-9a-f]{8})-(?P<owner>[0-9]+-[0-9]*)-[0-9a-f]{12}" + re.escape(ASIDE))
_NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC

MAX_ATTEMPTS = 100
MAX_DEPTH = 32  # of nested folders: a memory has six


class LocalStorage:
    """Storage in a folder of this machine, or of a file system mounted on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def read(self, path: str) -> bytes:
        with self._opened(path) as stream:
            check_length(self.uri, path, os.fstat(stream.fileno()).st_size)
            return stream.read()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with self._opened(path) as stream:
            stream.seek(start)
            return stream.read(stop - start)

    def create(self, path: str, data: bytes) -> None:
        with self._aside(path) as (folder, aside, name):
            _write(folder, aside, data)
            try:  # unlike a rename, a link fails if the name is taken
                os.link(aside, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError as error:
                raise AlreadyExists(path) from error
            except PermissionError as error:  # EPERM: the file system has no hard links
                raise StorageError(
                    f"the file system of {self.uri} cannot create a file only if its name is free (no hard links), "
                    "without which two writers could overwrite each other: keep the memory on another"
                ) from error
            _sync_names(folder)

    def replace(self, path: str, data: bytes) -> None:
        with self.publishing(path) as local:
            local.write_bytes(data)

    @contextlib.contextmanager
    def publishing(self, path: str) -> Iterator[Path]:
        with self._aside(path) as (folder, aside, name):
            mode = os.stat(aside, dir_fd=folder).st_mode  # as the umask sets it for every file
            yield (self.root / path).with_name(aside)
            written = open_regular(folder, aside, path)
            try:
                if os.fstat(written).st_mode != mode:  # a library wrote its own file, readable by its owner only
                    os.fchmod(written, stat.S_IMODE(mode))
                _sync(written)
            finally:
                os.close(written)
            with self._said(path):
                os.rename(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
            _sync_names(folder)

    def copy_from(self, source: Storage, path: str) -> bool:  # noqa: ARG002
        return False

    def local_path(self, path: str) -> Path:
        with self._opened(path):  # libraries that map it cannot distinguish "permission denied" from damage
            return self.root / path

    def release(self, path: str) -> None:
        pass  # `local_path` returned the file itself, not a copy

    def list(self, folder: str) -> list[str]:
        try:
            with self._said(folder), self._listed(folder) as descriptor:
                names = os.listdir(descriptor)
        except FileNotFoundError:
            return []
        except PermissionError as error:
            raise may_not("read", self.uri, folder) from error
        return sorted(name for name in names if not is_aside(name))

    def walk(self, folder: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        for path, entry in self._below(folder):
            if entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                    found[path] = entry.stat(follow_symlinks=False).st_size
        return found

    def strangers(self) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for path, entry in self._below(""):
            if not entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    found[path] = kind_of(entry.stat(follow_symlinks=False))
        return found

    def _below(self, folder: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Everything below a folder except folders, with paths. Use each DirEntry before requesting the next one."""
        left = [folder.rstrip("/")]
        while left:
            above = left.pop()
            try:
                with self._said(above), self._listed(above) as descriptor, os.scandir(descriptor) as entries:
                    for entry in entries:
                        path = f"{above}/{entry.name}" if above else entry.name
                        if not entry.is_dir(follow_symlinks=False):
                            yield path, entry
                        elif path.count("/") < MAX_DEPTH:
                            left.append(path)
            except FileNotFoundError:  # gone since it was listed
                continue
            except PermissionError as error:  # an unreadable folder must not count as empty
                raise may_not("read", self.uri, above) from error

    def exists(self, path: str) -> bool:
        try:
            with self._said(path), self._beside(path) as (folder, name):
                os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except PermissionError as error:
            raise may_not("read", self.uri, path) from error
        return True

    def delete(self, paths: Iterable[str]) -> None:
        folders = set()
        for path in paths:
            try:
                with self._said(path), self._beside(path) as (folder, name):
                    _unlink(folder, name, path)
            except FileNotFoundError:  # gone already
                pass
            except PermissionError as error:
                raise may_not("write", self.uri, path) from error
            folders.add(path.rpartition("/")[0])
        for folder_path in folders:
            self._tidy(folder_path)

    def remove_folder(self, folder: str) -> None:
        quietly = contextlib.suppress(FileNotFoundError, PermissionError)
        with quietly, self._said(folder), self._beside(folder.rstrip("/")) as (above, name):
            shutil.rmtree(name, ignore_errors=True, dir_fd=above)

    def abandoned(self) -> Sequence[str]:
        found = []
        for path in self.walk():
            aside = _ASIDE.fullmatch(path.rpartition("/")[2])
            if aside and aside["place"] == _place(Process.this()):
                pid, _, started = aside["owner"].partition("-")
                owner = Process.this().model_copy(update={"pid": int(pid[:20]), "started": started})
                if not owner.is_alive():
                    found.append(path)
        return found

    def noncurrent(self) -> Sequence[str]:
        return []

    def _tidy(self, folder: str) -> None:
        """Remove a folder if it is empty, then the folders above it in the same way."""
        while folder:
            try:
                with self._said(folder), self._beside(folder) as (above, name):
                    os.rmdir(name, dir_fd=above)
            except OSError:  # it is not empty, or another process removed it
                with contextlib.suppress(FileNotFoundError), self._listed(folder) as descriptor:
                    _sync(descriptor)
                return
            folder = folder.rpartition("/")[0]

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[IO[bytes]]:
        """A file opened for reading. Raises DamagedFile if it is missing, NotPermitted if this user may not read it."""
        try:
            with self._said(path, "a file"), self._beside(path) as (folder, name):
                descriptor = open_regular(folder, name, path)
        except FileNotFoundError as error:
            raise missing_file(self.uri, path) from error
        except PermissionError as error:
            raise may_not("read", self.uri, path) from error
        with os.fdopen(descriptor, "rb") as stream:
            yield stream

    @contextlib.contextmanager
    def _beside(self, path: str) -> Iterator[tuple[int, str]]:
        """A descriptor of the parent folder of a file or folder, and the name in it."""
        check_inside(self.uri, path)
        above, _, name = path.rpartition("/")
        with enter_folder(self.root, above) as folder:
            yield folder, name

    @contextlib.contextmanager
    def _listed(self, folder: str) -> Iterator[int]:
        """A descriptor of a folder that can be listed."""
        folder = folder.rstrip("/")
        if folder:
            check_inside(self.uri, folder)
        with list_names(self.root, folder) as descriptor:
            yield descriptor

    @contextlib.contextmanager
    def _said(self, path: str, wanted: str = "a folder") -> Iterator[None]:
        """Turn NotInside into DamagedFile; into FileNotFoundError if a folder is wanted and a file is in its place."""
        try:
            yield
        except NotInside as error:
            if error.kind == "a file" and wanted == "a folder":
                raise FileNotFoundError(path) from error
            raise not_a_file(self.uri, error.path, error.kind) from error

    @contextlib.contextmanager
    def _aside(self, path: str) -> Iterator[tuple[int, str, str]]:
        """A descriptor of the folder of a file to write, a private name in it, and the final name.

        The private file is always removed at the end.
        """
        check_inside(self.uri, path)
        above, _, name = path.rpartition("/")
        process = Process.this()
        owner = f"{_place(process)}-{process.pid}-{process.started}"
        aside = f".{name}.{owner}-{secrets.token_hex(6)}{ASIDE}"
        with contextlib.ExitStack() as stack:
            for attempt in range(MAX_ATTEMPTS):
                try:
                    folder = stack.enter_context(self._made(above))
                    os.close(os.open(aside, _NEW, 0o666, dir_fd=folder))
                    break
                except (FileNotFoundError, FileExistsError):  # another process is removing the empty folder
                    if attempt == MAX_ATTEMPTS - 1:
                        raise
                except PermissionError as error:
                    raise may_not("write", self.uri, above) from error
                except NotInside as error:
                    raise not_a_file(self.uri, error.path, error.kind) from error
            try:
                yield folder, aside, name
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(aside, dir_fd=folder)

    @contextlib.contextmanager
    def _made(self, folder: str) -> Iterator[int]:
        """A descriptor of a folder. Missing folders are made, and synced so that they survive a power cut."""
        try:
            with enter_folder(self.root, folder):
                is_there = True
        except FileNotFoundError:
            is_there = False
        if not is_there:
            _make_folder(self.root)
            so_far = ""
            for name in folder.split("/") if folder else ():
                with enter_folder(self.root, so_far) as descriptor, contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=descriptor)
                    _sync_names(descriptor)
                so_far = f"{so_far}/{name}" if so_far else name
        with enter_folder(self.root, folder) as descriptor:
            yield descriptor


def _place(process: Process) -> str:
    """A short hash of the host and namespace in which a process number is valid."""
    return hashlib.sha256(f"{process.host} {process.namespace}".encode()).hexdigest()[:8]


def _make_folder(folder: Path) -> None:
    """Make the folder of a memory and those above it, and sync each, so that they survive a power cut."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    with list_names(folder.parent, "") as descriptor:
        _sync(descriptor)


def _write(folder: int, name: str, data: bytes) -> None:
    """Write all bytes of a file, and sync it."""
    with os.fdopen(os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder), "wb") as stream:
        stream.write(data)
        stream.flush()
        _sync(stream.fileno())


def _unlink(folder: int, name: str, path: str) -> None:
    """Remove a file, or a link (not its target)."""
    try:
        os.unlink(name, dir_fd=folder)
    except (IsADirectoryError, PermissionError):  # for a folder, systems raise one or the other
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            raise NotInside(path, kind_of(status)) from None
        raise


def _sync_names(folder: int) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    os.fsync(descriptor)

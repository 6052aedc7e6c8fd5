"""A memory in a folder of this machine.

A file is written under a private name, made durable and only then linked or renamed to its own, so that no reader ever
sees half of it and a crash leaves at most a private file. Its name tells which process was writing.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from pipeline.errors import StorageError
from pipeline.store.processes import Process
from pipeline.store.storage import AlreadyExists, may_not, missing_file

_ASIDE = re.compile(r"\..*\.(?P<place>[0-9a-f]{8})-(?P<owner>\d+-\d*)-[0-9a-f]{12}\.aside")


MAX_ATTEMPTS = 100


class LocalStorage:
    """Storage in a folder of this machine, or of a file system mounted on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def read(self, path: str) -> bytes:
        with self._opened(path) as stream:
            return stream.read()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with self._opened(path) as stream:
            stream.seek(start)
            return stream.read(stop - start)

    def create(self, path: str, data: bytes) -> None:
        target = self.root / path
        with self._aside(target) as aside:
            aside.write_bytes(data)
            _sync(aside)
            try:
                os.link(aside, target)  # fails if the name is taken, which a rename would not
            except FileExistsError as error:
                raise AlreadyExists(path) from error
            except PermissionError as error:  # EPERM: the file system has no hard links
                raise StorageError(
                    f"the file system of {self.uri} cannot create a file only if its name is free (no hard links), "
                    "without which two writers could overwrite each other: keep the memory on another"
                ) from error
            _sync(target.parent)

    def replace(self, path: str, data: bytes) -> None:
        with self.publishing(path) as local:
            local.write_bytes(data)

    @contextlib.contextmanager
    def publishing(self, path: str) -> Iterator[Path]:
        target = self.root / path
        with self._aside(target) as aside:
            mode = aside.stat().st_mode  # what the umask leaves to every file
            yield aside
            if aside.stat().st_mode != mode:  # a library wrote through a file of its own, for its owner's eyes only
                aside.chmod(mode)
            _sync(aside)
            aside.replace(target)
            _sync(target.parent)

    def local_path(self, path: str) -> Path:
        with self._opened(path):  # libraries that map it do not tell "permission denied" from damage
            return self.root / path

    def release(self, path: str) -> None:
        pass  # the file itself was given

    def list(self, folder: str) -> list[str]:
        try:
            names = os.listdir(self.root / folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError as error:
            raise may_not("read", self.uri, folder) from error
        return sorted(name for name in names if not name.endswith(".aside"))

    def walk(self, folder: str = "") -> dict[str, int]:
        found = {}
        for above, _, names in os.walk(self.root / folder, onerror=self._refused):
            for name in names:
                path = os.path.join(above, name)
                with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                    status = os.lstat(path)
                    if stat.S_ISREG(status.st_mode):
                        found[os.path.relpath(path, self.root).replace(os.sep, "/")] = status.st_size
        return found

    def exists(self, path: str) -> bool:
        try:
            return (self.root / path).exists()
        except PermissionError as error:
            raise may_not("read", self.uri, path) from error

    def delete(self, paths: Iterable[str]) -> None:
        folders = set()
        for path in paths:
            target = self.root / path
            try:
                target.unlink(missing_ok=True)
            except PermissionError as error:
                raise may_not("write", self.uri, path) from error
            folders.add(target.parent)
        for folder in folders:
            self._tidy(folder)

    def remove_folder(self, folder: str) -> None:
        shutil.rmtree(self.root / folder, ignore_errors=True)

    def abandoned(self) -> Sequence[str]:
        found = []
        for path in self.walk():
            aside = _ASIDE.fullmatch(path.rpartition("/")[2])
            if aside and aside["place"] == _place(Process.this()):
                pid, _, started = aside["owner"].partition("-")
                owner = Process.this().model_copy(update={"pid": int(pid), "started": started})
                if not owner.is_alive():
                    found.append(path)
        return found

    def noncurrent(self) -> Sequence[str]:
        return []

    def _tidy(self, folder: Path) -> None:
        """Remove a folder if nothing is left in it, and those above it likewise."""
        while folder != self.root and folder.is_dir():
            try:
                folder.rmdir()
            except OSError:  # something is in it, or another process was faster
                with contextlib.suppress(FileNotFoundError):
                    _sync(folder)
                return
            folder = folder.parent

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[IO[bytes]]:
        """A file opened to be read. Raises DamagedFile when it is not there, NotPermitted when this user may not."""
        try:
            stream = (self.root / path).open("rb")
        except FileNotFoundError as error:
            raise missing_file(self.uri, path) from error
        except PermissionError as error:
            raise may_not("read", self.uri, path) from error
        with stream:
            yield stream

    def _refused(self, error: OSError) -> None:
        """A folder that is gone since it was listed has no files; one that may not be read is no empty one."""
        if isinstance(error, PermissionError):
            folder = os.path.relpath(error.filename, self.root).replace(os.sep, "/")
            raise may_not("read", self.uri, "" if folder == "." else folder) from error

    @contextlib.contextmanager
    def _aside(self, target: Path) -> Iterator[Path]:
        """A private name in the target's folder, gone afterwards whatever happened."""
        process = Process.this()
        owner = f"{_place(process)}-{process.pid}-{process.started}"
        aside = target.with_name(f".{target.name}.{owner}-{secrets.token_hex(6)}.aside")
        for attempt in range(MAX_ATTEMPTS):
            try:
                _make_folder(target.parent)
                aside.touch()
                break
            except (FileNotFoundError, FileExistsError):  # it was empty, and another process is just removing it
                if attempt == MAX_ATTEMPTS - 1:
                    raise
            except PermissionError as error:
                folder = os.path.relpath(target.parent, self.root).replace(os.sep, "/")
                raise may_not("write", self.uri, "" if folder == "." else folder) from error
        try:
            yield aside
        finally:
            aside.unlink(missing_ok=True)


def _place(process: Process) -> str:
    """Short for the table of process numbers that a process's number is in."""
    return hashlib.sha256(f"{process.host} {process.namespace}".encode()).hexdigest()[:8]


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each of them to stay after a power cut."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

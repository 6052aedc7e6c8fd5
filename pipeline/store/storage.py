"""The one door to the bytes of a memory.

Paths are relative to the memory and use "/". Everything the rest of the code may ask of a store is a method of
`Storage`, chosen so that an object store can answer all of it: whole objects, exclusive creation, listing by prefix.
Nothing here knows what the files mean.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from pipeline.errors import DamagedFile, UsageError


class AlreadyExists(Exception):
    """An exclusive creation found the name taken. Internal: callers decide what that means."""


class Storage(Protocol):
    """What a place that holds a memory must be able to do."""

    uri: str

    def read(self, path: str) -> bytes:
        """The whole file. Raises DamagedFile when it is not there."""

    def create(self, path: str, data: bytes) -> None:
        """Publish a file durably, only if the name is free; else AlreadyExists. Never seen half-written."""

    def publishing(self, path: str) -> contextlib.AbstractContextManager[Path]:
        """Yield a local path to write a large file to; on leaving, publish it durably, replacing what was there."""

    def local_path(self, path: str) -> Path:
        """Where the file can be memory-mapped on this machine. Raises DamagedFile when it is not there."""

    def list(self, folder: str) -> list[str]:
        """Names directly under a folder, sorted; empty when there is no such folder."""

    def exists(self, path: str) -> bool: ...

    def remove_folder(self, folder: str) -> None:
        """Remove everything under a folder that no version names."""


class LocalStorage:
    """A memory in a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def read(self, path: str) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError as error:
            raise _missing(self.uri, path) from error

    def create(self, path: str, data: bytes) -> None:
        target = self.root / path
        with self._aside(target) as aside:
            aside.write_bytes(data)
            _sync(aside)
            try:
                os.link(aside, target)  # fails if the name is taken, which a rename would not
            except FileExistsError as error:
                raise AlreadyExists(path) from error
            _sync(target.parent)

    @contextlib.contextmanager
    def publishing(self, path: str) -> Iterator[Path]:
        target = self.root / path
        with self._aside(target) as aside:
            yield aside
            _sync(aside)
            aside.replace(target)
            _sync(target.parent)

    def local_path(self, path: str) -> Path:
        target = self.root / path
        if not target.exists():
            raise _missing(self.uri, path)
        return target

    def list(self, folder: str) -> list[str]:
        target = self.root / folder
        if not target.is_dir():
            return []
        return sorted(name for name in os.listdir(target) if not name.endswith(".aside"))

    def exists(self, path: str) -> bool:
        return (self.root / path).exists()

    def remove_folder(self, folder: str) -> None:
        shutil.rmtree(self.root / folder, ignore_errors=True)

    @contextlib.contextmanager
    def _aside(self, target: Path) -> Iterator[Path]:
        """A private name in the target's folder, gone afterwards whatever happened."""
        _make_folder(target.parent)
        aside = target.with_name(f".{target.name}.{secrets.token_hex(6)}.aside")
        try:
            yield aside
        finally:
            aside.unlink(missing_ok=True)


def open_storage(uri: str) -> Storage:
    """The storage behind a URI. Raises UsageError for a scheme this release cannot write to."""
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
    if "://" in uri:
        raise UsageError(f"a memory cannot be kept at {uri} yet: give the path of a local folder")
    root = Path(uri).expanduser().absolute()
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file: a memory is a folder, so give the path of one")
    return LocalStorage(root)


def _missing(uri: str, path: str) -> DamagedFile:
    way_out = "run `index --rebuild`" if path.startswith("index/") else "restore it from a copy of the memory"
    return DamagedFile(f"{path} is missing from the memory at {uri}: {way_out}")


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

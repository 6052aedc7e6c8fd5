"""Reaching files below a folder without ever leaving it.

Each folder on the way is opened within the one above (openat) and none is a link, so that whatever lies there, what is
read, written or removed is below. The folder to begin from may itself be reached through a link. What lies at the end
has to be a regular file: of a link, a FIFO or a device nothing is read, and nobody waits for one.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

# A folder that may be entered need not be one that may be listed: O_PATH asks for no more than that.
_ENTER = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
}
LONGEST_NAME = 255
LONGEST_PATH = 4_095


class NotInside(Exception):
    """What lies at `path`, below the folder begun from, is `kind` where a file or a folder of its own belongs.

    Internal: whoever holds the folder says whose it is.
    """

    def __init__(self, path: str, kind: str) -> None:
        super().__init__(path, kind)
        self.path = path
        self.kind = kind


def is_inside(path: str) -> bool:
    """Whether a path leads below where it begins, name by name: relative, and without "..", "." or empty names."""
    if not path or "\0" in path or len(path) > LONGEST_PATH:
        return False
    try:
        names = os.fsencode(path).split(b"/")
    except UnicodeEncodeError:  # half of a character, as no file system has
        return False
    return all(name not in (b"", b".", b"..") and len(name) <= LONGEST_NAME for name in names)


@contextlib.contextmanager
def entered(root: Path, folder: str) -> Iterator[int]:
    """A descriptor of a folder below `root` ("" is that itself), to name files in; not to be listed.

    Raises NotInside where a link or anything but a folder is in the way, FileNotFoundError, PermissionError.
    """
    descriptor = os.open(root, _ENTER)
    try:
        so_far = ""
        for name in folder.split("/") if folder else ():
            so_far = f"{so_far}/{name}" if so_far else name
            below = _step(descriptor, name, so_far)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def listed(root: Path, folder: str) -> Iterator[int]:
    """As `entered`, with a descriptor that can be listed and synced."""
    with entered(root, folder) as descriptor:
        below = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=descriptor)
        try:
            yield below
        finally:
            os.close(below)


def open_regular(folder: int, name: str, path: str) -> int:
    """A descriptor of a regular file in a folder, to be read. Raises NotInside for anything else, and what open does.

    `path` says where it lies. What is no regular file is not even opened, for opening a device may do something.
    """
    _refuse_other(os.stat(name, dir_fd=folder, follow_symlinks=False), path)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=folder)
    except OSError:
        _refuse_other(os.stat(name, dir_fd=folder, follow_symlinks=False), path)  # exchanged since
        raise
    try:
        _refuse_other(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def kind_of(status: os.stat_result) -> str:
    """What a status is of, with its article."""
    return _KINDS.get(stat.S_IFMT(status.st_mode), "no file")


def _step(folder: int, name: str, path: str) -> int:
    try:
        return os.open(name, _ENTER | os.O_NOFOLLOW, dir_fd=folder)
    except OSError:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            raise NotInside(path, kind_of(status)) from None
        raise


def _refuse_other(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotInside(path, kind_of(status))

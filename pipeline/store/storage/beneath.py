"""Opens files below a folder without ever leaving it.

Each folder on the way is opened relative to the one above (openat), and a link is refused. So everything that is read,
written or removed lies below the root folder. The root folder itself may be reached through a link. The last name must
be a regular file: links, FIFOs and devices are not read, and no process waits for one.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

# A user may have the right to enter a folder but not to list it: O_PATH needs only the right to enter.
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
    """There is `kind` (such as "a link") at `path`, below the root folder, in the place of a file or a folder.

    Internal: the caller knows the root folder and raises the error for the user.
    """

    def __init__(self, path: str, kind: str) -> None:
        super().__init__(path, kind)
        self.path = path
        self.kind = kind


def is_inside(path: str) -> bool:
    """Whether a path stays below its start, name by name: it is relative, and has no "..", "." or empty names."""
    if not path or "\0" in path or len(path) > LONGEST_PATH:
        return False
    try:
        names = os.fsencode(path).split(b"/")
    except UnicodeEncodeError:  # half of a character, which no file name contains
        return False
    return all(name not in (b"", b".", b"..") and len(name) <= LONGEST_NAME for name in names)


@contextlib.contextmanager
def enter_folder(root: Path, folder: str) -> Iterator[int]:
    """A descriptor of a folder below `root` ("": `root` itself), to open files in. It must not be listed.

    Raises NotInside if a name on the way is a link or not a folder; also FileNotFoundError and PermissionError.
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
def list_names(root: Path, folder: str) -> Iterator[int]:
    """Like `entered`, but the descriptor can be listed and synced."""
    with enter_folder(root, folder) as descriptor:
        below = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=descriptor)
        try:
            yield below
        finally:
            os.close(below)


def open_regular(folder: int, name: str, path: str) -> int:
    """A descriptor of a regular file in a folder, for reading. Raises NotInside for anything else, or open's errors.

    `path` is the path for the error. Anything but a regular file is not opened: opening a device may have an effect.
    """
    _refuse_other(os.stat(name, dir_fd=folder, follow_symlinks=False), path)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=folder)
    except OSError:
        _refuse_other(os.stat(name, dir_fd=folder, follow_symlinks=False), path)  # replaced since the first check
        raise
    try:
        _refuse_other(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def kind_of(status: os.stat_result) -> str:
    """The kind of file of a status, with its article, such as "a link"."""
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

"""The copies of a verb: files of an object store on this machine for memory mapping, while its process runs.

A verb or a worker maps each file about once. So these copies are private to the process, are not hashed again, and can
be removed as soon as their part is done (`Storage.release`). Any file can be copied, also one that no version names yet
and whose hash is therefore unknown. Servers use `file_cache.py` for the files of their version.

Files of a memory are immutable by path, so a copy is made once. The folder of copies is private to a process and is
removed when it ends. If a process was killed, the next process that makes such a folder removes the old one: copies are
large, and may hold entries that were erased since.

All copies of a process are limited together, so that a job over many parts does not fill the disk: the least recently
used one is removed first. Copies that are mapped stay, because removing them would free nothing, and so do copies that
were asked for just now, because their callers are about to open them.
"""

import contextlib
import errno
import hashlib
import multiprocessing.util
import os
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.store.storage.processes import Process

OWNER = "owner.json"

LIMIT = "VISUAL_MEMORY_COPIES_BYTES"  # the environment variable with the most bytes of copies in a process
FREE_FRACTION = 0.8  # without it, of the bytes that are free or taken by this process's copies
# After this time a caller of `local_path` has opened the file, or waits for a whole job to have its turn.
OPENED_SECONDS = 60.0
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass
class _Copy:
    path: Path
    num_bytes: int
    used: float  # when it was last asked for


class Copies:
    """The copies of one memory's files in one process, removed with this object. It must not be used across a fork."""

    def __init__(self) -> None:
        self._copies: dict[str, _Copy] = {}
        self._copying: dict[str, threading.Lock] = {}
        self._making = threading.Lock()
        self._folder: Path | None = None

    def aside(self) -> Path:
        """An unused path in the private folder."""
        return self._private_folder() / secrets.token_hex(8)

    def get(self, path: str, fetch: Callable[[Path], None]) -> Path:
        """The copy of a file; the first caller fetches it to a temporary path. Raises what `fetch` raises."""
        with self._copying.setdefault(path, threading.Lock()):
            copy = self._copies.get(path)
            if copy is None or not copy.path.exists():  # removed to make room, or by a clean-up of temporary files
                copy = self._copied(path, fetch)
                make_room(copy.path.parent)
            copy.used = time.monotonic()
            return copy.path

    def drop(self, path: str) -> None:
        """Remove the copy of a file, or of every file below a folder. Existing memory maps stay valid."""
        for known in [known for known in [*self._copies] if known == path or known.startswith(f"{path}/")]:
            copy = self._copies.pop(known, None)
            if copy is not None:
                copy.path.unlink(missing_ok=True)

    @property
    def num_bytes(self) -> int:
        """The size of all copies."""
        return sum(copy.num_bytes for copy in [*self._copies.values()])

    def removable(self, mapped: Collection[str]) -> list[tuple[float, int, str]]:
        """The copies that are not mapped and were not asked for just now: when they were used, bytes, and files."""
        before = time.monotonic() - OPENED_SECONDS
        return [
            (copy.used, copy.num_bytes, path)
            for path, copy in [*self._copies.items()]
            if copy.used <= before and str(copy.path) not in mapped
        ]

    def _copied(self, path: str, fetch: Callable[[Path], None]) -> _Copy:
        aside = self.aside()
        # A hash as the name: the store's own name could lead out of the folder, or be too long.
        copy = aside.with_name(hashlib.sha256(path.encode()).hexdigest())
        try:
            try:
                fetch(aside)
            except OSError as error:
                if error.errno not in _FULL or not make_room(aside.parent, most=0):
                    raise
                fetch(aside)  # once more: the disk was full, and copies were removed
            aside.replace(copy)
        finally:
            aside.unlink(missing_ok=True)
        made = self._copies[path] = _Copy(copy, copy.stat().st_size, time.monotonic())
        return made

    def _private_folder(self) -> Path:
        with self._making:
            if self._folder is None or not self._folder.is_dir():
                _remove_orphans()
                # Resolved, so that a mapped copy is recognised by its path.
                self._folder = Path(tempfile.mkdtemp(prefix="visual-memory-")).resolve()
                # Unlike atexit, Finalize also runs in multiprocessing children, and never in a child of the owner.
                multiprocessing.util.Finalize(self, shutil.rmtree, (self._folder, True), exitpriority=0)
                (self._folder / OWNER).write_text(Process.this().model_dump_json())
                _process.every.add(self)
            return self._folder


class _OfProcess:
    """The copies of every open storage of this process. A fork begins with none: its parent's are not its own."""

    def __init__(self) -> None:
        self.begin()
        os.register_at_fork(after_in_child=self.begin)

    def begin(self) -> None:
        self.every = weakref.WeakSet[Copies]()
        self.making_room = threading.Lock()


_process = _OfProcess()


def make_room(folder: Path, most: int | None = None) -> int:
    """Remove the least recently used copies of this process until they have at most `most` bytes (None: the limit).

    Returns how many were removed. Copies in use stay, even if they have more bytes. Raises UsageError for a LIMIT that
    is no number.
    """
    with _process.making_room:
        every = [*_process.every]
        total = sum(copies.num_bytes for copies in every)
        most = _limit(folder, total) if most is None else most
        if total <= most:
            return 0
        mapped = _mapped_files()
        candidates = [(*found, copies) for copies in every for found in copies.removable(mapped)]
        removed = 0
        for _, num_bytes, path, copies in sorted(candidates, key=lambda found: found[0]):
            if total <= most:
                break
            copies.drop(path)
            total -= num_bytes
            removed += 1
        return removed


def _limit(folder: Path, total: int) -> int:
    """The most bytes of copies in this process: LIMIT, or a fraction of what is free or taken by them."""
    given = os.environ.get(LIMIT)
    if given is None:
        return int(FREE_FRACTION * (shutil.disk_usage(folder).free + total))
    if not given.isdecimal():
        raise UsageError(f"{LIMIT} {given} is no number of bytes: give one such as 20000000000, or unset it")
    return int(given)


def _mapped_files() -> frozenset[str]:
    """The files that this process has mapped; empty on systems without /proc."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            return frozenset(line.rstrip("\n").split(maxsplit=5)[-1] for line in maps if "/" in line)
    except OSError:
        return frozenset()


def _remove_orphans() -> None:
    for owner in Path(tempfile.gettempdir()).glob(f"visual-memory-*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError):  # of another user, or just being made or removed
            if Process.model_validate_json(owner.read_bytes()).is_alive() is False:
                shutil.rmtree(owner.parent, ignore_errors=True)

"""Local copies of the files of an object store, for memory mapping.

Files of a memory are immutable by path, so a copy is made once. The folder of copies is private to a process and is
removed when it ends. If a process was killed, the next process that makes such a folder removes the old one: copies are
large, and may hold entries that were erased since.
"""

import contextlib
import hashlib
import multiprocessing.util
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.store.storage.processes import Process

OWNER = "owner.json"


class Copies:
    """The copies of one memory's files in one process, removed with this object. It must not be used across a fork."""

    def __init__(self) -> None:
        self._copies: dict[str, Path] = {}
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
            if copy is None or not copy.exists():  # a clean-up of temporary files may have removed it
                aside = self.aside()
                # A hash as the name: the store's own name could lead out of the folder, or be too long.
                copy = aside.with_name(hashlib.sha256(path.encode()).hexdigest())
                try:
                    fetch(aside)
                    aside.replace(copy)
                finally:
                    aside.unlink(missing_ok=True)
                self._copies[path] = copy
            return copy

    def drop(self, path: str) -> None:
        """Remove the copy of a file, or of every file below a folder. Existing memory maps stay valid."""
        for known in [known for known in [*self._copies] if known == path or known.startswith(f"{path}/")]:
            copy = self._copies.pop(known, None)
            if copy is not None:
                copy.unlink(missing_ok=True)

    def _private_folder(self) -> Path:
        with self._making:
            if self._folder is None or not self._folder.is_dir():
                _remove_orphans()
                self._folder = Path(tempfile.mkdtemp(prefix="visual-memory-"))
                # Unlike atexit, Finalize also runs in multiprocessing children, and never in a child of the owner.
                multiprocessing.util.Finalize(self, shutil.rmtree, (self._folder, True), exitpriority=0)
                (self._folder / OWNER).write_text(Process.this().model_dump_json())
            return self._folder


def _remove_orphans() -> None:
    for owner in Path(tempfile.gettempdir()).glob(f"visual-memory-*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError):  # of another user, or just being made or removed
            if Process.model_validate_json(owner.read_bytes()).is_alive() is False:
                shutil.rmtree(owner.parent, ignore_errors=True)

"""Counts what is asked of a storage: requests and bytes, by kind and by path.

`CountingStorage` stands before any storage, in this process. `counted` puts one beneath a memory. `traffic` counts at
the server instead, so that other processes (Ray's workers, the command line) count too.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from pipeline.reader import Reader
from pipeline.store.storage.interface import Storage
from tests.store.proxy import Proxy
from tests.store.seaweed import SeaweedFS


class Counts:
    """Requests by kind, and bytes by path. Threads may count at once.

    The kinds of a CountingStorage are the names of the methods of Storage. `local_path` is a request only if it fetches
    the file. Those of `traffic` are the methods of HTTP.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.fetched: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self._counting = threading.Lock()

    def count(self, kind: str, path: str = "", fetched: int = 0, written: int = 0) -> None:
        """Count one request and its bytes."""
        with self._counting:
            self.requests[kind] += 1
            if fetched:
                self.fetched[path] += fetched
            if written:
                self.written[path] += written

    def reset(self) -> None:
        """Begin again with nothing."""
        with self._counting:
            for counter in (self.requests, self.fetched, self.written):
                counter.clear()

    @property
    def num_requests(self) -> int:
        """All requests. A copy that is there already, and `release`, are none."""
        return self.requests.total()

    @property
    def bytes_fetched(self) -> int:
        return self.fetched.total()

    @property
    def bytes_written(self) -> int:
        return self.written.total()

    def fetched_of(self, part: str) -> int:
        """The bytes fetched of files with `part` in their path, such as "/entries/"."""
        return sum(num_bytes for path, num_bytes in self.fetched.items() if part in path)

    def __str__(self) -> str:
        asked = ", ".join(f"{number} {kind}" for kind, number in sorted(self.requests.items()))
        return f"{asked or 'nothing asked'}; {self.bytes_fetched:,} bytes fetched, {self.bytes_written:,} written"


class CountingStorage:
    """A storage that counts what is asked of another.

    A folder is counted as an object store would be: `local_path` fetches the whole file, until `release` or a change
    of the file lets the next call fetch it again.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._copies: dict[str, tuple[int, int, int]] = {}
        self.counts = Counts()
        self.uri = storage.uri

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_storage":
            raise AttributeError(name)
        return getattr(self._storage, name)  # what only one kind of storage has, such as `root`

    def read(self, path: str) -> bytes:
        data = self._storage.read(path)
        self.counts.count("read", path, fetched=len(data))
        return data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        data = self._storage.read_range(path, start, stop)
        self.counts.count("read_range", path, fetched=len(data))
        return data

    def create(self, path: str, data: bytes) -> None:
        self.counts.count("create", path, written=len(data))
        self._storage.create(path, data)

    def replace(self, path: str, data: bytes) -> None:
        self.counts.count("replace", path, written=len(data))
        self._storage.replace(path, data)

    @contextlib.contextmanager
    def publishing(self, path: str) -> Iterator[Path]:
        with self._storage.publishing(path) as local:
            yield local
            self.counts.count("publishing", path, written=local.stat().st_size)

    def copy_from(self, source: Storage, path: str) -> bool:
        copied = self._storage.copy_from(getattr(source, "_storage", source), path)
        if copied:
            self.counts.count("copy_from", path)
        return copied

    def local_path(self, path: str) -> Path:
        local = self._storage.local_path(path)
        found = local.stat()
        signature = found.st_ino, found.st_size, found.st_mtime_ns  # another copy has another inode
        if self._copies.get(path) != signature:
            self._copies[path] = signature
            self.counts.count("local_path", path, fetched=found.st_size)
        return local

    def release(self, path: str) -> None:
        self._copies.pop(path, None)
        self._storage.release(path)

    def list(self, folder: str) -> list[str]:
        self.counts.count("list")
        return self._storage.list(folder)

    def walk(self, folder: str = "") -> dict[str, int]:
        self.counts.count("walk")
        return self._storage.walk(folder)

    def strangers(self) -> Mapping[str, str]:
        self.counts.count("strangers")
        return self._storage.strangers()

    def exists(self, path: str) -> bool:
        self.counts.count("exists")
        return self._storage.exists(path)

    def delete(self, paths: Iterable[str]) -> None:
        self.counts.count("delete")
        self._storage.delete(paths)

    def remove_folder(self, folder: str) -> None:
        self.counts.count("remove_folder")
        self._storage.remove_folder(folder)

    def abandoned(self) -> Sequence[str]:
        self.counts.count("abandoned")
        return self._storage.abandoned()

    def noncurrent(self) -> Sequence[str]:
        self.counts.count("noncurrent")
        return self._storage.noncurrent()


def counted(memory: Reader) -> Counts:
    """Count what this memory (a VisualMemory or a Reader) asks of its storage from now on, in this process."""
    counting = CountingStorage(memory.log.storage)
    memory.log.storage = counting
    return counting.counts


@contextlib.contextmanager
def traffic(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    """Count every request to the server from storages that are opened within, in any process that inherits the
    environment. Paths are keys with their bucket, without the query.
    """
    counts = Counts()

    def seen(method: str, path: str, sent: int, answered: int) -> None:
        fetched, written = (answered, 0) if method == "GET" else (0, sent)
        counts.count(method, unquote(path.partition("?")[0]).lstrip("/"), fetched, written)

    proxy = Proxy(s3.endpoint, lambda _method, _path, status: status, seen)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    with monkeypatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        try:
            yield counts
        finally:
            proxy.shutdown()
            proxy.server_close()

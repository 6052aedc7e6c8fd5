"""A store whose process dies: from the n-th change on nothing is changed any more, not even by what cleans up."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.store.storage.leases import LeaseRecord, read_leases
from pipeline.store.storage.local import LocalStorage


class Died(BaseException):
    """Nothing that runs may catch it, as nothing catches a kill."""


class DyingStorage(LocalStorage):
    """`changes` left before it dies. Threads beside the main one only find that nothing can be written."""

    def __init__(self, root: Path, changes: int) -> None:
        super().__init__(root)
        self.changes = changes
        self._counting = threading.Lock()

    @property
    def died(self) -> bool:
        return self.changes < 0

    def create(self, path: str, data: bytes) -> None:
        self._change()
        super().create(path, data)

    @contextlib.contextmanager
    def publishing(self, path: str) -> Iterator[Path]:
        with super().publishing(path) as aside:
            yield aside
            self._change()

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            self._change()
            super().delete([path])

    def _change(self) -> None:
        with self._counting:
            self.changes -= 1
            if self.changes < 0:
                raise Died if threading.current_thread() is threading.main_thread() else OSError("died")


def bury(storage: LocalStorage) -> None:
    """Make the leases of this process those of one that is dead, as after a kill."""
    for record in read_leases(storage):
        dead = record.model_copy(update={"process": record.process.model_copy(update={"started": "1"})})
        assert isinstance(dead, LeaseRecord)
        storage.replace(dead.path, dead.model_dump_json().encode())

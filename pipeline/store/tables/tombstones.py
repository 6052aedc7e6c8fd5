"""Tombstones: files of forgotten ids. A file of many ids is read by row group, so that one id costs a few kilobytes.

Each version that forgets adds one file. It replaces the last files that have no more ids than it gathers.
So a memory has one file for each doubling of the forgotten ids, about 24 for ten million. A forget writes its own ids,
and each id is written again once for each doubling.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.recent import Recent
from pipeline.store.layout import TOMBSTONES_FOLDER, overlay_path
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.parquet_columns import READ_WHOLE, id_range, read_id_range, read_rows
from pipeline.store.tables.schemas import TOMBSTONES, read_table, write_rows, write_without_rows

CACHED_BYTES = 256 << 20  # of ids in memory, the last used: 8 bytes each

_NONE = np.empty(0, np.int64)
_read = Recent[np.ndarray](CACHED_BYTES)


def write_tombstones(storage: Storage, lease: Lease, version: int, ids_N: np.ndarray) -> FileRef:
    """Publish the ids (int64 [N]) that the next version forgets."""
    path = overlay_path(TOMBSTONES_FOLDER, version, lease.nonce)
    table = pa.table([pa.array(np.unique(ids_N))], schema=TOMBSTONES)
    return write_rows(storage, path, table) if table.num_rows else write_without_rows(storage, path, table)


def read_tombstones(storage: Storage, files: Sequence[FileRef]) -> np.ndarray:
    """Every forgotten id, ascending, int64 [N]. Reads all files. Raises DamagedFile."""
    return Tombstones(storage, files).all()


class Tombstones:
    """The forgotten ids in some files. Files are read when they are asked about, and cached in this process.

    A question about few ids reads no file whose ids lie elsewhere, and of a large file the row groups that may hold
    the ids: about 20 KB each. Every method raises DamagedFile.
    """

    def __init__(self, storage: Storage, files: Sequence[FileRef]) -> None:
        self._storage = storage
        self._files = tuple(file for file in files if file.rows)

    def all(self) -> np.ndarray:
        """Every forgotten id, ascending, int64 [N]."""
        lists = [self._whole(file) for file in self._files]
        return lists[0] if len(lists) == 1 else np.unique(np.concatenate([_NONE, *lists]))

    def between(self, first: int, last: int) -> np.ndarray:
        """The forgotten ids of an inclusive range, ascending, int64 [N]."""
        found = [self._between(file, first, last) for file in self._files if _overlaps(file, first, last)]
        return found[0] if len(found) == 1 else np.unique(np.concatenate([_NONE, *found]))

    def contains(self, ids_N: np.ndarray) -> np.ndarray:
        """Which of some ids (int64 [N]) are forgotten, bool [N]."""
        forgotten_N = np.zeros(len(ids_N), bool)
        order_N = np.argsort(ids_N)
        sorted_N = ids_N[order_N]
        for file in self._files:
            first, last = id_range(file)
            start, stop = np.searchsorted(sorted_N, first), np.searchsorted(sorted_N, last, side="right")
            if start < stop:
                asked = sorted_N[start:stop]
                held = self._among(file, asked)
                at = np.minimum(np.searchsorted(held, asked), max(len(held) - 1, 0))
                forgotten_N[order_N[start:stop]] |= held[at] == asked if len(held) else False
        return forgotten_N

    def _between(self, file: FileRef, first: int, last: int) -> np.ndarray:
        """The ids of a file in an inclusive range."""
        if self._is_read_by_group(file):
            return read_id_range(self._storage, file, first, last)
        ids_N = self._whole(file)
        held: np.ndarray = ids_N[np.searchsorted(ids_N, first) : np.searchsorted(ids_N, last, side="right")]
        return held

    def _among(self, file: FileRef, asked_N: np.ndarray) -> np.ndarray:
        """Those of the asked ids that a file has, or more."""
        if self._is_read_by_group(file) and len(asked_N) < READ_WHOLE:
            held: np.ndarray = read_rows(self._storage, file, asked_N, ["id"]).column("id").to_numpy()
            return held
        return self._whole(file)

    def _is_read_by_group(self, file: FileRef) -> bool:
        return file.rows > READ_WHOLE and _read.get(_key(self._storage, file)) is None

    def _whole(self, file: FileRef) -> np.ndarray:
        def read() -> np.ndarray:
            ids_N: np.ndarray = read_table(self._storage, file).column("id").to_numpy()
            ids_N.flags.writeable = False
            return ids_N

        return _read.get_or_make(_key(self._storage, file), read, lambda ids_N: ids_N.nbytes)


def _overlaps(file: FileRef, first: int, last: int) -> bool:
    begin, end = id_range(file)
    return begin <= last and end >= first


def _key(storage: Storage, file: FileRef) -> tuple[str, str, str]:
    return storage.uri, file.path, file.sha256

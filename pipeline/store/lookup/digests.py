"""Finds entries with the same bytes by the sha256 of their image files, read from the entries files on demand.

A digest is the first eight bytes of a sha256, as uint64. If two entries are compared because their vectors are alike,
their digests are equal by chance once in 2 ** 64 times. In a set of a billion digests, the digest of other bytes is
found by chance once in 2 ** 34 times.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.errors import DamagedFile
from pipeline.recent import Recent
from pipeline.store.log.state import State
from pipeline.store.storage.file_ranges import FileRanges
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.digest_files import digests_in
from pipeline.store.tables.ids import in_common, is_in
from pipeline.store.tables.parquet_columns import read_columns_of
from pipeline.store.tables.tombstones import read_tombstones

KEPT_BYTES = 256 << 20  # of the rows of 16 million entries
_COLUMNS = ("id", "sha256")


class Digests:
    """The digests of the entries of a version, forgotten entries included.

    A request reads the files that hold its entries, several at once: 64 hexadecimal characters and an id for each row.
    Of the files used last, 16 bytes for each row stay in memory, up to KEPT_BYTES; others are read again. Requests in
    the order of the ids read each file once.
    """

    def __init__(self, storage: Storage, state: State) -> None:
        self._storage = storage
        self._files = FileRanges(state.entries_files())
        self._read = Recent[tuple[np.ndarray, np.ndarray]](KEPT_BYTES)
        ids = np.array([single.id for single in state.pending], np.int64)
        order = np.argsort(ids)
        pending = digests_in(pa.array([single.sha256 for single in state.pending], pa.string()))
        self._pending = ids[order], pending[order]

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The digests of some entries (ids: int64 in any shape) as uint64 in the same shape. Raises DamagedFile."""
        wanted, places = np.unique(ids, return_inverse=True)
        found = np.zeros(len(wanted), np.uint64)
        known = np.zeros(len(wanted), bool)
        self._look_up(wanted, self._pending, found, known)
        unread = list[RowsFile]()
        for file, _ in self._files.holding(wanted[~known]):
            rows = self._read.get(file.path)
            if rows is None:
                unread.append(file)
            else:
                self._look_up(wanted, rows, found, known)
        for file, table in zip(unread, read_columns_of(self._storage, unread, _COLUMNS), strict=True):
            rows = _rows_of(table)
            self._read.put(file.path, rows, rows[0].nbytes + rows[1].nbytes)
            self._look_up(wanted, rows, found, known)
        if not known.all():
            raise DamagedFile(
                f"entry {wanted[~known][0]} of the memory at {self._storage.uri} is in no file: run `verify`"
            )
        return found[places].reshape(np.shape(ids))

    @staticmethod
    def _look_up(wanted: np.ndarray, rows: tuple[np.ndarray, np.ndarray], found: np.ndarray, known: np.ndarray) -> None:
        ids_N, digests_N = rows
        at, here = in_common(ids_N, wanted)
        new = ~known[here]
        found[here[new]], known[here[new]] = digests_N[at[new]], True


def _rows_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The ids of some rows ascending (int64 [N]), and their digests (uint64 [N])."""
    ids_N = table["id"].to_numpy()
    order = np.argsort(ids_N)
    return ids_N[order], digests_in(table["sha256"])[order]


def live_rows(storage: Storage, state: State) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids int64 [N] and digests uint64 [N] of the live entries of a version, file by file. Raises DamagedFile."""
    forgotten = read_tombstones(storage, state.tombstones)
    for table in read_columns_of(storage, state.entries_files(), _COLUMNS):
        ids_N = table["id"].to_numpy()
        alive_N = ~is_in(ids_N, forgotten)
        yield ids_N[alive_N], digests_in(table["sha256"])[alive_N]
    ids_N = np.array([single.id for single in state.pending], np.int64)
    alive_N = ~is_in(ids_N, forgotten)
    if len(ids_N):
        yield ids_N[alive_N], digests_in(pa.array([single.sha256 for single in state.pending], pa.string()))[alive_N]

"""The digests of a memory, frozen when an add is planned: a part finds the same duplicates at any later time.

The file is a NumPy array uint64 [2, N], read by memory mapping. The first row has the digests of the live entries,
ascending; the second row has the id of each entry. The file belongs to the plan of an unfinished add, and is removed
when the add is committed.
"""

import contextlib
import tempfile
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.log.state import State
from pipeline.store.lookup.digests import live_rows
from pipeline.store.storage.file_refs import FileRef, describe, reading, unaltered_path
from pipeline.store.storage.interface import Storage

BUCKET_ROWS = 1 << 22  # sorted at a time: 64 MB, and as much again while sorting
MAX_BUCKETS = 256


def freeze_digests(
    storage: Storage, path: str, state: State, on_progress: OnProgress = ignore_progress
) -> FileRef | None:
    """Publish the digests of the live entries of a version; None if there is no live entry.

    Reads ids and sha256 of every entry, file by file: 35 bytes for each entry on disk. A million entries take half a
    second of CPU and a file of 16 MB. A billion would take 8 minutes at that rate, 35 GB of reading and a file of
    16 GB, which every machine that works on the add fetches. Rows are distributed to temporary files by the first bits
    of their digests, and sorted file by file, so that at most 130 MB are in memory. Raises DamagedFile.
    """
    if not state.num_live:
        return None
    bits = min(max(state.num_entries // BUCKET_ROWS, 0).bit_length(), MAX_BUCKETS.bit_length() - 1)
    with contextlib.ExitStack() as stack:
        buckets: list[IO[bytes]] = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1 << bits)]
        rows, total = 0, state.num_entries
        for ids_N, digests_N in live_rows(storage, state):
            pairs_N2 = np.stack([digests_N, ids_N.astype(np.uint64)], axis=1)
            places_N = digests_N >> np.uint64(64 - bits) if bits else np.zeros(len(digests_N), np.uint64)
            for place in np.unique(places_N).tolist():
                buckets[place].write(np.ascontiguousarray(pairs_N2[places_N == place]).data)
            rows += len(ids_N)
            on_progress(Progress("looking for duplicates", min(rows, total), total))
        if not rows:
            return None
        with storage.publishing(path) as local:
            _write_sorted(local, buckets, rows)
            return describe(path, local, rows)


def _write_sorted(local: Path, buckets: list[IO[bytes]], rows: int) -> None:
    written = np.lib.format.open_memmap(local, "w+", np.uint64, (2, rows))  # type: ignore[no-untyped-call]
    start = 0
    for bucket in buckets:
        bucket.seek(0)
        pairs_N2 = np.frombuffer(bucket.read(), np.uint64).reshape(-1, 2)
        order_N = np.lexsort((pairs_N2[:, 1], pairs_N2[:, 0]))  # of equal digests, the least id comes first
        written[:, start : start + len(order_N)] = pairs_N2[order_N].T
        start += len(order_N)
    written.flush()


class FrozenDigests:
    """Looks up digests among the digests frozen with a plan. Raises DamagedFile if the file was altered."""

    def __init__(self, storage: Storage, file: FileRef) -> None:
        local = unaltered_path(storage, file)
        with reading(storage.uri, file.path):
            self._held_2N = np.load(local, mmap_mode="r", allow_pickle=False)
            if (self._held_2N.dtype, self._held_2N.shape) != (np.uint64, (2, file.rows)) or not file.rows:
                raise ValueError(f"it does not hold the hashes of {file.rows:,} entries")

    def holders(self, digests_N: np.ndarray) -> np.ndarray:
        """The id of the entry with each digest (uint64 [N]): int64 [N], the least id of several, -1 for none."""
        known_N, ids_N = self._held_2N
        at_N = np.minimum(np.searchsorted(known_N, digests_N), len(known_N) - 1)
        found: np.ndarray = np.where(known_N[at_N] == digests_N, ids_N[at_N].astype(np.int64), -1)
        return found

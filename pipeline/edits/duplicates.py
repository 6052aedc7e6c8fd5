"""Compares an add with the entries before it: images of the same bytes, and classes far smaller than others.

Both checks run after the images are embedded, on columns of the entries files. They run only if reading these columns
costs little compared with the add.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.decisions.small_classes import SmallClass, small_classes
from pipeline.errors import VisualMemoryError
from pipeline.plain_log import plain_logger
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.log.label_counts import by_label
from pipeline.store.log.state import State
from pipeline.store.lookup.digests import live_rows
from pipeline.store.lookup.entry_lookup import EntryLookup
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.digest_files import digests_in
from pipeline.store.tables.parquet_columns import read_columns_of

# A memory of up to so many entries is read after every add: about a second from a local disk.
LOOKED_THROUGH = 2_000_000
# A larger memory is read if it has at most so many entries per added image: 10 microseconds of reading beside the
# milliseconds of embedding the image.
ENTRIES_AN_IMAGE = 20
MOST_ADDED = 100_000_000  # added images whose digests are held in RAM, 800 MB


logger = plain_logger(__name__)


@dataclass(frozen=True)
class Duplicates:
    """Counts of added images whose bytes the memory held already (`held`) and that repeat others of the add (`within`).

    `held` is None if the memory was not read: it is too large compared with the add, or could not be read.
    """

    held: int | None
    within: int


def is_looked_for(state: State | None, num_added: int) -> bool:
    """Whether the entries of a memory are read after an add of `num_added` images."""
    entries = state.num_entries if state is not None else 0
    return num_added <= MOST_ADDED and entries <= max(LOOKED_THROUGH, ENTRIES_AN_IMAGE * num_added)


def find_duplicates(
    storage: Storage, before: State | None, added: tuple[RowsFile, ...], on_progress: OnProgress = ignore_progress
) -> Duplicates:
    """Compare the bytes of the added images with the entries of the memory before, and with each other.

    It holds 8 bytes per added image. It reads ids and sha256 of the memory's entries, 35 bytes each on disk, one file
    at a time. A million entries take half a second of CPU. A billion would take 8 minutes at that rate, so they are
    read only for an add that takes far longer. If the memory cannot be read, the error is logged and `held` is None.
    """
    num_added = sum(file.rows for file in added)
    if num_added > MOST_ADDED:
        return Duplicates(None, 0)
    columns, read = list[np.ndarray](), 0
    for table in read_columns_of(storage, added, ["sha256"]):
        columns.append(digests_in(table["sha256"]))
        read += table.num_rows
        on_progress(Progress("looking for duplicates", read, num_added))
    new, numbers = np.unique(np.concatenate([np.empty(0, np.uint64), *columns]), return_counts=True)
    within = num_added - len(new)
    if before is None or not before.num_live or not len(new):
        return Duplicates(0, within)
    if not is_looked_for(before, num_added):
        return Duplicates(None, within)
    held = np.zeros(len(new), bool)
    try:
        for _, digests_N in live_rows(storage, before):
            at_N = np.minimum(np.searchsorted(new, digests_N), len(new) - 1)
            held[at_N[new[at_N] == digests_N]] = True
    except VisualMemoryError as error:  # damaged or meanwhile erased files must not stop an add
        logger.warning("%s; whether the memory held some of these images already was not looked for", error)
        return Duplicates(None, within)
    return Duplicates(int(numbers[held].sum()), within)


def find_small_classes(storage: Storage, state: State, added: pa.Table) -> tuple[SmallClass, ...]:
    """The added classes that larger classes of the memory outvote; `added` are the counts of the added entries.

    Reads the counts of the version. If they cannot be read, the result is empty: the add is already committed.
    """
    ours = by_label(added)
    try:
        counts = by_label(EntryLookup(storage, state).counts()) if ours else {}
    except VisualMemoryError as error:
        logger.warning("%s; whether classes are small beside others was not looked for", error)
        return ()
    return tuple(small for small in small_classes(counts) if small.label in ours)

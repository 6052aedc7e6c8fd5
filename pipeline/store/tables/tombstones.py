"""Tombstones: a small file of forgotten ids for each version that forgot something, folded into one at times."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.store.layout import TOMBSTONES_FOLDER, overlay_path
from pipeline.store.storage.file_refs import FileRef, describe
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.schemas import TOMBSTONES, read_table, write_table

FOLD_EVERY = 64  # files; the next file repeats all of their ids


def write_tombstones(storage: Storage, lease: Lease, version: int, ids_N: np.ndarray) -> FileRef:
    """Publish the ids (int64 [N]) that the next version forgets."""
    path = overlay_path(TOMBSTONES_FOLDER, version, lease.nonce)
    with storage.publishing(path) as local:
        write_table(pa.table([pa.array(np.unique(ids_N))], schema=TOMBSTONES), local)
        return describe(path, local, len(ids_N))


def read_tombstones(storage: Storage, files: Sequence[FileRef]) -> np.ndarray:
    """Every forgotten id, ascending, int64 [N]. Raises DamagedFile."""
    lists = [read_table(storage, file).column("id").to_numpy() for file in files]
    return np.unique(np.concatenate(lists)) if lists else np.empty(0, np.int64)

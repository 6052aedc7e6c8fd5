"""Reads the vectors of some entries from their files."""

from collections.abc import Sequence

import numpy as np

from pipeline.errors import DamagedFile
from pipeline.store.storage.file_ranges import FileRanges
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.parquet_columns import read_rows
from pipeline.store.tables.schemas import embedding_matrix


def read_embeddings(storage: Storage, files: Sequence[RowsFile], ids_N: np.ndarray, dimension: int) -> np.ndarray:
    """Stored vectors of entries (ids int64 [N], in any order), float16 [N, D], one file at a time.

    Reads the ids and vectors of the row groups that may hold them: 12 MB a group of 384 dimensions. No local copy
    stays. Raises DamagedFile, also if no file has one of the entries.
    """
    vectors_ND = np.empty((len(ids_N), dimension), np.float16)
    found_N = np.zeros(len(ids_N), bool)
    order_N = np.argsort(ids_N, kind="stable")
    for file, held in FileRanges(files).holding(ids_N[order_N]):
        wanted = order_N[held][~found_N[order_N[held]]]
        table = read_rows(storage, file, ids_N[wanted], ["id", "embedding"])
        known_N = table.column("id").to_numpy()
        if not len(known_N):
            continue
        order = np.argsort(known_N)
        at = order[np.minimum(np.searchsorted(known_N, ids_N[wanted], sorter=order), len(known_N) - 1)]
        here = known_N[at] == ids_N[wanted]
        vectors_ND[wanted[here]] = embedding_matrix(table.column("embedding"))[at[here]]
        found_N[wanted[here]] = True
    if not found_N.all():
        raise DamagedFile(f"entry {ids_N[~found_N][0]} of the memory at {storage.uri} is in no file: run `verify`")
    return vectors_ND

"""Thumbnails: small pictures stored beside the entries, so that a page can show a neighbour whose file is gone."""

from collections.abc import Sequence

from pipeline.store.log.single_adds import thumbnails_of_singles
from pipeline.store.log.state import State
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.parquet_columns import read_rows


def read_thumbnails(storage: Storage, state: State, ids: Sequence[int]) -> dict[int, bytes]:
    """JPEG bytes by id; ids without a thumbnail are left out. Raises DamagedFile."""
    asked = set(ids)
    kept = thumbnails_of_singles([single for single in state.pending if single.id in asked])
    for file in (file for segment in state.segments for file in segment.thumbnails):
        if any(file.first_id <= entry_id <= file.last_id for entry_id in ids):
            table = read_rows(storage, file, ids, ["id", "jpeg"])
            kept |= dict(zip(table.column("id").to_pylist(), table.column("jpeg").to_pylist(), strict=True))
    return kept

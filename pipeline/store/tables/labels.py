"""The overlay of labels: labels given to entries after they were stored, by label set, and the maps of label sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.recent import Recent
from pipeline.store.layout import LABELS_FOLDER, map_path, overlay_path
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.parquet_columns import READ_WHOLE, id_range, read_rows
from pipeline.store.tables.schemas import LABEL_MAP, LABELS, read_table, write_rows, write_without_rows

CACHED_BYTES = 128 << 20  # of overlay files in memory, the last used

_read = Recent[pa.Table](CACHED_BYTES)


@dataclass(frozen=True)
class OwnLabels:
    """The labels of single entries in one label set: ids int64 [N] ascending, and a label for each (null: none)."""

    ids_N: np.ndarray
    labels: pa.Array


def label_rows(ids_N: np.ndarray, labels: Sequence[str | None], label_set: str | None) -> pa.Table:
    """Rows of the overlay, one for each id."""
    sets = pa.array([label_set] * len(ids_N), pa.string())
    return pa.table([pa.array(ids_N, pa.int64()), sets, pa.array(labels, pa.string())], schema=LABELS)


def write_labels(storage: Storage, lease: Lease, version: int, rows: pa.Table) -> FileRef:
    """Publish the labels that a version is about to give, ordered by id; of two rows with one id the later counts."""
    path = overlay_path(LABELS_FOLDER, version, lease.nonce)
    if not rows.num_rows:
        return write_without_rows(storage, path, rows)
    order_N = np.argsort(rows.column("id").to_numpy(), kind="stable")
    return write_rows(storage, path, rows.take(pa.array(order_N)))


def read_label_rows(storage: Storage, files: Sequence[FileRef]) -> pa.Table:
    """The rows of some overlay files, in the given order. Raises DamagedFile."""
    return pa.concat_tables([LABELS.empty_table(), *(read_table(storage, file) for file in files)])


def own_labels_of(storage: Storage, files: Sequence[FileRef], ids_N: np.ndarray, label_set: str | None) -> OwnLabels:
    """The own labels of some entries in a label set: of ids that have one. `files` are the overlay, oldest first.

    Reads the row groups that may hold the ids, of the files whose range of ids they are in. Raises DamagedFile.
    """
    tables = [LABELS.empty_table()]
    for file in files:
        first, last = id_range(file)
        asked_N = ids_N[(ids_N >= first) & (ids_N <= last)] if len(ids_N) else ids_N
        if len(asked_N) and file.rows:
            tables.append(_rows_of(storage, file, asked_N))
    return newest_labels(pa.concat_tables(tables), label_set)


def _rows_of(storage: Storage, file: FileRef, ids_N: np.ndarray) -> pa.Table:
    if file.rows > READ_WHOLE and len(ids_N) < READ_WHOLE:
        return read_rows(storage, file, ids_N, LABELS.names)
    key = storage.uri, file.path, file.sha256
    table = _read.get_or_make(key, lambda: read_table(storage, file), lambda table: table.nbytes + 1_024)
    return table.filter(pc.is_in(table["id"], pa.array(ids_N)))


def newest_labels(rows: pa.Table, label_set: str | None) -> OwnLabels:
    """The labels of single entries in a label set: the last row of each id wins."""
    if not rows.num_rows:
        return OwnLabels(np.empty(0, np.int64), pa.nulls(0, pa.string()))
    name = rows.column("label_set")
    rows = rows.filter(pc.is_null(name) if label_set is None else pc.equal(name, label_set))
    backwards = rows.column("id").to_numpy()[::-1]
    ids_N, first = np.unique(backwards, return_index=True)
    # Codes of labels, not texts, become one chunk: a `string` array ends at 2 GiB, and few labels are distinct.
    labels = rows.column("label").dictionary_encode().combine_chunks()
    return OwnLabels(ids_N, labels.take(pa.array(len(backwards) - 1 - first)).dictionary_decode())


def newest_rows(rows: pa.Table) -> pa.Table:
    """The last row of each id and label set, in the order of the rows."""
    numbered = rows.append_column("row", pa.array(np.arange(rows.num_rows)))
    last = numbered.group_by(["id", "label_set"]).aggregate([("row", "max")]).column("row_max")
    return rows.take(np.sort(last.to_numpy()))


def write_label_map(storage: Storage, lease: Lease, version: int, names: Mapping[str, str]) -> FileRef:
    """Publish the map of a label set: from stored labels to labels of the set."""
    table = pa.table([pa.array(names.keys()), pa.array(names.values())], schema=LABEL_MAP)
    return write_without_rows(storage, map_path(version, lease.nonce), table)


def read_label_map(storage: Storage, file: FileRef) -> dict[str, str]:
    """The label of a label set for each stored label. Raises DamagedFile."""
    table = read_table(storage, file)
    return dict(zip(table.column("label").to_pylist(), table.column("mapped").to_pylist(), strict=True))

"""Counts: the numbers of live entries by dataset and label, as files of changes that add up.

A commit that adds, forgets or relabels entries writes one small file. If the sums are small, it has them and replaces
the file before. Otherwise it has the changes, and from time to time the next file has the sums and replaces all earlier
ones.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.recent import Recent
from pipeline.store.layout import COUNTS_FOLDER, overlay_path
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.schemas import COUNTS, read_table, write_without_rows

ADDED_AT_ONCE = 256  # tables: the sums so far are added to once for so many
FOLD_EVERY = 16  # files; each is read by whoever asks for counts
FOLDED_BYTES = 16 << 10  # files of counts up to this size together are folded by every change
CACHED_BYTES = 64 << 20

_read = Recent[pa.Table](CACHED_BYTES)


def counted(datasets: pa.ChunkedArray | pa.Array, labels: pa.ChunkedArray | pa.Array, sign: int = 1) -> pa.Table:
    """Rows of counts for entries with these datasets and labels, multiplied by `sign`."""
    ones = pa.array(np.full(len(labels), sign, np.int64))
    return added([pa.table({"dataset": datasets.cast(pa.string()), "label": labels.cast(pa.string()), "count": ones})])


def added(tables: Iterable[pa.Table]) -> pa.Table:
    """The sums of some rows of counts, by dataset and label; sums of zero are left out. Holds ADDED_AT_ONCE tables."""
    rest, sums = iter(tables), list[pa.Table]()
    while some := list(itertools.islice(rest, ADDED_AT_ONCE)):
        sums = [_summed([*sums, *some])]
    return sums[0] if sums else COUNTS.empty_table()


def _summed(tables: Sequence[pa.Table]) -> pa.Table:
    rows = pa.concat_tables([table.select(COUNTS.names) for table in tables])
    summed = rows.group_by(["dataset", "label"]).aggregate([("count", "sum")])
    summed = summed.rename_columns([name.replace("count_sum", "count") for name in summed.column_names])
    summed = summed.select(COUNTS.names).filter(pc.not_equal(summed["count"], 0))
    return summed.sort_by([("dataset", "ascending"), ("label", "ascending")]).cast(COUNTS)


def write_counts(storage: Storage, lease: Lease, version: int, table: pa.Table) -> FileRef:
    """Publish rows of counts. This process need not read them again."""
    file = write_without_rows(storage, overlay_path(COUNTS_FOLDER, version, lease.nonce), table)
    _read.put(_key(storage, file), table, _size(table))
    return file


def read_counts(storage: Storage, files: Sequence[FileRef]) -> pa.Table:
    """The sums of the counts in some files. Reads each file once in a process. Raises DamagedFile."""
    return added(_file(storage, file) for file in files)


def _file(storage: Storage, file: FileRef) -> pa.Table:
    return _read.get_or_make(_key(storage, file), lambda: read_table(storage, file), _size)


def _key(storage: Storage, file: FileRef) -> tuple[str, str, str]:
    return storage.uri, file.path, file.sha256


def _size(table: pa.Table) -> int:
    return int(table.nbytes) + 1_024

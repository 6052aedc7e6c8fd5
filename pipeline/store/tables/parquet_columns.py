"""Reads single columns, rows or row groups of Parquet files of a memory, without the rest of the file.

Embeddings are nine tenths of an entries file.
"""

import bisect
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.store.storage.file_ranges import FileRanges
from pipeline.store.storage.file_refs import FileRef, RowsFile, check_path
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.parquet_ranges import bounds_of, footer_of, may_hold, open_parquet

READERS = 8  # files of an object store read in parallel: most of the time is waiting
WHOLE_BYTES = 1 << 20  # a file up to this size is faster in one request than its footer and columns in four
WHOLE_FOR_ROWS = 128 << 10  # the same for a few rows, of which a row group is fetched
FILES_AHEAD = 64  # files read ahead of the caller
SEARCHED_FROM = 32  # files: so many footers are read together in the time of a binary search, one after another
FILES_BESIDE = 2  # folders are ordered with their slash: "cat-big/" is before "cat/"
Overlay = TypeVar("Overlay", bound=FileRef)
Rows = TypeVar("Rows", bound=RowsFile)
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

READ_WHOLE = 65_536  # rows of an overlay file; a larger one is read by row group where few ids are asked for
MAX_ID = (1 << 63) - 1

_NONE = np.empty(0, np.int64)


def read_columns(storage: Storage, file: FileRef, columns: Sequence[str]) -> pa.Table:
    """Columns of a Parquet file. The checksum of every page is checked, but the whole file is not hashed.

    From an object store, the footer and these columns are fetched in a few requests. A file on this machine is read in
    place. Raises DamagedFile, or what the storage raises.
    """
    with _opened(storage, file) as parquet:
        return _validated(parquet.read(columns=list(columns)))


def read_rows(
    storage: Storage, file: FileRef, keys: Sequence[int | str] | np.ndarray, columns: Sequence[str], *, key: str = "id"
) -> pa.Table:
    """The rows with some ids, or with some values of another column `key`, in the order of the file.

    Only row groups that may hold one of them are read: from an object store the footer and the columns of these
    groups, each in one request. `columns` must include `key`. Raises DamagedFile.
    """
    wanted_N = np.unique(keys) if isinstance(keys, np.ndarray) else np.array(sorted({*keys}), object)
    with _opened(storage, file, WHOLE_FOR_ROWS) as parquet:
        groups = [g for g in range(parquet.num_row_groups) if may_hold(parquet, g, key, wanted_N)]
        table = _validated(parquet.read_row_groups(groups, columns=list(columns)))
    return table.filter(pc.is_in(table.column(key), pa.array(wanted_N, table.schema.field(key).type)))


def read_rows_of(
    storage: Storage,
    asked: Sequence[tuple[FileRef, Sequence[int | str] | np.ndarray, Sequence[str]]],
    *,
    key: str = "id",
) -> Iterator[pa.Table]:
    """`read_rows` of several files, each with its keys and columns, in order. Several are read at once from a bucket.

    Raises what `read_rows` raises.
    """
    return _at_once(storage, lambda one: read_rows(storage, *one, key=key), asked)


def ids_where(storage: Storage, file: RowsFile, column: str, value: str) -> np.ndarray:
    """The ids of the rows of a file with a value in a column, int64 [N] ascending. Raises DamagedFile.

    Reads the footer, and the column in the row groups that may hold the value. The ids are read with it only if some
    are missing between the first and the last.
    """
    names = [column] if file.has_every_id else ["id", column]
    with _opened(storage, file, WHOLE_FOR_ROWS) as parquet:
        stops = np.cumsum([parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]).tolist()
        groups = [g for g in range(parquet.num_row_groups) if may_hold(parquet, g, column, [value])]
        table = _validated(parquet.read_row_groups(groups, columns=names))
    rows_N = np.concatenate([_NONE, *(np.arange(stops[g - 1] if g else 0, stops[g]) for g in groups)])
    ids_N: np.ndarray = file.first_id + rows_N if file.has_every_id else table["id"].to_numpy()
    held_N: np.ndarray = ids_N[pc.fill_null(pc.equal(table[column], value), False).to_numpy()]
    return held_N


def files_around(storage: Storage, files: Sequence[Rows], column: str, value: str) -> Sequence[Rows]:
    """The adjacent files that hold a value if a column of texts ascends from file to file; any files if it does not.

    Reads the footers that a binary search asks for, and some beside what it finds; of few files it gives all.
    """
    if len(files) <= SEARCHED_FROM:
        return files

    def last(file: FileRef) -> str:
        with _opened(storage, file, WHOLE_FOR_ROWS) as parquet:
            return max((bounds[1] for bounds in bounds_of(parquet, column)), default="")

    def first(file: FileRef) -> str:
        with _opened(storage, file, WHOLE_FOR_ROWS) as parquet:
            return min((bounds[0] for bounds in bounds_of(parquet, column)), default="")

    start = bisect.bisect_left(files, value, key=last)
    stop = bisect.bisect_right(files, value, start, key=first)
    return files[max(start - FILES_BESIDE, 0) : stop + FILES_BESIDE]


def files_with(files: Iterable[Rows], ids: Sequence[int]) -> list[tuple[Rows, list[int]]]:
    """The files that may hold some ids, each with those of the ids, ascending."""
    wanted_N = np.unique(np.array(ids, np.int64))
    return [(file, wanted_N[here].tolist()) for file, here in FileRanges(files).holding(wanted_N)]


def read_id_range(storage: Storage, file: FileRef, first: int, last: int) -> np.ndarray:
    """The ids of a file within an inclusive range, in the order of the file, int64 [N]. Reads as `read_rows` does."""
    ids_N: np.ndarray = read_rows_between(storage, file, first, last, ["id"]).column("id").to_numpy()
    return ids_N


def read_rows_between(storage: Storage, file: FileRef, first: int, last: int, columns: Sequence[str]) -> pa.Table:
    """The rows with ids within an inclusive range, in the order of the file. Reads as `read_rows` does.

    `columns` must include `id`. Raises DamagedFile.
    """
    with _opened(storage, file, WHOLE_FOR_ROWS) as parquet:
        groups = [g for g in range(parquet.num_row_groups) if _overlaps(parquet, g, first, last)]
        table = _validated(parquet.read_row_groups(groups, columns=list(columns)))
    ids = table.column("id")
    return table.filter(pc.and_(pc.greater_equal(ids, first), pc.less_equal(ids, last)))


@contextlib.contextmanager
def _opened(storage: Storage, file: FileRef, whole_bytes: int | None = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file of a memory: on this machine in place, from an object store by ranges, or whole if it is small.

    It is small up to `whole_bytes` (None: WHOLE_BYTES).
    """
    source: Path | pa.NativeFile | None = None
    if "://" not in storage.uri:
        source = check_path(storage, file)
    elif file.num_bytes <= (WHOLE_BYTES if whole_bytes is None else whole_bytes):
        source = pa.BufferReader(storage.read(file.path))
    with open_parquet(storage, file, source) as parquet:
        yield parquet


def _validated(table: pa.Table) -> pa.Table:
    table.validate(full=True)  # finds strings that are not UTF-8, which Parquet's reader does not check
    return table


def _overlaps(parquet: pq.ParquetFile, group: int, first: int, last: int) -> bool:
    known = parquet.metadata.row_group(group).column(parquet.schema_arrow.get_field_index("id")).statistics
    return known is None or not known.has_min_max or (known.min <= last and known.max >= first)


def id_range(file: FileRef) -> tuple[int, int]:
    """The inclusive range of the ids in a file; all ids if it is not recorded, as by older releases."""
    return (file.first_id, file.last_id) if isinstance(file, RowsFile) else (0, MAX_ID)


def files_to_merge(files: Sequence[Overlay], added: int) -> list[Overlay]:
    """The last overlay files to write again with `added` rows: each has no more rows than those gathered before it.

    So there is one file for each doubling of the rows, and a row is written again once for each doubling.
    """
    merged: list[Overlay] = []
    for file in reversed(files):
        if file.rows > added:
            break
        merged.append(file)
        added += file.rows
    return merged[::-1]


def read_row_group(storage: Storage, file: FileRef, group: int, columns: Sequence[str] | None = None) -> pa.Table:
    """One row group of a Parquet file, or columns of it, with the checksum of every page checked.

    It takes one range for a whole row group, which lies in one piece, and one or two for the footer if this process has
    not read it lately. Raises DamagedFile, or what the storage raises.
    """
    with open_parquet(storage, file) as parquet:
        return _validated(parquet.read_row_group(group, columns=None if columns is None else [*columns]))


def read_row_groups(storage: Storage, file: FileRef, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of a Parquet file, one table for each row group, in order. Those of an object store are read in parallel.

    It holds FILES_AHEAD row groups at most, whatever the size of the file. Raises what `read_row_group` raises.
    """
    groups = range(footer_of(storage, file).num_row_groups)
    return _at_once(storage, lambda group: read_row_group(storage, file, group, columns), groups)


def read_columns_of(storage: Storage, files: Sequence[FileRef], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of many files, one table for each file, in order. Files of an object store are read in parallel."""
    return _at_once(storage, lambda file: read_columns(storage, file, columns), files)


def ids_where_of(storage: Storage, files: Sequence[RowsFile], column: str, value: str) -> Iterator[np.ndarray]:
    """`ids_where` of many files, in order. Files of an object store are read in parallel."""
    return _at_once(storage, lambda file: ids_where(storage, file, column, value), files)


def _at_once(storage: Storage, read: Callable[[Asked], Answer], asked: Sequence[Asked]) -> Iterator[Answer]:
    """What `read` gives for each of those asked, in order; READERS at once if it waits for an object store.

    It reads at most FILES_AHEAD ahead of the caller.
    """
    if "://" not in storage.uri or len(asked) < 2:
        yield from map(read, asked)
        return
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(asked), FILES_AHEAD):
            yield from pool.map(read, asked[start : start + FILES_AHEAD])

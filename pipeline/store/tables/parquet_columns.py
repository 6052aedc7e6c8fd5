"""Reads single columns, rows or row groups of Parquet files of a memory, without the rest of the file.

Embeddings are nine tenths of an entries file.
"""

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.store.storage.file_refs import FileRef, RowsFile, check_path, reading
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.parquet_ranges import footer_of, stream_of
from pipeline.store.tables.schemas import check_rows

READERS = 8  # files of an object store read in parallel: most of the time is waiting
WHOLE_BYTES = 1 << 20  # a file up to this size is faster in one request than its footer and columns in four
WHOLE_FOR_ROWS = 128 << 10  # the same for a few rows, of which a row group is fetched
FILES_AHEAD = 64  # files read ahead of the caller
Overlay = TypeVar("Overlay", bound=FileRef)

READ_WHOLE = 65_536  # rows of an overlay file; a larger one is read by row group where few ids are asked for
MAX_ID = (1 << 63) - 1


def read_columns(storage: Storage, file: FileRef, columns: Sequence[str]) -> pa.Table:
    """Columns of a Parquet file. The checksum of every page is checked, but the whole file is not hashed.

    From an object store, the footer and these columns are fetched in a few requests. A file on this machine is read in
    place. Raises DamagedFile, or what the storage raises.
    """
    with _opened(storage, file) as parquet:
        return _validated(parquet.read(columns=list(columns)))


def read_rows(
    storage: Storage, file: FileRef, ids: Sequence[int] | np.ndarray, columns: Sequence[str], *, key: str = "id"
) -> pa.Table:
    """The rows of some ids, in the order of the file; ids that the file does not have are left out.

    Only row groups that may hold one of the ids are read: from an object store the footer and the columns of these
    groups, each in one request. `columns` must include the column `key`, which `ids` are compared with. Raises
    DamagedFile.
    """
    wanted_N = np.unique(np.asarray(ids) if len(ids) else np.empty(0, np.int64))
    with _opened(storage, file, WHOLE_FOR_ROWS) as parquet:
        groups = [g for g in range(parquet.num_row_groups) if _may_hold(parquet, g, key, wanted_N)]
        table = _validated(parquet.read_row_groups(groups, columns=list(columns)))
    return table.filter(pc.is_in(table.column(key), pa.array(wanted_N, table.schema.field(key).type)))


def read_rows_of(storage: Storage, asked: Sequence[tuple[FileRef, Sequence[int], Sequence[str]]]) -> list[pa.Table]:
    """`read_rows` of several files, each with its ids and columns, in order. Those of an object store are read at once.

    Raises what `read_rows` raises.
    """
    if "://" not in storage.uri or len(asked) < 2:
        return [read_rows(storage, *one) for one in asked]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda one: read_rows(storage, *one), asked))


def files_with(files: Sequence[RowsFile], ids: Sequence[int]) -> list[tuple[RowsFile, list[int]]]:
    """The files that may hold some ids, each with those of the ids, ascending."""
    wanted = sorted(ids)
    held = []
    for file in files:
        start, stop = bisect.bisect_left(wanted, file.first_id), bisect.bisect_right(wanted, file.last_id)
        if start < stop:
            held.append((file, wanted[start:stop]))
    return held


def read_id_range(storage: Storage, file: FileRef, first: int, last: int) -> np.ndarray:
    """The ids of a file within an inclusive range, in the order of the file, int64 [N]. Reads as `read_rows` does."""
    with _opened(storage, file, WHOLE_FOR_ROWS) as parquet:
        groups = [g for g in range(parquet.num_row_groups) if _overlaps(parquet, g, first, last)]
        ids_N: np.ndarray = _validated(parquet.read_row_groups(groups, columns=["id"])).column("id").to_numpy()
    held: np.ndarray = ids_N[(ids_N >= first) & (ids_N <= last)]
    return held


@contextlib.contextmanager
def _opened(storage: Storage, file: FileRef, whole_bytes: int | None = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file of a memory: on this machine in place, from an object store by ranges, or whole if it is small.

    It is small up to `whole_bytes` (None: WHOLE_BYTES).
    """
    if "://" not in storage.uri:
        opened = _parquet(storage, file, check_path(storage, file), None)
    elif file.num_bytes <= (WHOLE_BYTES if whole_bytes is None else whole_bytes):
        opened = _parquet(storage, file, pa.BufferReader(storage.read(file.path)), None)
    else:
        opened = _parquet(storage, file, stream_of(storage, file), footer_of(storage, file))
    with opened as parquet:
        yield parquet


@contextlib.contextmanager
def _parquet(
    storage: Storage, file: FileRef, source: Path | pa.NativeFile, footer: pq.FileMetaData | None
) -> Iterator[pq.ParquetFile]:
    """A Parquet file of a memory. Errors over its contents, while it is open, become DamagedFile."""
    options = {"metadata": footer, "page_checksum_verification": True, "pre_buffer": not isinstance(source, Path)}
    with reading(storage.uri, file.path), pq.ParquetFile(source, **options) as parquet:
        check_rows(parquet, file)
        yield parquet


def _validated(table: pa.Table) -> pa.Table:
    table.validate(full=True)  # finds strings that are not UTF-8, which Parquet's reader does not check
    return table


def _may_hold(parquet: pq.ParquetFile, group: int, key: str, wanted_N: np.ndarray) -> bool:
    """Whether a row group may hold one of the values of `key` (ascending), by its statistics."""
    first, last = _range_of(parquet, group, key)
    at = np.searchsorted(wanted_N, first)
    return bool(at < len(wanted_N) and wanted_N[at] <= last)


def _overlaps(parquet: pq.ParquetFile, group: int, first: int, last: int) -> bool:
    begin, end = _range_of(parquet, group, "id")
    return begin <= last and end >= first


def _range_of(parquet: pq.ParquetFile, group: int, key: str) -> tuple[int, int]:
    """The lowest and the highest value of a column of a row group; all ids if it has no statistics."""
    of_key = parquet.metadata.row_group(group).column(parquet.schema_arrow.get_field_index(key)).statistics
    return (of_key.min, of_key.max) if of_key is not None and of_key.has_min_max else (0, MAX_ID)


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
    with _parquet(storage, file, stream_of(storage, file), footer_of(storage, file)) as parquet:
        return _validated(parquet.read_row_group(group, columns=None if columns is None else [*columns]))


def read_row_groups(storage: Storage, file: FileRef, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of a Parquet file, one table for each row group, in order. Those of an object store are read in parallel.

    It holds FILES_AHEAD row groups at most, whatever the size of the file. Raises what `read_row_group` raises.
    """
    groups = footer_of(storage, file).num_row_groups
    if "://" not in storage.uri:
        yield from (read_row_group(storage, file, group, columns) for group in range(groups))
        return
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, groups, FILES_AHEAD):
            some = range(start, min(start + FILES_AHEAD, groups))
            yield from pool.map(lambda group: read_row_group(storage, file, group, columns), some)


def read_columns_of(storage: Storage, files: Sequence[FileRef], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of many files, one table for each file, in order. Files of an object store are read in parallel."""
    if "://" not in storage.uri:
        yield from (read_columns(storage, file, columns) for file in files)
        return
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(files), FILES_AHEAD):
            some = files[start : start + FILES_AHEAD]
            yield from pool.map(lambda file: read_columns(storage, file, columns), some)

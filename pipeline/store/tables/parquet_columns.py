"""Reads single columns or row groups of Parquet files of a memory, without the rest of the file.

Embeddings are nine tenths of an entries file.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.parquet_ranges import footer_of, stream_of
from pipeline.store.tables.schemas import read_parquet, read_table

READERS = 8  # files of an object store read in parallel: most of the time is waiting
WHOLE_BYTES = 1 << 20  # a file up to this size is faster in one request than its footer and columns in four
FILES_AHEAD = 64  # files read ahead of the caller


def read_columns(storage: Storage, file: FileRef, columns: Sequence[str]) -> pa.Table:
    """Columns of a Parquet file. The checksum of every page is checked, but the whole file is not hashed.

    From an object store, the footer and these columns are fetched in a few requests. A file on this machine is read in
    place. Raises DamagedFile, or what the storage raises.
    """
    if "://" not in storage.uri:
        return read_table(storage, file, columns, hashed=False)
    if file.num_bytes <= WHOLE_BYTES:
        return read_parquet(pa.BufferReader(storage.read(file.path)), storage, file, columns)
    return read_parquet(stream_of(storage, file), storage, file, columns, footer=footer_of(storage, file))


def read_row_group(storage: Storage, file: FileRef, group: int, columns: Sequence[str] | None = None) -> pa.Table:
    """One row group of a Parquet file, or columns of it, with the checksum of every page checked.

    It takes one range for a whole row group, which lies in one piece, and one or two for the footer if this process has
    not read it lately. Raises DamagedFile, or what the storage raises.
    """
    return read_parquet(stream_of(storage, file), storage, file, columns, group, footer_of(storage, file))


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

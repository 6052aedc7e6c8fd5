"""Reads single columns of Parquet files of a memory. Embeddings are nine tenths of an entries file."""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage
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
    is_small = file.num_bytes <= WHOLE_BYTES
    stream = pa.BufferReader(storage.read(file.path)) if is_small else stream_of(storage, file)
    return read_parquet(stream, storage, file, list(columns))


def read_columns_of(storage: Storage, files: Sequence[FileRef], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of many files, one table for each file, in order. Files of an object store are read in parallel."""
    if "://" not in storage.uri:
        yield from (read_columns(storage, file, columns) for file in files)
        return
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(files), FILES_AHEAD):
            some = files[start : start + FILES_AHEAD]
            yield from pool.map(lambda file: read_columns(storage, file, columns), some)


def stream_of(storage: Storage, file: FileRef) -> pa.NativeFile:
    """A stream for Arrow over a file of a storage; each read is a range request."""
    return pa.PythonFile(_Ranges(storage, file), mode="r")


class _Ranges(io.RawIOBase):
    """A file object for Arrow over a file of a storage; each read is a range request."""

    def __init__(self, storage: Storage, file: FileRef) -> None:
        self._storage = storage
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.num_bytes}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._file.num_bytes
        stop = end if size is None or size < 0 else min(self._at + size, end)
        data = self._storage.read_range(self._file.path, self._at, stop) if stop > self._at else b""
        self._at += len(data)
        return data

"""Opens Parquet files of a memory: on this machine in place, from an object store by ranges.

Of a file in an object store, the footer is fetched once in a process, then only the bytes asked for.
"""

import bisect
import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.recent import Recent
from pipeline.store.storage.file_refs import FileRef, reading
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.schemas import check_rows

# Bytes fetched for a footer at first: an entries file has one of 4 KB. A plan has 620 bytes for each part, 38 MB for a
# billion images, which take a second request.
FOOTER_BYTES = 8 << 10
KEPT_BYTES = 64 << 20  # of footers in RAM: those of 2,000 entries files, or the last one if it is larger
BYTES_IN_RAM = 8  # for each byte of a footer (measured with the footer of a plan of 20,000 parts)

_MAGIC_AND_LENGTH = 8

_footers = Recent[pq.FileMetaData](KEPT_BYTES)


def footer_of(storage: Storage, file: FileRef) -> pq.FileMetaData:
    """The footer of a file, fetched in one request (two if it is larger than FOOTER_BYTES), and then kept for a while.

    Raises DamagedFile, or what the storage raises.
    """
    return _footers.get_or_make(
        (storage.uri, file.path, file.sha256),
        lambda: _fetch_footer(storage, file),
        lambda footer: footer.serialized_size * BYTES_IN_RAM,
    )


def stream_of(storage: Storage, file: FileRef) -> pa.NativeFile:
    """A stream for Arrow over a file of a storage; each read is a range request."""
    return pa.PythonFile(_Ranges(storage, file), mode="r")


@contextlib.contextmanager
def open_parquet(
    storage: Storage, file: FileRef, source: Path | pa.NativeFile | None = None
) -> Iterator[pq.ParquetFile]:
    """A Parquet file of a memory, from a local path or bytes, or by ranges if `source` is None.

    The checksum of every page is checked. Errors over its contents, while it is open, become DamagedFile.
    """
    footer = footer_of(storage, file) if source is None else None
    source = stream_of(storage, file) if source is None else source
    options = {"metadata": footer, "page_checksum_verification": True, "pre_buffer": not isinstance(source, Path)}
    with reading(storage.uri, file.path), pq.ParquetFile(source, **options) as parquet:
        check_rows(parquet, file)
        yield parquet


def may_hold(parquet: pq.ParquetFile, group: int, column: str, values: Sequence[Any] | np.ndarray) -> bool:
    """Whether a column of a row group may hold one of the values (ascending), by its statistics."""
    place = parquet.schema_arrow.get_field_index(column)  # the columns before `embedding` have one leaf each
    known = parquet.metadata.row_group(group).column(place).statistics
    if known is None or not known.has_min_max:
        return True
    at = bisect.bisect_left(values, known.min)
    return at < len(values) and bool(values[at] <= known.max)


def bounds_of(parquet: pq.ParquetFile, column: str) -> list[tuple[Any, Any]]:
    """The least and the greatest value of a column in each row group that says so in its statistics."""
    place = parquet.schema_arrow.get_field_index(column)
    known = [parquet.metadata.row_group(group).column(place).statistics for group in range(parquet.num_row_groups)]
    return [(found.min, found.max) for found in known if found is not None and found.has_min_max]


def _fetch_footer(storage: Storage, file: FileRef) -> pq.FileMetaData:
    start = max(file.num_bytes - FOOTER_BYTES, 0)
    tail = storage.read_range(file.path, start, file.num_bytes)
    with reading(storage.uri, file.path):
        if len(tail) != file.num_bytes - start:
            raise ValueError(f"it is shorter than the {file.num_bytes:,} bytes that were written")
        needed = int.from_bytes(tail[-_MAGIC_AND_LENGTH:-4], "little") + _MAGIC_AND_LENGTH
        if len(tail) < needed <= file.num_bytes:
            tail = storage.read_range(file.path, file.num_bytes - needed, start) + tail
        return pq.read_metadata(pa.BufferReader(tail))


class _Ranges(io.RawIOBase):
    """A file object over a file of a storage; each read is a range request."""

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

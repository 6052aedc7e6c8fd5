"""Reads Parquet files of an object store by ranges: the footer once in a process, then only the bytes asked for."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.recent import Recent
from pipeline.store.storage.file_refs import FileRef, reading
from pipeline.store.storage.interface import Storage

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

"""Vectors given in place of images: rows of a .npy file, or of an embedding column in Parquet.

The rows of a Parquet file beside a .npy may describe the rows of the .npy. Both files are read through a seekable
stream, a few rows at a time, wherever they lie. A .npy is not memory-mapped, because a mapped file that is cut short
ends the process. An error of the stream itself passes through to the caller unchanged.

Shapes: N rows, B rows of a batch, D dimensions.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.images.containers.items import Item
from pipeline.images.containers.npy import NoVectors, read_header
from pipeline.images.containers.parquet import FileLabel, group_rows, kept_values, open_parquet
from pipeline.images.containers.vector_columns import (
    Columns,
    Maker,
    columns_of,
    columns_of_none,
    embedding_field,
    maker_of,
    matrix_of,
    texts_of_rows,
)
from pipeline.images.decoding.decode import Rejected
from pipeline.images.reading.parquet_pages import PageBomb, Source, batches_of
from pipeline.store.tables.kept_columns import KeptColumn

BATCH_ROWS = 2_048
READ_BYTES = 64 << 20  # of a .npy in one request

# Rounding to float16 may change the length of a unit vector by this much: such a vector stays unchanged to the bit.
UNIT_ROUNDING = 1e-3


@dataclass(frozen=True)
class Vectors:
    """The head of a file: rows in each row group (a .npy is one group), and D (None if no row has a vector)."""

    uri: str
    rows: tuple[int, ...]
    dimension: int | None
    maker: Maker
    schema: pa.Schema | None = field(default=None, compare=False)
    label: FileLabel | None = field(default=None, compare=False)


@dataclass(frozen=True)
class RowFacts:
    """The hash of an entry's image (of its vector if the image's is unknown), and its size in pixels (0: unknown)."""

    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class VectorBatch:
    """Consecutive rows: vectors of unit length, float32 [B, D], and per row its `RowFacts` or why it was rejected.

    The vector of a rejected row has no meaning.
    """

    vectors_BD: np.ndarray
    items: list[Item]
    facts: list[RowFacts | Rejected]


# What a file holds


def inspect_npy(stream: BinaryIO, uri: str, beside: BinaryIO | None, beside_uri: str, labels: str) -> Vectors:
    """The contents of a .npy, described by the Parquet file beside it. Raises SourceError, and what the streams raise.

    Raises NoVectors for an array that is not two-dimensional or not of floats, if no file lies beside it.
    """
    try:
        header = read_header(stream, uri)
    except NoVectors as error:
        if beside is not None:
            raise SourceError(str(error)) from error
        raise
    if beside is None:
        label = columns_of_none(uri, labels).label
        return Vectors(uri, (header.rows,), header.dimension, Maker(uri), None, label)
    file = open_parquet(Source(beside), beside_uri)
    label = columns_of(file.schema_arrow, beside_uri, labels).label
    if (rows := sum(group_rows(file))) != header.rows:
        raise SourceError(
            f"{uri} has {header.rows:,} rows and {beside_uri} has {rows:,}: both must have the same rows in the same "
            "order"
        )
    return Vectors(uri, (header.rows,), header.dimension, maker_of(file, beside_uri), file.schema_arrow, label)


def inspect_column(stream: BinaryIO, uri: str, labels: str) -> Vectors:
    """The contents of the embedding column of a Parquet file. Raises SourceError, NoVectors if there is no such column.

    If the footer does not have the dimension, rows are read up to the first one with a vector.
    """
    source = Source(stream)
    file = open_parquet(source, uri)
    field = embedding_field(file.schema_arrow, uri)
    label = columns_of(file.schema_arrow, uri, labels).label
    if pa.types.is_fixed_size_list(field.type):
        dimension: int | None = field.type.list_size
    else:
        with _damage_named(source, uri):
            dimension = next(
                (
                    int(length)
                    for batch in batches_of(file, source, 64, range(len(group_rows(file))), [field.name])
                    for length in pc.list_value_length(batch.column(0)).drop_null().to_pylist()
                    if length
                ),
                None,
            )
    return Vectors(uri, group_rows(file), dimension, maker_of(file, uri), file.schema_arrow, label)


# The rows of a file


def read_npy(
    stream: BinaryIO,
    uri: str,
    beside: tuple[BinaryIO | None, str],
    labels: str,
    dimension: int,
    rows: range,
    kept: Sequence[KeptColumn] = (),
) -> Iterator[VectorBatch]:
    """Some rows of a .npy. A row without a uri in the file `beside` (stream and uri) gets `FILE#row=N`.

    Raises SourceError if the file has changed since it was planned, and what the streams raise.
    """
    stream_beside, beside_uri = beside
    header = read_header(stream, uri)
    if header.dimension != dimension or header.rows < rows.stop:
        raise SourceError(f"{uri} has changed since it was listed: add it again")
    said, columns = _said(stream_beside, beside_uri or uri, labels, rows.start, len(rows), header.rows, kept)
    width = header.dimension * header.dtype.itemsize
    at_once = max(1, READ_BYTES // width)
    for start in range(0, len(rows), at_once):
        number = min(at_once, len(rows) - start)
        stream.seek(header.offset + (rows.start + start) * width)
        data = stream.read(number * width)
        if len(data) < number * width:
            raise SourceError(f"{uri} is cut short: write or copy it again")
        given_ND = np.frombuffer(data, header.dtype).reshape(number, dimension)
        for row in range(0, number, BATCH_ROWS):
            given_BD = given_ND[row : row + BATCH_ROWS]
            table = said.slice(start + row, len(given_BD)) if said is not None else None
            yield _batch(given_BD, [None] * len(given_BD), table, columns, uri, rows.start + start + row, kept)


def read_column(
    stream: BinaryIO,
    uri: str,
    labels: str,
    dimension: int,
    first: int,
    num_rows: int,
    kept: Sequence[KeptColumn] = (),
) -> Iterator[VectorBatch]:
    """Some rows of a column of vectors, from row `first` on, each with the values of the other columns.

    A vector of another length than `dimension` is rejected. Raises SourceError, and what `stream` raises.
    """
    source = Source(stream)
    file = open_parquet(source, uri)
    field = embedding_field(file.schema_arrow, uri)
    columns = columns_of(file.schema_arrow, uri, labels, kept)
    wanted = [field.name, *(name for name in columns.names if name != field.name)]
    row = first
    for batch in _rows(file, source, uri, wanted, first, num_rows):
        given_BD, reasons = matrix_of(batch.column(batch.schema.get_field_index(field.name)), dimension)
        yield _batch(given_BD, reasons, pa.Table.from_batches([batch]), columns, uri, row, kept)
        row += batch.num_rows


def rejected_rows(reject: Rejected, uris: list[str], dimension: int) -> VectorBatch:
    """Rows that could not be read at all."""
    nothing_BD = np.zeros((len(uris), dimension), np.float32)
    return VectorBatch(nothing_BD, [Item(uri, None) for uri in uris], [reject] * len(uris))


def _said(
    beside: BinaryIO | None,
    uri: str,
    labels: str,
    first: int,
    num_rows: int,
    rows: int,
    kept: Sequence[KeptColumn],
) -> tuple[pa.Table | None, Columns]:
    """The descriptions of some rows of a .npy, from the Parquet file beside it. Both files must have `rows` rows."""
    if beside is None:
        return None, columns_of_none(uri, labels)
    source = Source(beside)
    file = open_parquet(source, uri)
    columns = columns_of(file.schema_arrow, uri, labels, kept)
    if sum(group_rows(file)) != rows:
        raise SourceError(f"{uri} has changed since it was listed: add it again")
    if not columns.names:
        return None, columns
    batches = list(_rows(file, source, uri, columns.names, first, num_rows))
    return pa.Table.from_batches(batches).combine_chunks(), columns


def _rows(
    file: pq.ParquetFile, source: Source, uri: str, columns: list[str], first: int, num_rows: int
) -> Iterator[pa.RecordBatch]:
    """Some rows of a Parquet file. The read begins with the row group of the first row."""
    counts = group_rows(file)
    ends = np.cumsum(counts)
    last = first + num_rows
    if last > sum(counts):
        raise SourceError(f"{uri} has changed since it was listed: add it again")
    groups = [group for group, end in enumerate(ends) if end > first and end - counts[group] < last]
    row = int(ends[groups[0]]) - counts[groups[0]] if groups else last
    with _damage_named(source, uri):
        for batch in batches_of(file, source, BATCH_ROWS, groups, columns):
            wanted = batch.slice(max(first - row, 0), max(last - max(first, row), 0))
            row += batch.num_rows
            if wanted.num_rows:
                yield wanted
            if row >= last:
                return
    if row < last:
        raise SourceError(f"{uri} is cut short: write or copy it again")


def _batch(
    given_BD: np.ndarray,
    reasons: list[str | None],
    said: pa.Table | None,
    columns: Columns,
    uri: str,
    first: int,
    kept: Sequence[KeptColumn],
) -> VectorBatch:
    rows = len(given_BD)
    vectors_BD, bad = unit(given_BD)
    reasons = [one or other for one, other in zip(reasons, bad, strict=True)]
    said = said.combine_chunks().to_batches()[0] if said is not None and rows else None
    beside = pa.record_batch([pa.nulls(rows)], names=[""]) if said is None else said
    values = kept_values(beside, kept, beside.schema, uri)
    uris, labels, hashes, widths, heights = texts_of_rows(said, columns, rows)
    own = [found or f"{uri}#row={first + row}" for row, found in enumerate(uris)]
    halves_BD = vectors_BD.astype("<f2")
    facts: list[RowFacts | Rejected] = []
    for row, (reason, digest, width, height) in enumerate(zip(reasons, hashes, widths, heights, strict=True)):
        if reason is not None:
            facts.append(Rejected("read", reason))
        else:
            facts.append(RowFacts(digest or hashlib.sha256(halves_BD[row].tobytes()).hexdigest(), width, height))
    items = [
        Item(name, label, None, row, reason) for name, (label, reason), row in zip(own, labels, values, strict=True)
    ]
    return VectorBatch(vectors_BD, items, facts)


def unit(given_BD: np.ndarray) -> tuple[np.ndarray, list[str | None]]:
    """Floats [B, D] scaled to unit length (float32 [B, D]), and per row why that is impossible, or None.

    float16 vectors of unit length, up to rounding, stay unchanged to the last bit.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        wide_BD = given_BD.astype(np.float64)
        norms_B = np.sqrt(np.einsum("bd,bd->b", wide_BD, wide_BD))
    finite_B = np.isfinite(wide_BD).all(axis=1)
    good_B = finite_B & (norms_B > 0) & np.isfinite(norms_B)
    scales_B = np.where(good_B, norms_B, 1.0)
    if given_BD.dtype.itemsize == 2:
        scales_B[np.abs(norms_B - 1) <= UNIT_ROUNDING] = 1.0
    vectors_BD = np.where(good_B[:, None], wide_BD, 0.0) / scales_B[:, None]
    reasons = [None if good else _why(finite=bool(finite_B[row])) for row, good in enumerate(good_B)]
    return vectors_BD.astype(np.float32), reasons


def _why(*, finite: bool) -> str:
    return "the vector is all zeros, or too short to have a direction" if finite else "the vector is not finite"


@contextlib.contextmanager
def _damage_named(source: Source, uri: str) -> Iterator[None]:
    """Turn an error of damaged data into a SourceError; raise an error of the stream unchanged."""
    try:
        yield
    except MemoryError:  # pyarrow's is an ArrowException too, but means no damage of the file
        raise
    except PageBomb as error:
        raise SourceError(f"{uri} is not read: {error}") from None
    except (pa.ArrowException, OSError) as error:
        if source.lost is not None:
            raise source.lost from None
        raise SourceError(f"{uri} is damaged: {' '.join(str(error).split()).rstrip('.')}") from error

"""The columns of a Parquet file that hold vectors, or that describe the rows of a .npy beside it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.images.containers.npy import NoVectors
from pipeline.images.containers.parquet import FileLabel, describe_columns, file_label, is_text, texts_in
from pipeline.images.labels.labels import partition_label
from pipeline.images.names.uris import uri_of
from pipeline.store.tables.kept_columns import KeptColumn
from pipeline.store.tables.schemas import ENCODER_KEY, FINGERPRINT_KEY

EMBEDDING_COLUMNS = ("embedding", "embeddings", "image_embedding", "img_emb", "vector", "emb", "clip_embedding")
URI_COLUMNS = ("uri", "url", "image_path", "path", "image_url", "key", "filename")  # the first one wins

_HEX64 = re.compile("[0-9a-fA-F]{64}")
_MAX_PIXELS = (1 << 31) - 1


@dataclass(frozen=True)
class Maker:
    """The encoder that made the vectors of the file at `uri`, as the file names it; None if it does not."""

    uri: str
    encoder: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns of a Parquet file that describe a row; None for those it does not have."""

    uri: str | None = None
    label: FileLabel = FileLabel(reason="nothing beside the vectors names a label")
    sha256: str | None = None
    width: str | None = None
    height: str | None = None
    kept: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        every = (self.uri, self.label.column, self.sha256, self.width, self.height, *self.kept)
        return [name for name in dict.fromkeys(every) if name is not None]


def matrix_of(column: pa.Array, dimension: int) -> tuple[np.ndarray, list[str | None]]:
    """A list column as floats [B, D], and per row why it has no vector of D dimensions (None if it has one)."""
    lengths = pc.list_value_length(column).to_pylist()
    reasons = [_misfit(length, dimension) for length in lengths]
    fits = np.array([reason is None for reason in reasons], bool)
    values = column.filter(pa.array(fits)).flatten()
    if values.null_count:
        values = values.cast(pa.float32()) if pa.types.is_float16(values.type) else values
    found = np.asarray(values.to_numpy(zero_copy_only=False)).reshape(-1, dimension)
    if fits.all():
        return found, reasons
    given_BD = np.zeros((len(fits), dimension), found.dtype)
    given_BD[fits] = found
    return given_BD, reasons


def _misfit(length: int | None, dimension: int) -> str | None:
    if length is None:
        return "there is no vector in the row"
    return None if length == dimension else f"the vector has {length:,} dimensions where {dimension:,} are expected"


def texts_of_rows(
    said: pa.RecordBatch | None, columns: Columns, rows: int
) -> tuple[list[str | None], list[tuple[str | None, str]], list[str | None], list[int], list[int]]:
    """Per row: uri, label with the reason if it is None, sha256, width, height. Missing values are None, sizes 0."""
    if said is None:
        labels = [(columns.label.value, columns.label.reason)] * rows
        return [None] * rows, labels, [None] * rows, [0] * rows, [0] * rows
    uris = texts_in(said, columns.uri)
    if columns.uri != "uri":  # a column named uri has uris already
        uris = [uri_of(uri) if uri and uri.startswith(("/", "file://")) else uri for uri in uris]
    hashes = [text.lower() if text and _HEX64.fullmatch(text) else None for text in texts_in(said, columns.sha256)]
    return (
        uris,
        columns.label.labels_in(said),
        hashes,
        _pixels_in(said, columns.width),
        _pixels_in(said, columns.height),
    )


def _pixels_in(said: pa.RecordBatch, name: str | None) -> list[int]:
    """Widths or heights, 0 for invalid ones. pandas writes them as floats as soon as one is missing."""
    if name is None:
        return [0] * said.num_rows
    values = said.column(said.schema.get_field_index(name)).to_pylist()
    return [int(v) if v is not None and math.isfinite(v) and 0 < v <= _MAX_PIXELS else 0 for v in values]


def columns_of_none(uri: str, labels: str) -> Columns:
    """The columns of a .npy with no table beside it: its folders may give a label, as Hive writes partitions."""
    found = partition_label(uri, labels)
    return Columns() if found is None else Columns(label=FileLabel(value=found[1]))


def columns_of(schema: pa.Schema, uri: str, labels: str, kept: Sequence[KeptColumn] = ()) -> Columns:
    """The columns of a file, with the labels that `labels` asks for. Raises SourceError if it has no such column."""

    def first(names: tuple[str, ...], *, numbers: bool = False) -> str | None:
        single = (name for name in names if schema.names.count(name) == 1)
        return next((name for name in single if _fits(schema.field(name).type, numbers=numbers)), None)

    return Columns(
        uri=first(URI_COLUMNS),
        label=file_label(schema, uri, labels, ""),
        sha256=first(("sha256",)),
        width=first(("width",), numbers=True),
        height=first(("height",), numbers=True),
        kept=tuple(column.name for column in kept if schema.names.count(column.name) == 1),
    )


def _fits(kind: pa.DataType, *, numbers: bool) -> bool:
    if numbers:
        return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
    return is_text(kind.value_type if pa.types.is_dictionary(kind) else kind)


def embedding_field(schema: pa.Schema, uri: str) -> pa.Field:
    """The one column of embeddings. Raises NoVectors if there is none, SourceError for several."""
    found = [field for field in schema if field.name in EMBEDDING_COLUMNS and _is_vector(field.type)]
    if not found:
        raise NoVectors(
            f"{uri} has no column of image bytes and none of embeddings, only {describe_columns(schema)}: name it "
            "image or embedding"
        )
    if len(found) > 1:
        raise SourceError(
            f"{uri} has several columns of embeddings, {describe_columns(found)}: leave only the one to be added, or "
            "name the others differently"
        )
    return found[0]


def _is_vector(kind: pa.DataType) -> bool:
    types = pa.types
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(lists and types.is_floating(kind.value_type))


def maker_of(file: pq.ParquetFile, uri: str) -> Maker:
    """The maker of the vectors, from the metadata that exports of a memory have."""
    said = file.schema_arrow.metadata or {}
    encoder, fingerprint = (
        said.get(key.encode(), b"").decode(errors="replace") for key in (ENCODER_KEY, FINGERPRINT_KEY)
    )
    return Maker(uri, encoder or None, fingerprint or None)

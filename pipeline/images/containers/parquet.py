"""Parquet files with the bytes of images in a column, read a few rows at a time.

An error of the stream itself, such as a lost connection, passes through to the caller unchanged. pyarrow turns it into
an OSError like that of a damaged page, so the wrapper `Source` stores it.
"""

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.images.containers.items import Item
from pipeline.images.decoding.decode import MAX_FILE_BYTES, Rejected
from pipeline.images.labels.label_rows import LABEL_COLUMNS
from pipeline.images.labels.label_text import text_of, why_no_label
from pipeline.images.labels.labels import column_of, partition_label
from pipeline.images.names.partitions import partition_columns
from pipeline.images.reading.parquet_pages import PageBomb, Source, batches_of
from pipeline.store.tables.kept_columns import KeptColumn, as_type, type_of, value_of, values_of

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content", "data")  # the first one wins
MAX_GROUP_ROWS = 1 << 20  # rows of a part, 20 bits of an id: a row group is never divided
BATCH_ROWS = 64
BATCH_BYTES = 32 << 20  # of images in one batch, estimated by their mean size
HARMLESS_ROWS = 1 << 20  # allowed for a file of any size: each may become a rejected row
BUFFER_BYTES = 1 << 20  # without a buffer pyarrow reads the whole column of a row group at once


class NoImages(SourceError):
    """A file has no column of image bytes, or is not Parquet. Internal: callers decide what to do."""


@dataclass(frozen=True)
class FileLabel:
    """How a file gives the labels of its rows: in a `column`, or as a `value` from its folders for all rows.

    `names` are the class names for the integers of a Hugging Face ClassLabel. `reason` says why there is no label.
    """

    column: str | None = None
    names: tuple[str, ...] | None = None
    value: str | None = None
    reason: str = field(default="", compare=False)

    def labels_in(self, batch: pa.RecordBatch) -> list[tuple[str | None, str]]:
        """The label of each row of a batch, and the reason if it is None."""
        if self.column is None:
            return [(self.value, self.reason)] * batch.num_rows
        values = _named(_decoded(batch.column(batch.schema.get_field_index(self.column))), self.names)
        where = f"the column {self.column}"
        return [(text, "" if text else why_no_label(value, where)) for value in values for text in [text_of(value)]]


@dataclass(frozen=True)
class ImageColumns:
    """The columns of a file with images and labels: `image` is binary, or (`in_struct`) a struct {bytes, path}."""

    image: str
    in_struct: bool
    label: FileLabel = FileLabel()


@dataclass(frozen=True)
class Layout:
    """The footer of a file: its columns, and the number of rows in each row group.

    `labels` is the option that it was read with.
    """

    uri: str
    columns: ImageColumns
    rows: tuple[int, ...]
    schema: pa.Schema | None = field(default=None, compare=False)
    labels: str = field(default="folder", compare=False)


def inspect(stream: BinaryIO, uri: str, labels: str) -> Layout:
    """The layout of a Parquet file, from its footer alone; `stream` must be seekable.

    `labels` is "none", "column:NAME", "folder" or "parent". The last two take a column with a usual name for labels, or
    a folder that gives such a column as Hive does. Raises SourceError for a file that is not Parquet, has no image
    column or several, or has no column NAME; and what the stream raises.
    """
    file = open_parquet(Source(stream), uri)
    return Layout(uri, _columns(file.schema_arrow, uri, labels), group_rows(file), file.schema_arrow, labels)


def slices(layout: Layout, rows: int) -> list[tuple[int, int]]:
    """Runs of whole row groups as (first_group, num_groups), each of at most `rows` rows or of a single row group.

    Raises SourceError for a row group of more than `MAX_GROUP_ROWS`.
    """
    runs: list[tuple[int, int]] = []
    taken = 0
    for group, num_rows in enumerate(layout.rows):
        if num_rows > MAX_GROUP_ROWS:
            raise SourceError(
                f"{layout.uri} has a row group of {num_rows:,} rows, more than {MAX_GROUP_ROWS:,}: write it with "
                "smaller row groups"
            )
        if runs and taken + num_rows <= rows:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            taken += num_rows
        else:
            runs.append((group, 1))
            taken = num_rows
    return runs


def read_parquet(
    stream: BinaryIO, uri: str, layout: Layout, first_group: int, num_groups: int, kept: Sequence[KeptColumn] = ()
) -> Iterator[Item]:
    """The images of some row groups, one `Item` for each row the footer counts, in order; `stream` must be seekable.

    An image's uri ends in its row's number in the whole file, from 0. If a row group is damaged, its rows from the
    damage on are rejected. Memory holds one page and `BATCH_ROWS` images of at most `BATCH_BYTES`. The value of a kept
    column is None if the file does not have the column, or the value is not of its type. Raises SourceError if the
    file is not the one that `layout` describes, and what the stream raises.
    """
    source = Source(stream)
    file = open_parquet(source, uri)
    columns = _columns(file.schema_arrow, uri, layout.labels)
    if (columns, group_rows(file)) != (layout.columns, layout.rows):
        raise SourceError(f"{uri} has changed since it was listed: add it again")
    row = sum(layout.rows[:first_group])
    for group in range(first_group, first_group + num_groups):
        for (label, reason), content, values in _contents(file, source, layout, group, kept):
            yield Item(f"{uri}#row={row}", label, content, values, reason)
            row += 1


def _contents(
    file: pq.ParquetFile, source: "Source", layout: Layout, group: int, kept: Sequence[KeptColumn]
) -> Iterator[tuple[tuple[str | None, str], bytes | Rejected, tuple]]:
    """Label with the reason if it is None, bytes and kept values of each row of a row group that the footer counts."""
    columns, left = layout.columns, layout.rows[group]
    image = f"{columns.image}.bytes" if columns.in_struct else columns.image
    what, clause = "is damaged", "it has fewer rows than the footer says"
    there = [column.name for column in kept if file.schema_arrow.names.count(column.name) == 1]
    label_column = columns.label.column
    wanted = dict.fromkeys([image, *([] if label_column is None else [label_column]), *there])
    try:
        for batch in batches_of(file, source, _batch_rows(file, group), [group], [*wanted]):
            images = batch.column(batch.schema.get_field_index(columns.image))
            if columns.in_struct:
                images = pc.struct_field(images, "bytes")
            values = kept_values(batch, kept, file.schema_arrow, layout.uri)
            labels = columns.label.labels_in(batch)
            for label, content, row in list(zip(labels, images, values, strict=True))[:left]:
                yield label, _content(content), row
                left -= 1
    except MemoryError:  # pyarrow's is an ArrowException too, but means no damage of the file
        raise
    except (pa.ArrowException, OSError) as error:
        if source.lost is not None:
            raise source.lost from None
        clause = " ".join(str(error).split()).rstrip(".")
    except PageBomb as error:
        what, clause = "is not read", str(error)
    for _ in range(left):
        yield (None, ""), Rejected("read", f"the row group {what}: {clause}"), ()


def _content(scalar: pa.Scalar) -> bytes | Rejected:
    if not scalar.is_valid:
        return Rejected("read", "there are no bytes in the row")
    buffer = scalar.as_buffer()
    if buffer.size > MAX_FILE_BYTES:
        return Rejected("read", f"{buffer.size:,} bytes is more than {MAX_FILE_BYTES:,}")
    return bytes(buffer.to_pybytes()) if buffer.size else Rejected("read", "the file is empty")


def texts_in(batch: pa.RecordBatch, name: str | None) -> list[str | None]:
    """A column of a batch as texts, such as uris; all None if `name` is None."""
    if name is None:
        return [None] * batch.num_rows
    return [text_of(value) for value in _decoded(batch.column(batch.schema.get_field_index(name))).to_pylist()]


def _decoded(column: pa.Array) -> pa.Array:
    """A column with its dictionary decoded, and its texts as valid UTF-8: nothing has checked them before."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not is_text(column.type):
        return column
    found = column.cast(pa.large_binary()).to_pylist()
    return pa.array([None if text is None else text.decode(errors="replace") for text in found], pa.string())


def _named(column: pa.Array, names: Sequence[str] | None) -> list:
    """The values of a column, with names in place of a ClassLabel's numbers; -1 means no label."""
    values: list = column.to_pylist()
    if names is None:
        return values
    # pandas writes whole numbers as floats as soon as one is missing.
    numbers = [None if v is None or math.isnan(v) or v < 0 else int(v) for v in values]
    return [names[v] if v is not None and v < len(names) else v for v in numbers]


def kept_values(batch: pa.RecordBatch, kept: Sequence[KeptColumn], schema: pa.Schema, uri: str = "") -> list[tuple]:
    """The kept values of each row of a batch from a file with this schema; None for a value of another type.

    The folders of `uri` may give a column that the file does not have, as Hive writes partitions.
    """
    columns = []
    partitions = partition_columns(uri)
    for wanted in kept:
        at = batch.schema.get_field_index(wanted.name)
        if at < 0 and wanted.name in partitions:
            columns.append([value_of(partitions[wanted.name], wanted.kind)] * batch.num_rows)
            continue
        if at < 0 or type_of(batch.schema.field(at).type) is None:
            columns.append([None] * batch.num_rows)
            continue
        column, names = _decoded(batch.column(at)), class_names(schema, wanted.name)
        if names:
            column = pa.array([text_of(value) for value in _named(column, names)], pa.string())
        columns.append(values_of(as_type(column, wanted.kind)))
    return list(zip(*columns, strict=True)) if columns else [()] * batch.num_rows


def _batch_rows(file: pq.ParquetFile, group: int) -> int:
    """How many rows of a row group to read at once, so that large images do not fill the memory.

    The estimate uses the size of all columns, because asking a damaged footer for one column aborts the process
    (pyarrow 25).
    """
    footer = file.metadata.row_group(group)
    num_rows, num_bytes = int(footer.num_rows), int(footer.total_byte_size)
    return max(1, min(BATCH_ROWS, BATCH_BYTES * num_rows // max(1, num_bytes)))


def _columns(schema: pa.Schema, uri: str, labels: str) -> ImageColumns:
    image = _image_field(schema, uri)
    return ImageColumns(image.name, pa.types.is_struct(image.type), file_label(schema, uri, labels, image.name))


def _image_field(schema: pa.Schema, uri: str) -> pa.Field:
    candidates = [field for field in schema if _holds_bytes(field.type)]
    if not candidates:
        raise NoImages(
            f"{uri} has no column of image bytes, only {describe_columns(schema)}: write the bytes of the image files "
            "into a binary column named image"
        )
    # Some writers do not mark texts: their labels are bytes.
    candidates = [field for field in candidates if field.name not in LABEL_COLUMNS] or candidates
    named = [field for name in IMAGE_COLUMNS for field in candidates if field.name == name]
    found = named[0] if named else candidates[0]
    if (not named and len(candidates) > 1) or schema.names.count(found.name) > 1:
        raise SourceError(
            f"{uri} has several columns that may hold the images, {describe_columns(candidates)}: name the right "
            "one image"
        )
    return found


def file_label(schema: pa.Schema, uri: str, labels: str, content: str) -> FileLabel:
    """How a file of rows gives the labels that `labels` asks for, as in `inspect`; never in its column `content`.

    Raises SourceError.
    """

    def is_usable(column: str) -> bool:
        return column != content and _holds_labels(schema.field(column).type)

    if labels == "none":
        return FileLabel(reason="labels were not asked for")
    name = column_of(labels)
    partition = partition_label(uri, labels)
    if name is not None and schema.names.count(name) != 1 and not (partition and name not in schema.names):
        count = "several columns" if name in schema.names else "no column"
        raise SourceError(
            f"{uri} has {count} {name}, it has {describe_columns(schema)}: name one in `labels` column:NAME"
        )
    if name is not None and name in schema.names and not is_usable(name):
        raise SourceError(
            f"the column {name} of {uri} is {schema.field(name).type} and no label: name a column of texts, "
            "numbers or booleans in `labels` column:NAME"
        )
    there = [one for one in ((name,) if name else LABEL_COLUMNS) if schema.names.count(one) == 1 and one != content]
    found = next((one for one in there if is_usable(one)), None)
    if found is not None:
        return FileLabel(found, class_names(schema, found))
    if partition is not None:
        return FileLabel(value=partition[1], reason=f"its folder gives {partition[0]} no value")
    if there:
        kind = schema.field(there[0]).type
        return FileLabel(reason=f"the column {there[0]} holds {kind}, and a label is one text or number")
    folders = [f"{name}={value}" for name, value in partition_columns(uri).items()]
    also = f"; its folders say {', '.join(folders)}, which `labels` column:NAME takes" if folders else ""
    return FileLabel(reason=f"the table has no column of labels ({', '.join(LABEL_COLUMNS)}){also}")


def class_names(schema: pa.Schema, name: str) -> tuple[str, ...] | None:
    """The names of a Hugging Face ClassLabel (integers, with names in the metadata); None for another column."""
    kind = schema.field(name).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][name]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):  # another writer's metadata, or none
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _holds_labels(kind: pa.DataType) -> bool:
    types = pa.types
    value = kind.value_type if types.is_dictionary(kind) else kind
    numbers = types.is_integer(value) or types.is_floating(value) or types.is_decimal(value)
    texts = is_text(value) or _is_binary(value) or types.is_fixed_size_binary(value)
    return texts or numbers or types.is_boolean(value) or types.is_date(value) or types.is_null(value)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def describe_columns(fields: pa.Schema | list[pa.Field]) -> str:
    """Columns with their types, for a message."""
    return ", ".join(f"{field.name} ({field.type})" for field in fields) or "no columns"


def group_rows(file: pq.ParquetFile) -> tuple[int, ...]:
    """Rows in each row group."""
    return tuple(file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups))


def open_parquet(source: "Source", uri: str) -> pq.ParquetFile:
    """A Parquet file whose footer was read. Raises SourceError, and what the stream raises."""
    try:
        file = pq.ParquetFile(
            source,
            buffer_size=BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,  # if the writer stored checksums, which few do
            arrow_extensions_enabled=False,
        )
        _ = file.schema_arrow  # the schema can be damaged on its own
        if any(num_rows < 0 for num_rows in group_rows(file)):
            raise ValueError("a row group of fewer than no rows")
    except (pa.ArrowException, OSError, ValueError) as error:
        if source.lost is not None:
            raise source.lost from None
        raise NoImages(f"{uri} is not a Parquet file, or is cut short: write or copy it again") from error
    num_rows, num_bytes = sum(group_rows(file)), source.seek(0, io.SEEK_END)
    if num_rows > max(HARMLESS_ROWS, num_bytes):
        raise SourceError(f"{uri} claims {num_rows:,} rows in {num_bytes:,} bytes: write it again")
    return file

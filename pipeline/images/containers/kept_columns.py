"""The kept columns of a source (`--keep`): which exist, their types, and their values in the label file.

Types are settled once, when a source is planned, from its Parquet files and from a label file in Parquet. Values of tar
archives and of other label files are text.
"""

import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SourceError, UsageError
from pipeline.images.containers.parquet import class_names, kept_values
from pipeline.images.labels.label_files import last_change
from pipeline.images.labels.label_rows import LabelFile, label_table, read_label_file
from pipeline.images.names.partitions import partition_columns
from pipeline.store.tables.kept_columns import FIXED, KeptColumn, type_of
from pipeline.store.tables.schemas import PLAN

SHOWN_NAMES = 20
_NUMBERS = {"int64", "float64"}


def check_names(names: Sequence[str]) -> None:
    """Raises UsageError for names that a kept column cannot have."""
    seen: set[str] = set()
    for name in names:
        if not name.strip():
            raise UsageError("`keep` is empty: give the name of a column")
        if name.lower() in FIXED:  # DuckDB and Spark ignore the case of these names
            raise UsageError(
                f"`keep` {name} is the name of a column that every entry has ({', '.join(FIXED)}): rename the column "
                "in the source, or leave it out"
            )
        if name.lower() in seen:
            raise UsageError(f"`keep` names {name} twice: leave one of them out")
        seen.add(name.lower())


class ColumnsFound:
    """The kept columns that the files of a source have. Several threads may note files."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._types: dict[str, set[str]] = {name: set() for name in names}
        self._there: set[str] = set()  # all columns, of any name, that could be kept
        self._refused: set[tuple[str, str, str]] = set()
        self._may_have_any = False

    def note_archive(self) -> None:
        """Note a tar archive. Its columns are unknown until it is read."""
        self._may_have_any = True

    def note(self, uri: str, schema: pa.Schema) -> None:
        """Note the columns of a Parquet file or a label file, and those that its folders give."""
        if not self._names:
            return
        for name in partition_columns(uri):
            if name not in schema.names:
                schema = schema.append(pa.field(name, pa.string()))
        self._there |= {field.name for field in schema if field.name.lower() not in FIXED and type_of(field.type)}
        for name in self._names:
            if schema.names.count(name) > 1:
                self._refused.add((uri, name, "there twice"))
            if schema.names.count(name) != 1:
                continue
            kind = schema.field(name).type
            found = "string" if class_names(schema, name) else type_of(kind)
            if found is not None:
                self._types[name].add(found)
            elif pa.types.is_null(kind):
                self._types[name].add("")  # the column exists, and fits any type
            else:
                self._refused.add((uri, name, str(kind)))

    def settled(self, label_file: str | None) -> tuple[KeptColumn, ...]:
        """The columns with their types. Raises SourceError for one that no file has, or that cannot be kept."""
        if self._names and label_file is not None:
            schema = _kept_table(label_file, self._names, last_change(label_file)).schema
            # A CSV has no types: its texts fit any type.
            typed = [f if _is_parquet(label_file) else pa.field(f.name, pa.null()) for f in schema]
            self.note(label_file, pa.schema(typed, metadata=schema.metadata))
        for uri, name, kind in sorted(self._refused):
            raise SourceError(
                f"the column {name} of {uri} is {kind} and cannot be kept: name a column of texts, numbers, booleans, "
                "dates or timestamps in `keep`"
            )
        for name in self._names:
            if not self._types[name] and not self._may_have_any:
                there = sorted(self._there)
                more = ", …" if len(there) > SHOWN_NAMES else ""
                what = f"it has {', '.join(there[:SHOWN_NAMES])}{more}" if there else "it has none to keep"
                raise SourceError(
                    f"nothing in the source has a column {name}, {what}: name one of Parquet files, tar archives or "
                    "the file of `labels` file:PATH in `keep`"
                )
        return tuple(KeptColumn(name=name, type=_common(self._types[name] - {""})) for name in self._names)


def _common(types: set[str]) -> str:
    """The one type that can hold values of all these types: float64 for numbers, else string."""
    if len(types) == 1:
        return next(iter(types))
    return "float64" if types == _NUMBERS else "string"


def with_label_file(images: pa.Table, rows_M: np.ndarray, file: LabelFile, kept: Sequence[KeptColumn]) -> pa.Table:
    """Planned images with the kept columns of a label file added; `rows_M` has each image's row in the file, or -1."""
    if not kept:
        return images
    values, none = _rows(file.path, tuple(kept), last_change(file.path)), (None,) * len(kept)
    there = _kept_table(file.path, tuple(column.name for column in kept), last_change(file.path)).column_names
    found = [none if row < 0 else values[row] for row in rows_M.tolist()]
    for at, column in enumerate(kept):
        if column.name in there:
            if column.name in PLAN.names:
                raise SourceError(
                    f"the column {column.name} of {file.path} has the name of one of the plan's: rename it"
                )
            images = images.append_column(column.field, pa.array([row[at] for row in found], column.kind))
    return images


def fill_up(own: tuple, row: int | None, file: LabelFile, kept: Sequence[KeptColumn]) -> tuple:
    """The kept values of an image in a container; missing values come from its row in the label file."""
    if row is None or not kept:
        return own
    beside = _rows(file.path, tuple(kept), last_change(file.path))[row]
    return tuple(other if value is None else value for value, other in zip(own or beside, beside, strict=True))


@functools.lru_cache(maxsize=1)
def _rows(path: str, kept: tuple[KeptColumn, ...], change: object) -> list[tuple]:
    """Kept values of each row of a label file. Raises SourceError."""
    table = _kept_table(path, tuple(column.name for column in kept), change)
    values = [row for batch in table.to_batches() for row in kept_values(batch, kept, table.schema)]
    file = read_label_file(path)
    for row, first in file.rows.repeated():
        if values[first] != values[row]:
            raise SourceError(
                f"{path} gives '{file.name_in(row)}' two rows with other values to keep: leave one of them out"
            )
    return values


@functools.lru_cache(maxsize=1)
def _kept_table(path: str, names: tuple[str, ...], change: object) -> pa.Table:
    """A label file as a table. If it is not Parquet, texts in the named columns are trimmed, and null if empty."""
    table, _, _ = label_table(path, change)
    for name in () if _is_parquet(path) else set(names) & set(table.column_names):
        if pa.types.is_string(table[name].type):
            column = pc.utf8_trim_whitespace(table[name])
            texts = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
            table = table.set_column(table.schema.get_field_index(name), name, texts)
    return table


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")

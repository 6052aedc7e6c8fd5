"""Kept columns: columns of a source that stay with entries, besides the fixed columns, in plain Arrow types."""

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

FIXED = ("id", "uri", "label", "dataset", "embedding", "sha256", "width", "height")  # the columns of every entry
KINDS = {
    "bool": pa.bool_(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "string": pa.string(),
    "date32": pa.date32(),
    "timestamp[us]": pa.timestamp("us"),
    "timestamp[us, UTC]": pa.timestamp("us", tz="UTC"),
}
_NAMES = {kind: name for name, kind in KINDS.items()}
Kind = Literal["bool", "int64", "float64", "string", "date32", "timestamp[us]", "timestamp[us, UTC]"]


class KeptColumn(BaseModel):
    """A kept column; `type` is one of KINDS."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    type: Kind

    @property
    def kind(self) -> pa.DataType:
        return KINDS[self.type]

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.kind)


def type_of(kind: pa.DataType) -> str | None:
    """The type (of KINDS) in which a column of an Arrow type is stored; None if it cannot be stored.

    Numbers are widened, and times are cut to microseconds. A uint64 becomes a string, as there is no wider integer.
    """
    types = pa.types
    if types.is_dictionary(kind):
        return type_of(kind.value_type)
    if types.is_uint64(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "string"
    if types.is_integer(kind):
        return "int64"
    if types.is_floating(kind):
        return "float64"
    if types.is_timestamp(kind):
        return "timestamp[us]" if kind.tz is None else "timestamp[us, UTC]"
    return "date32" if types.is_date(kind) else _NAMES.get(kind)


def kept_in(schema: pa.Schema, fixed: pa.Schema) -> tuple[KeptColumn, ...] | None:
    """The kept columns of a file whose other columns are `fixed`; None if it has any other column."""
    kept = kept_after(schema, len(fixed))
    wanted = pa.schema([*fixed, *(column.field for column in kept)])
    names = set(schema.names)
    return kept if schema.equals(wanted) and len(names) == len(schema) else None


def kept_after(schema: pa.Schema, num_fixed: int) -> tuple[KeptColumn, ...]:
    """The columns of a file after the first `num_fixed` whose type is one of KINDS."""
    return tuple(KeptColumn(name=f.name, type=_NAMES[f.type]) for f in list(schema)[num_fixed:] if f.type in _NAMES)


def as_type(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """A column cast to one of KINDS; null if a value cannot be cast. Extra precision is cut off."""
    if column.type == kind:
        return column
    if pa.types.is_integer(column.type) and pa.types.is_floating(kind):
        return column.cast(kind, safe=False)
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns" and pa.types.is_timestamp(kind):
        return column.cast(pa.timestamp("us", tz=column.type.tz), safe=False).cast(kind)
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        if len(column) == 1:
            return pa.nulls(1, kind)
        return pa.concat_arrays([as_type(column.slice(row, 1), kind) for row in range(len(column))])


def values_of(column: pa.Array) -> list:
    """The values of a column in one of KINDS, in a form for pa.array. Times are numbers, which have no range limit."""
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.int64()).to_pylist()  # type: ignore[no-any-return]
    return (column.cast(pa.int32()) if pa.types.is_date(column.type) else column).to_pylist()  # type: ignore[no-any-return]


def rows_of(table: pa.Table, kept: Sequence[KeptColumn]) -> list[tuple]:
    """The values of kept columns in each row of a table; None for a column that the table does not have."""
    columns = [
        values_of(table[column.name].combine_chunks()) if column.name in table.column_names else [None] * table.num_rows
        for column in kept
    ]
    return list(zip(*columns, strict=True)) if columns else [()] * table.num_rows


def value_of(text: str | None, kind: pa.DataType) -> bool | int | float | str | None:
    """The value of a text, in the form of `values_of`; None if the text is not a value of this kind."""
    if text is None or pa.types.is_string(kind):
        return text
    [value] = values_of(as_type(pa.array([text], pa.string()), kind))
    return value  # type: ignore[no-any-return]


def union(columns: Sequence[Sequence[KeptColumn]]) -> tuple[KeptColumn, ...]:
    """The columns of several segments in order of their first mention; a column with two types becomes a string."""
    types: dict[str, str] = {}
    for column in (column for each in columns for column in each):
        types[column.name] = column.type if types.get(column.name, column.type) == column.type else "string"
    return tuple(KeptColumn(name=name, type=kind) for name, kind in types.items())


def join_entries(tables: Sequence[pa.Table]) -> pa.Table:
    """Join rows of entries files to one table with all kept columns, null if a file lacks one. No value is lost."""
    schema = tables[0].schema
    fixed = pa.schema(list(schema)[: len(FIXED)], metadata=schema.metadata)
    kept = union([kept_in(table.schema, fixed) or () for table in tables])
    if not kept:
        return pa.concat_tables(tables)
    whole = pa.schema([*fixed, *(column.field for column in kept)], metadata=schema.metadata)
    return pa.concat_tables(with_columns(table, whole) for table in tables)


def with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with the columns of a schema, null for a column that it lacks. No value is lost."""
    columns = [
        table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(len(table), f.type) for f in schema
    ]
    return pa.table(columns, schema=schema)


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column in one of KINDS as strings, as `joined` stores a column that has several types."""
    return pc.cast(column, pa.string())

"""Columns of a source that stay with its entries (`--keep`): which there are, their types, and the label file's values.

Types are settled once, when a source is planned, by its Parquet files and a label file that is one; what tar archives
and other label files say is text.
"""

import functools
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SourceError, UsageError
from pipeline.images.items import Item
from pipeline.images.label_files import last_change, read_fields, read_table
from pipeline.images.labels import text_of
from pipeline.images.parquet import class_names, kept_values
from pipeline.store.kept import FIXED, KeptColumn, type_of
from pipeline.store.schemas import PLAN

SHOWN_NAMES = 20
_NUMBERS = {"int64", "float64"}


def check_names(names: Sequence[str]) -> None:
    """Raises UsageError for columns that cannot be kept under their own names."""
    seen: set[str] = set()
    for name in names:
        if not name.strip():
            raise UsageError("--keep is empty: give the name of a column")
        if name.lower() in FIXED:  # which DuckDB and Spark do not tell apart by case
            raise UsageError(
                f"--keep {name} is the name of a column that every entry has ({', '.join(FIXED)}): rename the column "
                "in the source, or leave it out"
            )
        if name.lower() in seen:
            raise UsageError(f"--keep names {name} twice: leave one of them out")
        seen.add(name.lower())


class ColumnsFound:
    """What the files of a source say of the columns to be kept. Files may be noted from several threads."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._types: dict[str, set[str]] = {name: set() for name in names}
        self._there: set[str] = set()  # columns of any name that can be kept
        self._refused: set[tuple[str, str, str]] = set()
        self._may_have_any = False

    def note_archive(self) -> None:
        """A tar archive, of which nobody knows what it says before it is read."""
        self._may_have_any = True

    def note(self, uri: str, schema: pa.Schema) -> None:
        """A Parquet file, or a label file, whose columns are known."""
        if not self._names:
            return
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
                self._types[name].add("")  # it is there, and fits any
            else:
                self._refused.add((uri, name, str(kind)))

    def settled(self, label_file: str | None) -> tuple[KeptColumn, ...]:
        """The columns with their types. Raises SourceError for one that is nowhere, or that cannot be kept."""
        if self._names and label_file is not None:
            schema = _label_table(label_file, self._names, last_change(label_file)).schema
            # What is text because a CSV has no types fits any.
            typed = [f if _is_parquet(label_file) else pa.field(f.name, pa.null()) for f in schema]
            self.note(label_file, pa.schema(typed, metadata=schema.metadata))
        for uri, name, kind in sorted(self._refused):
            raise SourceError(
                f"the column {name} of {uri} is {kind} and cannot be kept: name a column of texts, numbers, booleans, "
                "dates or timestamps in --keep"
            )
        for name in self._names:
            if not self._types[name] and not self._may_have_any:
                there = sorted(self._there)
                more = ", …" if len(there) > SHOWN_NAMES else ""
                what = f"it has {', '.join(there[:SHOWN_NAMES])}{more}" if there else "it has none to keep"
                raise SourceError(
                    f"nothing in the source has a column {name}, {what}: name one of Parquet files, tar archives or "
                    "the file of --labels file:PATH in --keep"
                )
        return tuple(KeptColumn(name=name, type=_common(self._types[name] - {""})) for name in self._names)


def _common(types: set[str]) -> str:
    """The one type that holds the values of all: float64 for numbers, a string where they are no numbers."""
    if len(types) == 1:
        return next(iter(types))
    return "float64" if types == _NUMBERS else "string"


def with_label_file(images: pa.Table, folder: str, path: str | None, kept: Sequence[KeptColumn]) -> pa.Table:
    """Planned images with those kept columns that a label file has, found by uri, or by the uri from `folder` on."""
    if path is None or not kept:
        return images
    by_uri, none = _beside(path, tuple(kept), last_change(path)), (None,) * len(kept)
    there = _label_table(path, tuple(column.name for column in kept), last_change(path)).column_names
    uris = images.column("uri").to_pylist()
    rows = [by_uri.get(uri) or by_uri.get(uri.removeprefix(f"{folder}/")) or none for uri in uris]
    for at, column in enumerate(kept):
        if column.name in there:
            if column.name in PLAN.names:
                raise SourceError(f"the column {column.name} of {path} has the name of one of the plan's: rename it")
            images = images.append_column(column.field, pa.array([row[at] for row in rows], column.kind))
    return images


def filled_up(item: Item, path: str, kept: Sequence[KeptColumn]) -> tuple:
    """The kept values of an image in a container, what that does not tell from a label file."""
    beside = _beside(path, tuple(kept), last_change(path)).get(item.uri) if item.kept else None
    if beside is None:
        return item.kept
    return tuple(other if own is None else own for own, other in zip(item.kept, beside, strict=True))


@functools.lru_cache(maxsize=1)
def _beside(path: str, kept: tuple[KeptColumn, ...], change: object) -> dict[str, tuple]:
    """Kept values by uri in a label file. Raises SourceError."""
    table = _label_table(path, tuple(column.name for column in kept), change)
    rows = (row for batch in table.to_batches() for row in kept_values(batch, kept, table.schema))
    by_uri: dict[str, tuple] = {}
    for uri, row in zip(table["uri"].to_pylist(), rows, strict=True):
        if by_uri.setdefault(uri, row) != row:
            raise SourceError(f"{path} gives uri '{uri}' two rows with other values to keep: leave one of them out")
    return by_uri


@functools.lru_cache(maxsize=1)
def _label_table(path: str, names: tuple[str, ...], _: object) -> pa.Table:
    """A label file as a table, its uris as strings, and the named columns as strings where it is no Parquet file."""
    if path.endswith(".json"):
        said = read_fields(path)
        there = dict.fromkeys(name for _, fields in said for name in fields)
        columns = {name: pa.array([text_of(fields.get(name)) for _, fields in said], pa.string()) for name in there}
        return pa.table(columns | {"uri": pa.array([uri for uri, _ in said], pa.string())})
    table = read_table(path, names)
    if "uri" not in table.column_names:
        raise SourceError(f"{path} has no column uri, but {', '.join(table.column_names)}: name one of them so")
    for name in () if _is_parquet(path) else set(names) & set(table.column_names):
        column = pc.utf8_trim_whitespace(table[name])
        texts = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
        table = table.set_column(table.schema.get_field_index(name), name, texts)
    return table


def _is_parquet(path: str) -> bool:
    return path.endswith(".parquet")

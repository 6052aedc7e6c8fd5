"""Reads kept columns, hashes and image sizes of some entries from their files."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UnknownName
from pipeline.store.log.state import State
from pipeline.store.storage.file_ranges import FileRanges
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.ids import split_id
from pipeline.store.tables.kept_columns import as_type
from pipeline.store.tables.parquet_columns import files_with, read_columns_of, read_rows, read_rows_of

KeptValue = bool | int | float | str | None


def read_kept(storage: Storage, state: State, ids: Sequence[int]) -> dict[int, dict[str, KeptValue]]:
    """The kept columns of entries by id; entries of segments without kept columns are left out. Raises DamagedFile.

    Reads the row groups of these entries, of these columns alone: some 60 KB a file of an object store and number.
    Dates and times are strings in ISO 8601 format, and a NaN is None. A pack may store a column as strings: the values
    are converted to the type that the segment records.
    """
    kept_by_segment = {segment.number: segment.kept for segment in state.segments if segment.kept}
    wanted = [entry_id for entry_id in ids if split_id(entry_id)[0] in kept_by_segment]
    asked = []
    for file, here in files_with(state.entries_files(), wanted) if wanted else ():
        for number in sorted({split_id(entry_id)[0] for entry_id in here}):  # a pack holds several segments
            own = [entry_id for entry_id in here if split_id(entry_id)[0] == number]
            asked.append((file, own, ["id", *(column.name for column in kept_by_segment[number])]))
    found: dict[int, dict[str, KeptValue]] = {}
    for (_, own, _), table in zip(asked, read_rows_of(storage, asked), strict=True):
        columns = kept_by_segment[split_id(own[0])[0]]
        there = [column for column in columns if column.name in table.column_names]  # `verify` reports others
        values = {column.name: _plain(table[column.name].combine_chunks(), column.kind) for column in there}
        for row, entry_id in enumerate(table["id"].to_pylist()):
            found[entry_id] = {name: value[row] for name, value in values.items()}
    return found


def _plain(column: pa.Array, kind: pa.DataType) -> list[KeptValue]:
    column = as_type(column, kind)
    if pa.types.is_temporal(kind):
        return [None if text is None else text.replace(" ", "T") for text in column.cast(pa.string()).to_pylist()]
    values: list[KeptValue] = column.to_pylist()
    return [None if value != value else value for value in values]  # noqa: PLR0124  # a NaN, which JSON cannot express


def read_facts(storage: Storage, state: State, entry_id: int) -> tuple[str, int, int]:
    """The sha256 of an entry's image file, and its width and height in pixels. Raises UnknownName or DamagedFile."""
    for single in state.pending:
        if single.id == entry_id:
            return single.sha256, single.width, single.height
    for file, _ in files_with(state.entries_files(), [entry_id]):
        for row in read_rows(storage, file, [entry_id], ["id", "sha256", "width", "height"]).to_pylist():
            return row["sha256"], row["width"], row["height"]
    raise UnknownName(f"id {entry_id} is no entry of version {state.version}")


def read_kept_columns(
    storage: Storage, state: State, ids_N: np.ndarray, names: Sequence[str]
) -> dict[str, pa.ChunkedArray]:
    """Kept columns of some entries (ids int64 [N] ascending) in their order, null if an entry lacks the column.

    Reads the ids and these columns of the files that hold the entries, several files at once from an object store. The
    columns have the types of `State.kept`. Raises DamagedFile.
    """
    kinds = {column.name: column.kind for column in state.kept}
    keeping = {segment.number for segment in state.segments if {c.name for c in segment.kept} & {*names}}
    files = []
    for file, _ in FileRanges(state.entries_files()).holding(ids_N):
        numbers = range(split_id(file.first_id)[0], split_id(file.last_id)[0] + 1)
        if any(number in keeping for number in numbers):
            files.append(file)
    if not files:
        return {name: pa.chunked_array([pa.nulls(len(ids_N), kinds[name])]) for name in names}
    read = [
        pa.table({"id": table["id"], **{name: _in(table, name, kinds[name]) for name in names}})
        for table in read_columns_of(storage, files, ["id", *names])
    ]
    table = pa.concat_tables(read)
    rows = pc.index_in(pa.array(ids_N), value_set=table["id"])
    return {name: table[name].take(rows) for name in names}


def _in(table: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """A kept column of a file cast to a type, null if the file lacks the column."""
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, kind)])
    return pa.chunked_array([as_type(chunk, kind) for chunk in table[name].chunks], kind)

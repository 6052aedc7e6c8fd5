"""What is kept with some entries, read from the files they lie in."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.store.ids import split_id
from pipeline.store.kept import as_type
from pipeline.store.schemas import read_table
from pipeline.store.state import State
from pipeline.store.storage import Storage

KeptValue = bool | int | float | str | None


def read_kept(storage: Storage, state: State, ids: Sequence[int]) -> dict[int, dict[str, KeptValue]]:
    """The kept columns of those of some entries whose segment has any, by id. Raises DamagedFile.

    Dates and times are texts as ISO 8601 has them, and a NaN is None. In a file that was packed with others a column
    may lie as text: it is given as its segment says.
    """
    kept_by_segment = {segment.number: segment.kept for segment in state.segments if segment.kept}
    wanted = [entry_id for entry_id in ids if split_id(entry_id)[0] in kept_by_segment]
    found: dict[int, dict[str, KeptValue]] = {}
    for file in state.entries_files() if wanted else ():
        here = [entry_id for entry_id in wanted if file.first_id <= entry_id <= file.last_id]
        for number in {split_id(entry_id)[0] for entry_id in here}:
            columns = kept_by_segment[number]
            table = read_table(storage, file, ["id", *(column.name for column in columns)])
            own = pa.array([entry_id for entry_id in here if split_id(entry_id)[0] == number], pa.int64())
            table = table.filter(pc.is_in(table["id"], own)).combine_chunks()
            there = [column for column in columns if column.name in table.column_names]  # or `verify` tells of it
            values = {column.name: _plain(table[column.name].combine_chunks(), column.kind) for column in there}
            for row, entry_id in enumerate(table["id"].to_pylist()):
                found[entry_id] = {name: value[row] for name, value in values.items()}
    return found


def _plain(column: pa.Array, kind: pa.DataType) -> list[KeptValue]:
    column = as_type(column, kind)
    if pa.types.is_temporal(kind):
        return [None if text is None else text.replace(" ", "T") for text in column.cast(pa.string()).to_pylist()]
    values: list[KeptValue] = column.to_pylist()
    return [None if value != value else value for value in values]  # noqa: PLR0124  # a NaN, for which JSON has no word

"""Which rows hold one of many values: comparisons of a whole memory with the small set of what is erased."""

from collections.abc import Collection, Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

ROWS_AT_ONCE = 65_536
MANY = 8  # times the rows: looking up each row in a set is then faster than to let Arrow hash all values again


class Values:
    """A set of texts. The offsets of Arrow's `string` end at 2 GiB, so the texts are held as `large_string`."""

    def __init__(self, texts: Collection[str]) -> None:
        self.in_order = sorted(texts)
        self._texts = pa.array(self.in_order, pa.large_string())
        self._set = frozenset(texts)

    def __len__(self) -> int:
        return len(self.in_order)

    def found_in(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """For each text of a column, whether it is one of the values (bool [N]); False for null."""
        if not self._set:
            return pa.chunked_array([pa.repeat(False, len(column))])
        if len(self._set) > MANY * len(column):
            return pa.chunked_array([pa.array([text in self._set for text in column.to_pylist()], pa.bool_())])
        return pc.is_in(column.cast(pa.large_string()), self._texts)

    def places_of(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """For each text of a column, its place among the values in ascending order (int32); null for others."""
        return pc.index_in(column.cast(pa.large_string()), self._texts)


def in_batches(tables: Iterable[pa.Table], num_values: int) -> Iterator[pa.Table]:
    """Join small tables without copying, so that a comparison has at least as many rows as there are values.

    Each comparison hashes all values. Without this, 100,000 values would be hashed again for every file.
    """
    wanted = max(ROWS_AT_ONCE, num_values)
    batch: list[pa.Table] = []
    rows = 0
    for table in tables:
        batch.append(pa.table(dict(zip(table.column_names, table.columns, strict=True))))  # files differ in metadata
        rows += table.num_rows
        if rows >= wanted:
            yield pa.concat_tables(batch)
            batch, rows = [], 0
    if batch:
        yield pa.concat_tables(batch)

"""From a name to its row in a long table, and labels by row, in a few bytes a row instead of Python's objects.

The names themselves stay in Arrow. A name is found by its hash: 12 bytes a row, and about 2 microseconds a look-up.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

CHUNK_ROWS = 65_536


class NameIndex:
    """The first row of each name. Shapes: N rows."""

    def __init__(self, names: Iterable[str], written: pa.ChunkedArray | None = None) -> None:
        """Read the names once. `written` are the same rows as a column: where they are equal, it is not copied."""
        chunks: list[pa.Array] = []
        hashes: list[np.ndarray] = []
        rows, start = iter(names), 0
        while chunk := [name for _, name in zip(range(CHUNK_ROWS), rows, strict=False)]:
            found = pa.array(chunk, pa.string())
            there = written.slice(start, len(chunk)) if written is not None else pa.chunked_array([found])
            start += len(chunk)
            is_copy = there.type == found.type and pa.chunked_array([found]).equals(there)
            chunks += there.chunks if is_copy else [found]
            hashes.append(np.fromiter(map(hash, chunk), np.int64, len(chunk)))
        self._names = pa.chunked_array(chunks, pa.string())
        hashes_N = np.concatenate(hashes) if hashes else np.zeros(0, np.int64)
        self._rows_N = np.argsort(hashes_N, kind="stable").astype(np.int32 if len(hashes_N) < 1 << 31 else np.int64)
        self._hashes_N = hashes_N[self._rows_N]

    def __len__(self) -> int:
        return len(self._names)

    def get(self, name: str) -> int | None:
        """The first row of a name; None if no row has it."""
        wanted = hash(name)
        at = int(np.searchsorted(self._hashes_N, wanted))
        while at < len(self._hashes_N) and self._hashes_N[at] == wanted:
            row = int(self._rows_N[at])
            if self._names[row].as_py() == name:
                return row
            at += 1
        return None

    def repeated(self) -> Iterator[tuple[int, int]]:
        """Each row whose name an earlier row has, ascending, with the first row of that name."""
        same_N = self._hashes_N[1:] == self._hashes_N[:-1]
        for row in np.sort(self._rows_N[1:][same_N]).tolist():
            first = self.get(self._names[row].as_py())
            if first is not None and first != row:
                yield row, first


class LabelColumn:
    """Labels by row: a number of 4 bytes for each, and each label once."""

    def __init__(self, labels: Iterable[str | None]) -> None:
        numbers: dict[str | None, int] = {None: -1}
        vocabulary: list[str] = []

        def number(label: str | None) -> int:
            found = numbers.get(label)
            if found is None:
                found = numbers[label] = len(vocabulary)
                vocabulary.append(str(label))
            return found

        self._codes_N = np.fromiter(map(number, labels), np.int32)
        self._vocabulary = pa.array(vocabulary, pa.string())

    def __len__(self) -> int:
        return len(self._codes_N)

    def __getitem__(self, row: int) -> str | None:
        """The label of a row; None if it has none."""
        code = self._codes_N[row]
        return None if code < 0 else self._vocabulary[int(code)].as_py()

    def of_rows(self, rows_M: np.ndarray) -> pa.ChunkedArray:
        """The labels of some rows, null for row -1 and for a row without a label (string [M])."""
        chunks = []
        for start in range(0, len(rows_M), CHUNK_ROWS):
            rows = rows_M[start : start + CHUNK_ROWS]
            codes = np.where(rows < 0, -1, self._codes_N[rows]) if len(self._codes_N) else np.full(len(rows), -1)
            chunks.append(self._vocabulary.take(pa.array(codes, mask=codes < 0)))
        return pa.chunked_array(chunks, pa.string())

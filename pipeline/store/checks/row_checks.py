"""Compares an entry's row in its file with its row in the plan and its row in a shard: all three must agree."""

import json
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.checks.findings import Finding, damage
from pipeline.store.log.records import Shard

# The metadata key of label names in index/search/shard_files.py, which this module may not import.
SHARD_LABELS = b"visual_memory.labels"
LAST_ID = (1 << 63) - 1


class ShardSides:
    """A shard's side files, each None if it is damaged or not open; index/search/shard_files.py describes their rows.

    `first_id` and `last_id` are the ends of the ranges that the shard covers.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.files = [f for f in (shard.ids, shard.labels, shard.vectors, shard.entries) if f is not None]
        self.first_id = min((first for first, _ in shard.covers), default=0)
        self.last_id = max((last for _, last in shard.covers), default=LAST_ID)
        self.close()

    def close(self) -> None:
        """Let go of the rows."""
        self.ids_N: np.ndarray | None = None
        self.vectors_ND: np.ndarray | None = None
        self.codes_N: np.ndarray | None = None
        self.entries: pa.Table | None = None
        self.__dict__.pop("_names", None)

    def differences(self, table: pa.Table, ids_N: np.ndarray, vectors_ND: np.ndarray) -> Iterator[Finding]:
        """The differences between the shard's rows and the entries file's rows of some entries (ids ascending)."""
        if self.ids_N is None or not len(self.ids_N) or ids_N[0] > self.ids_N[-1] or ids_N[-1] < self.ids_N[0]:
            return
        rows_N, hit_N = _located(self.ids_N, ids_N)
        rows_N, mask = rows_N[hit_N], pa.array(hit_N)
        vectors = self.shard.vectors
        if vectors and self.vectors_ND is not None and not _equal_bits(self.vectors_ND[rows_N], vectors_ND[hit_N]):
            yield damage(vectors.path, _differs("vectors"))
        if self.codes_N is not None and self._names is not None:
            codes_N = self.codes_N[rows_N]
            labels = self._names.take(pa.array(codes_N, mask=codes_N < 0))
            if not _same(labels, table["label"].filter(mask)):
                yield damage(self.shard.labels.path, _differs("labels"))
        for name in ("uri", "dataset"):
            if self.entries is not None and not _same(
                self.entries[name].take(pa.array(rows_N)), table[name].filter(mask)
            ):
                yield damage(self.shard.entries.path, _differs(f"{name}s"))

    @cached_property
    def _names(self) -> pa.Array | None:
        if self.entries is None:
            return None
        return pa.array(json.loads(self.entries.schema.metadata[SHARD_LABELS]), pa.string())


class PlanPart:
    """The rows of a plan with ids in some range, in memory. Their ids ascend."""

    def __init__(self, rows: pa.Table) -> None:
        self._rows = rows
        self._ids_N = rows["id"].to_numpy()

    def differences(self, table: pa.Table, ids_N: np.ndarray, columns: Iterable[str]) -> Iterator[str]:
        """The columns in which some rows (ids ascending) differ from the plan."""
        first, last = np.searchsorted(self._ids_N, ids_N[0]), np.searchsorted(self._ids_N, ids_N[-1], "right")
        if first < last:
            rows = self._rows.slice(first, last - first)
            yield from _differences(rows, self._ids_N[first:last], table, ids_N, columns)


class PlanRows:
    """A plan whose rows are read on demand."""

    def __init__(self, data: pa.Buffer, ids_N: np.ndarray) -> None:
        self._data = data
        self._ids_N = ids_N
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            self._metadata = file.metadata
        sizes = [self._metadata.row_group(group).num_rows for group in range(self._metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def differences(self, table: pa.Table, ids_N: np.ndarray, columns: Iterable[str]) -> Iterator[str]:
        """The columns in which some rows (ids ascending) differ from the plan."""
        first, last = np.searchsorted(self._ids_N, ids_N[0]), np.searchsorted(self._ids_N, ids_N[-1], "right")
        if first == last:
            return
        begin = int(np.searchsorted(self._starts, first, "right")) - 1
        end = int(np.searchsorted(self._starts, last, "left"))
        reader = pa.BufferReader(self._data)
        with pq.ParquetFile(reader, metadata=self._metadata, page_checksum_verification=True) as file:
            planned = file.read_row_groups(list(range(begin, end)), columns=[*columns])
        yield from _differences(planned, self._ids_N[self._starts[begin] : self._starts[end]], table, ids_N, columns)


def _differences(
    planned: pa.Table, planned_N: np.ndarray, table: pa.Table, ids_N: np.ndarray, columns: Iterable[str]
) -> Iterator[str]:
    """The columns in which rows of a table differ from rows of a plan with the same ids (both ascending)."""
    rows_N, hit_N = _located(planned_N, ids_N)
    at, mask = pa.array(rows_N[hit_N]), pa.array(hit_N)
    for name in columns:
        if not _same(planned[name].take(at), table[name].filter(mask)):
            yield f"has {name}s other than those planned"


def _located(known_N: np.ndarray, ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The position of each id among known ids (ascending, at least one), and whether the id is one of them."""
    rows_N = np.minimum(np.searchsorted(known_N, ids_N), len(known_N) - 1)
    return rows_N, known_N[rows_N] == ids_N


def _equal_bits(left_ND: np.ndarray, right_ND: np.ndarray) -> bool:
    """Whether float16 matrices are equal bit by bit, including NaN and the sign of zero."""
    return np.array_equal(left_ND.view(np.uint16), np.ascontiguousarray(right_ND).view(np.uint16))


def _same(left: pa.Array | pa.ChunkedArray, right: pa.ChunkedArray) -> bool:
    chunks = [left] if isinstance(left, pa.Array) else left.chunks
    return bool(pa.chunked_array(chunks, pa.string()).equals(right))


def _differs(things: str) -> str:
    return f"has other {things} than the entries it was made from"

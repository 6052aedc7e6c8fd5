"""A block: rows that are searched together, with the data of each row.

A shard is one block. Fresh entries form other blocks.

Rows are in the order of their ids. Label codes point into a vocabulary shared by all blocks of a memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.store.tables.ids import in_common

if TYPE_CHECKING:
    from pipeline.index.search.quantizer import Coarse

Scope = Literal["live", "labelled"]

COUNTED_DENSELY = 8  # codes a row: with more, counting by sorting costs less than an array of all codes


@dataclass(frozen=True)
class Candidates:
    """Rows that may be among the nearest (int64 [Q, K], -1: no more rows), and their similarities.

    `similarities_QK` (float32, -inf where the row is -1) differ from the true ones by at most `error`. `error` is
    infinite if they were computed from codes.
    """

    rows_QK: np.ndarray
    similarities_QK: np.ndarray
    error: float

    @classmethod
    def none(cls, num_queries: int) -> "Candidates":
        return cls(np.empty((num_queries, 0), np.int64), np.empty((num_queries, 0), np.float32), 0.0)


class Finder(Protocol):
    """Finds candidates among the rows it was made for."""

    def find(self, queries_QD: np.ndarray, k: int, coarse: "Coarse | None" = None) -> Candidates:
        """At least k candidates for each query (float32 [Q, D] of unit length), if there are so many rows.

        `coarse` is shared by all blocks that are searched for the same queries. It has their nearest lists.
        """


class MakeFinder(Protocol):
    """Makes finders over a selection of a block's rows."""

    def __call__(self, rows_N: np.ndarray) -> Finder:
        """A finder over some of a block's rows."""


@dataclass
class Block:
    """Rows: ids int64 [N] ascending, codes int32 [N] (-1: no label), vectors float16 [N, D], live bool [N].

    If `vectors_ND` is None, `read_vectors` reads vectors from the entries files, and similarities come from codes.
    `kept` has the kept columns read so far, by name: those of a shard, and those read on request.
    """

    ids_N: np.ndarray
    codes_N: np.ndarray
    vectors_ND: np.ndarray | None
    live_N: np.ndarray
    uris: pa.ChunkedArray
    datasets: pa.ChunkedArray
    make_finder: MakeFinder
    kept: dict[str, pa.ChunkedArray] = field(default_factory=dict)
    read_vectors: Callable[[np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if (np.diff(self.ids_N) <= 0).any():
            raise AssertionError("rows of a block must be in the order of their ids: they are found by bisection")
        self._finders: dict[str, Finder] = {}

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """Stored vectors of some rows, float16 [K, D]. Raises DamagedFile."""
        if self.vectors_ND is not None:
            vectors_KD: np.ndarray = self.vectors_ND[rows]
            return vectors_KD
        assert self.read_vectors is not None  # noqa: S101  # either vectors_ND or read_vectors is given
        return self.read_vectors(self.ids_N[rows])

    def finder(self, scope: Scope) -> Finder:
        """The finder over the live rows, or over the live rows with a label. It is made once."""
        if scope == "labelled" and not ((self.codes_N < 0) & self.live_N).any():
            scope = "live"
        if scope not in self._finders:
            mask = self.live_N if scope == "live" else self.live_N & (self.codes_N >= 0)
            self._finders[scope] = self.make_finder(rows_N=np.flatnonzero(mask))
        return self._finders[scope]

    def finder_over(self, mask_N: np.ndarray) -> Finder:
        """A finder over an occasional selection of rows. It is not cached."""
        return self.make_finder(rows_N=np.flatnonzero(mask_N))

    def under(self, live_N: np.ndarray, codes_N: np.ndarray) -> "Block":
        """The same rows under another overlay: this block if nothing changes. Finders of the same rows are kept."""
        if live_N is self.live_N and codes_N is self.codes_N:
            return self
        block = self._with(live_N=live_N, codes_N=codes_N)
        if np.array_equal(live_N, self.live_N):
            same_labelled = np.array_equal(codes_N < 0, self.codes_N < 0)
            block._finders = {scope: f for scope, f in self._finders.items() if scope == "live" or same_labelled}
        return block

    def with_codes(self, codes_N: np.ndarray) -> "Block":
        """The same rows under other labels."""
        return self.under(self.live_N, codes_N)

    def only(self, mask_N: np.ndarray, make_finder: MakeFinder) -> "Block":
        """The same rows. Rows outside the mask are no longer found."""
        return self._with(live_N=self.live_N & mask_N, make_finder=make_finder)

    def _with(self, **changes: Any) -> "Block":
        """A block of the same ids, whose order is known."""
        block = object.__new__(type(self))
        for each in fields(self):
            setattr(block, each.name, changes.get(each.name, getattr(self, each.name)))
        block._finders = {}
        return block

    # Counts of the live rows, made once. A block stays the same object while no version changes it.

    @cached_property
    def num_live(self) -> int:
        """Number of live rows."""
        return int(self.live_N.sum())

    @cached_property
    def label_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """The label codes of the live rows (ascending), and the number of live rows of each, int64 [C]."""
        codes = self.codes_N[self.live_N & (self.codes_N >= 0)]
        if len(codes) and int(codes.max()) < COUNTED_DENSELY * len(codes):
            counts_C = np.bincount(codes)
            return np.flatnonzero(counts_C), counts_C[counts_C > 0]
        found, counts = np.unique(codes, return_counts=True)
        return found.astype(np.int64), counts

    @cached_property
    def dataset_counts(self) -> dict[str, int]:
        """Number of live rows of each dataset that has any."""
        pairs = pc.value_counts(self.datasets.filter(pa.array(self.live_N))).to_pylist()
        return {pair["values"]: pair["counts"] for pair in pairs}

    def located(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of `ids` (ascending) this block holds, including forgotten ones: positions in `ids`, and rows.

        The cost is at most that of the block's rows, and none for ids outside of the block's range.
        """
        rows, positions = in_common(self.ids_N, ids)
        return positions, rows

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """The rows of those of `ids` (ascending) that this block holds, including forgotten ones."""
        return self.located(ids)[1]

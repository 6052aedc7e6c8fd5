"""A block: rows that are searched together, with what is known of each.

A shard is one block, the fresh entries are another.

Rows are in the order of their ids. Label codes point into a vocabulary shared by all blocks of a memory.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

Scope = Literal["live", "labelled"]


class Finder(Protocol):
    """Finds candidates among the rows it was made for."""

    def find(self, queries_QD: np.ndarray, k: int) -> np.ndarray:
        """Candidate rows, int64 [Q, K] with K >= k, -1 where there are no more."""


class MakeFinder(Protocol):
    """How a block makes finders over a choice of its rows."""

    def __call__(self, rows_N: np.ndarray) -> Finder:
        """A finder over some of a block's rows."""


@dataclass
class Block:
    """ids int64 [N] ascending, codes int32 [N] (-1: no label), vectors float16 [N, D], live bool [N]."""

    ids_N: np.ndarray
    codes_N: np.ndarray
    vectors_ND: np.ndarray
    live_N: np.ndarray
    uris: pa.ChunkedArray
    datasets: pa.ChunkedArray
    make_finder: MakeFinder

    def __post_init__(self) -> None:
        if (np.diff(self.ids_N) <= 0).any():
            raise AssertionError("rows of a block must be in the order of their ids: they are found by bisection")
        self._finders: dict[str, Finder] = {}

    def finder(self, scope: Scope) -> Finder:
        """The finder over the live rows, or over those of them that have a label; made once."""
        if scope == "labelled" and not ((self.codes_N < 0) & self.live_N).any():
            scope = "live"
        if scope not in self._finders:
            mask = self.live_N if scope == "live" else self.live_N & (self.codes_N >= 0)
            self._finders[scope] = self.make_finder(rows_N=np.flatnonzero(mask))
        return self._finders[scope]

    def finder_over(self, mask_N: np.ndarray) -> Finder:
        """A finder over an occasional choice of rows, not kept."""
        return self.make_finder(rows_N=np.flatnonzero(mask_N))

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """The rows of those ids that this block holds, forgotten ones included."""
        at = np.searchsorted(self.ids_N, ids)
        at = at[at < len(self.ids_N)]
        return at[np.isin(self.ids_N[at], ids)]

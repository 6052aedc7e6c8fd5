"""Ids as runs of consecutive ids: how `verify` remembers which ids a file has.

The entries of a part are consecutive but for rejected images, so a file takes a few runs (16 bytes each), not 8 bytes a
row. Whole segments are compared by their runs. The ids of one file are written out when it is looked into.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class IdRuns:
    """Runs of ids in the order of a file: the first and the last id of each, int64 [R]."""

    first_R: np.ndarray
    last_R: np.ndarray

    @classmethod
    def of(cls, ids_N: np.ndarray) -> "IdRuns":
        """The runs of some ids (int64 [N]), which keep their order."""
        breaks = np.flatnonzero(ids_N[1:] != ids_N[:-1] + 1)
        ends = [len(ids_N) - 1] if len(ids_N) else []
        starts = [0] if len(ids_N) else []
        return cls(ids_N[np.r_[starts, breaks + 1].astype(np.int64)], ids_N[np.r_[breaks, ends].astype(np.int64)])

    @classmethod
    def joined(cls, several: Iterable["IdRuns"]) -> "IdRuns":
        """One after the other."""
        runs = [cls.of(np.empty(0, np.int64)), *several]
        return cls(np.concatenate([each.first_R for each in runs]), np.concatenate([each.last_R for each in runs]))

    def __len__(self) -> int:
        return int((self.last_R - self.first_R + 1).sum())

    @property
    def ids_N(self) -> np.ndarray:
        """The ids, int64 [N]."""
        lengths_R = self.last_R - self.first_R + 1
        before_R = np.cumsum(lengths_R) - lengths_R
        ids_N: np.ndarray = np.repeat(self.first_R - before_R, lengths_R) + np.arange(lengths_R.sum())
        return ids_N

    def total(self) -> int:
        """The sum of the ids, which tells apart two lists with ids in another order from two with other ids."""
        of_runs = (self.first_R.astype(object) + self.last_R) * (self.last_R - self.first_R + 1)
        return int(of_runs.sum()) // 2

    @property
    def ascend(self) -> bool:
        """Whether each id is higher than the one before it."""
        return bool((self.first_R[1:] > self.last_R[:-1]).all())

    def within(self, first: int, last: int) -> "IdRuns":
        """The ids from `first` to `last`."""
        first_R, last_R = np.maximum(self.first_R, first), np.minimum(self.last_R, last)
        return IdRuns(first_R[first_R <= last_R], last_R[first_R <= last_R])

    def ordered(self) -> "IdRuns":
        """The same ids ascending, in as few runs as there can be. Repeated ids stay in runs that overlap."""
        order = np.argsort(self.first_R, kind="stable")
        first_R, last_R = self.first_R[order], self.last_R[order]
        begins = np.r_[True, first_R[1:] != last_R[:-1] + 1][: len(first_R)]
        ends = np.r_[begins[1:], True][: len(first_R)]
        return IdRuns(first_R[begins], last_R[ends])

    def same_as(self, other: "IdRuns") -> bool:
        """Whether both, ordered, have the same runs."""
        return np.array_equal(self.first_R, other.first_R) and np.array_equal(self.last_R, other.last_R)

    def hold(self, other: "IdRuns") -> bool:
        """Whether these ids, ordered, include all of the others."""
        if not len(self.first_R):
            return not len(other.first_R)
        at = np.searchsorted(self.first_R, other.first_R, "right") - 1
        return bool(((at >= 0) & (self.last_R[at] >= other.last_R)).all())

    def segments(self) -> set[int]:
        """The numbers of the segments that the ids are of."""
        return set(np.unique(np.concatenate([self.first_R, self.last_R]) >> 39).tolist())

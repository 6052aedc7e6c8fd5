"""Finds files by their ranges of ids, by bisection. All look-ups by id use it."""

from collections.abc import Iterable
from typing import Generic, TypeVar

import numpy as np

from pipeline.store.storage.file_refs import RowsFile

File = TypeVar("File", bound=RowsFile)


class FileRanges(Generic[File]):
    """Files in the order of their first ids. Their ranges may overlap.

    Made in one pass over the files. A look-up bisects: its cost does not grow with the files that it does not return.
    """

    def __init__(self, files: Iterable[File]) -> None:
        self.files = sorted(files, key=lambda file: file.first_id)
        self.first_F = np.array([file.first_id for file in self.files], np.int64)
        self.last_F = np.array([file.last_id for file in self.files], np.int64)
        self._reach_F = (
            np.maximum.accumulate(self.last_F) if self.files else self.last_F
        )  # ascending, so it is bisected

    def overlapping(self, first: int, last: int) -> list[File]:
        """The files whose ranges overlap the ids from `first` to `last`."""
        return [self.files[at] for at in self._near(first, last) if self.files[at].last_id >= first]

    def holding(self, ids_N: np.ndarray) -> list[tuple[File, slice]]:
        """The files that may hold some of these ids (int64 [N] ascending), each with the slice in its range."""
        if not len(ids_N):
            return []
        near = self._near(int(ids_N[0]), int(ids_N[-1]))
        start_F = np.searchsorted(ids_N, self.first_F[near.start : near.stop])
        stop_F = np.searchsorted(ids_N, self.last_F[near.start : near.stop], "right")
        return [
            (self.files[near.start + at], slice(int(start_F[at]), int(stop_F[at])))
            for at in np.flatnonzero(start_F < stop_F).tolist()
        ]

    def _near(self, first: int, last: int) -> range:
        begin = int(np.searchsorted(self._reach_F, first))
        return range(begin, max(begin, int(np.searchsorted(self.first_F, last, "right"))))

"""Counts the finished parts of a plan, and stops the run if too many images are rejected."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.embeddings.stages import Stages
from pipeline.errors import SourceError, UsageError
from pipeline.progress import OnProgress, Progress
from pipeline.store.segments.part_marks import DUPLICATE, PartMark, uncounted_parts
from pipeline.store.segments.reservations import Reservation
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.interface import Storage, released
from pipeline.store.tables.schemas import read_table

MAX_REJECTED = 0.05
REJECTS_REPORTED = 1_000  # a billion images can have millions of rejects; the files list all of them
REJECTS_ALLOWED = 10  # fewer rejects never stop a run without `max_rejected`


@dataclass(frozen=True)
class Reject:
    """An image that could not become an entry, or for which no decision was possible."""

    uri: str
    stage: str
    reason: str


def read_rejects(storage: Storage, files: Iterable[RowsFile]) -> tuple[Reject, ...]:
    """The first rejected images in some files, at most REJECTS_REPORTED."""
    tables = (_rejects_in(storage, file) for file in files)
    rows = (Reject(row["uri"], row["stage"], row["reason"]) for table in tables for row in table.to_pylist())
    return tuple(itertools.islice(rows, REJECTS_REPORTED))


def first_failure(storage: Storage, files: Iterable[RowsFile]) -> Reject:
    """The first rejected image in these files that is not a duplicate."""
    for file in files:
        table = _rejects_in(storage, file)
        for row in table.filter(pc.not_equal(table["stage"], DUPLICATE)).slice(0, 1).to_pylist():
            return Reject(row["uri"], row["stage"], row["reason"])
    raise AssertionError("there is one among the rejected that are no duplicates")


def _rejects_in(storage: Storage, file: RowsFile) -> pa.Table:
    with released(storage, file.path):
        return read_table(storage, file, ["uri", "stage", "reason"])


def check_max_rejected(share: float | None) -> None:
    """Raises UsageError if this is not a fraction."""
    if share is not None and not 0 <= share <= 1:
        raise UsageError(f"`max_rejected` {share} is not a share: give 0 to 1, such as 0.05")


class Tally:
    """Counts the finished parts of a run. It stops the run if too many images are rejected; finished parts remain.

    `max_rejected` is a fraction of the planned images. None means 5%, and fewer than REJECTS_ALLOWED never stop a run.
    `stage` is the name of the work in progress reports.
    """

    def __init__(
        self,
        storage: Storage,
        reservation: Reservation,
        marks: Iterable[PartMark],
        max_rejected: float | None,
        on_progress: OnProgress,
        stage: str = "embedding",
    ) -> None:
        self._storage = storage
        self._reservation = reservation
        self._max_rejected = max_rejected
        self._on_progress = on_progress
        self._stage = stage
        self._found = self._rejected = self.done = 0  # _found counts the images in containers
        self._archives_done = 0
        self._uncounted = uncounted_parts(storage, reservation)  # parts of containers of unknown size, not read yet
        self._last_rejected: RowsFile | None = None
        self.stages = Stages()  # seconds of this run
        for mark in marks:
            self._take(mark)
        self._tell()

    def count(self, mark: PartMark) -> None:
        """Count one more finished part. Raises SourceError if too many images are rejected."""
        self.stages.add(mark.seconds)
        self._take(mark)
        self._tell()

    def _take(self, mark: PartMark) -> None:
        self.done += mark.planned
        self._rejected += mark.num_rejected - mark.duplicates  # duplicates are not failures
        self._last_rejected = mark.rejected if mark.num_rejected > mark.duplicates else self._last_rejected
        if mark.part >= self._reservation.containers_from:
            self._found += mark.planned
            self._archives_done += self._reservation.num_containers_in(mark.part)
            self._uncounted.discard(mark.part)

    def _tell(self) -> None:
        planned = self._reservation.num_images(self._found)
        total = None if self._uncounted else planned  # each uncounted archive would change the total
        archives = self._archives_done, self._reservation.num_containers
        self._on_progress(Progress(self._stage, self.done, total, self._rejected, *archives))
        unfinished = self._rejected < self.done or self.done < planned  # if all were rejected, a later check reports it
        if self._last_rejected and unfinished and self._too_many(planned):
            reject = first_failure(self._storage, [self._last_rejected])
            raise SourceError(
                f"{self._rejected:,} of the first {self.done:,} images of {self._reservation.source} were rejected "
                f"(such as {reject.uri}: {reject.reason}), so the work was stopped, and keeps what is done: mend the "
                "source, or run the command again with a larger `max_rejected`"
            )

    def _too_many(self, planned: int) -> bool:
        if self._max_rejected is None:
            return self._rejected >= REJECTS_ALLOWED and self._rejected > MAX_REJECTED * planned
        return self._rejected > self._max_rejected * planned

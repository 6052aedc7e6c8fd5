"""Progress reports of long work to its caller. The library reports; the caller displays."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The progress of some work at one moment.

    `done` and `total` count rows of `stage`; `rejected` of the done rows could not become entries. `total` is None
    while it is unknown: before a listing ends, or while archives are still unread. In work on archives, `archives_done`
    of `archives` then show the progress (0 of 0 in other work).
    """

    stage: str
    done: int
    total: int | None
    rejected: int = 0
    archives_done: int = 0
    archives: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether `total` is known and all rows of the stage are done."""
        return self.total is not None and self.done >= self.total


OnProgress = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """A listener that does nothing."""

"""How long work tells its caller where it stands. The library reports; the caller draws."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One moment of a piece of work.

    `done` and `total` count rows of `stage`; `rejected` of the done ones could not become entries. `total` is None
    while nobody knows it: a listing has no end before it is reached, and an archive is counted by reading it. Then
    `archives_done` of `archives` say how far the work is, where it is about archives (0 of 0 where it is not).
    """

    stage: str
    done: int
    total: int | None
    rejected: int = 0
    archives_done: int = 0
    archives: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether the stage has reached an end that is known."""
        return self.total is not None and self.done >= self.total


OnProgress = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """The listener for callers who want none."""

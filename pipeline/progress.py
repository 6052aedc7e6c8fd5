"""How long work tells its caller where it stands. The library reports; the caller draws."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One moment of a piece of work.

    `done` and `total` count rows of `stage`, `total` is None while nobody knows it; `rejected` of the done ones could
    not become entries.
    """

    stage: str
    done: int
    total: int | None
    rejected: int = 0


OnProgress = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """The listener for callers who want none."""

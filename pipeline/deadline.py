"""Deadlines of questions. Long work checks its deadline between steps, so that no work is done for an unwanted answer.

A deadline is sent to another process as the remaining seconds, never as a time of day: the clocks of two machines
differ. The thread that answers a question holds its deadline (`held`). A call of `look` at any depth below raises
TooLate when the deadline is over. If no deadline is held (the library, the command line), `look` does nothing.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pipeline.errors import TooLate


class Deadline:
    """The time after which an answer is useless. Any thread may call `give_up`, which ends it at once."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._until = time.monotonic() + seconds
        self._given_up = False

    @property
    def left(self) -> float:
        """The remaining seconds; negative when the deadline is over."""
        return -1.0 if self._given_up else self._until - time.monotonic()

    def give_up(self) -> None:
        """End the deadline now, because nobody waits for the answer."""
        self._given_up = True

    def look(self) -> None:
        """Raises TooLate if the deadline is over."""
        if self.left < 0:
            raise TooLate("the question was not answered in time: ask for less at once, or give it more time")

    def __reduce__(self) -> tuple[type["Deadline"], tuple[float]]:
        return Deadline, (self.left,)


_HELD: ContextVar[tuple[Deadline, ...]] = ContextVar("HELD", default=())


@contextmanager
def set_deadline(*deadlines: Deadline) -> Iterator[None]:
    """In the block, `look` raises TooLate in this thread when the first of these deadlines is over."""
    before = _HELD.set((*_HELD.get(), *deadlines))
    try:
        yield
    finally:
        _HELD.reset(before)


def is_watched() -> bool:
    """Whether this thread holds a deadline."""
    return bool(_HELD.get())


def look() -> None:
    """Raises TooLate if a deadline of this thread is over. Long work must call it between steps."""
    for deadline in _HELD.get():
        deadline.look()

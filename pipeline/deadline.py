"""How long an answer is waited for. Long work looks at it between its steps, so that nothing is worked at for nobody.

A deadline travels between processes as the seconds that are left, never as a time of day: clocks of two machines
differ. Whoever carries a question out holds its deadline for as long; `look`, anywhere below, ends the work when it is
over. Where nothing is held (the library, the command line) `look` does nothing.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pipeline.errors import TooLate


class Deadline:
    """When an answer is of no use any more; `give_up` makes that now, from any thread."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._until = time.monotonic() + seconds
        self._given_up = False

    @property
    def left(self) -> float:
        """Seconds that are left, less than 0 when it is over."""
        return -1.0 if self._given_up else self._until - time.monotonic()

    def give_up(self) -> None:
        """End the work, as nobody waits for it."""
        self._given_up = True

    def look(self) -> None:
        """Raises TooLate when it is over."""
        if self.left < 0:
            raise TooLate("the question was not answered in time: ask for less at once, or give it more time")

    def __reduce__(self) -> tuple[type["Deadline"], tuple[float]]:
        return Deadline, (self.left,)


_HELD: ContextVar[tuple[Deadline, ...]] = ContextVar("HELD", default=())


@contextmanager
def held(*deadlines: Deadline) -> Iterator[None]:
    """Whatever this thread works at in the block ends when the first of these is over."""
    before = _HELD.set((*_HELD.get(), *deadlines))
    try:
        yield
    finally:
        _HELD.reset(before)


def is_watched() -> bool:
    """Whether this thread works at something that may end before it is done."""
    return bool(_HELD.get())


def look() -> None:
    """Raises TooLate where this thread works at what nobody waits for any more. To be called between steps."""
    for deadline in _HELD.get():
        deadline.look()

"""Reading while others write: a file that another process removed is told apart from a damaged one.

An erasure, `expire` and `compact` remove files that newer versions do not name. A reader may miss such a file. It then
starts again from the current versions.
"""

from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import DamagedFile, MemoryMissing

MAX_READS = 10

Seen = TypeVar("Seen")
Result = TypeVar("Result")


def steady(look: Callable[[], Seen], read: Callable[[Seen], Result]) -> Result:
    """Call `look`, then `read` with its result. Repeat both if `read` fails and the result of `look` has changed.

    Args:
        look: Returns what `read` depends on, such as the newest state or the retained versions. Results are compared
            with `==`.
        read: Reads from the result of `look`. It may be called several times.

    Raises:
        DamagedFile, MemoryMissing: `read` raised it, and `look` returned the same as before; or `read` raised it
            MAX_READS times, because other processes commit all the time.
    """
    seen = look()
    for left in reversed(range(MAX_READS)):
        try:
            return read(seen)
        except (DamagedFile, MemoryMissing):
            now = look()
            if now == seen or not left:
                raise
            seen = now
    raise AssertionError("MAX_READS is none")

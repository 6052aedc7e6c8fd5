"""Reading while others write: what went under a reader's hands is told from what is damaged.

An erasure, `expire` and `compact` remove files that newer versions do not name. Whoever reads meanwhile may miss one,
and finds what it asks for when it begins anew from what is there now.
"""

from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import DamagedFile, MemoryMissing

MAX_READS = 10

Seen = TypeVar("Seen")
Result = TypeVar("Result")


def steady(look: Callable[[], Seen], read: Callable[[Seen], Result]) -> Result:
    """Read from what is seen, and anew as long as others change that under the reader.

    Args:
        look: Sees what is there, such as the newest state or the versions that are kept. It is compared with `==`.
        read: Reads from what was seen. It may be called several times.

    Raises:
        DamagedFile, MemoryMissing: What `read` raised, if nothing has changed since it looked, or if it was raised
            MAX_READS times: where others commit all the time, something has always changed.
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

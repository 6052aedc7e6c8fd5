"""Work that takes its time, away from the event loop, so that what is quick is answered meanwhile."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pipeline.errors import Overloaded

THREADS = 2
MAX_WAITING = 64

Result = TypeVar("Result")


class Aside:
    """A few threads and a bounded queue for them."""

    def __init__(self, threads: int = THREADS, max_waiting: int = MAX_WAITING) -> None:
        self._pool = ThreadPoolExecutor(threads, "aside")
        self._max_waiting = max_waiting
        self._waiting = 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """What the work gives. Raises what it raises, and Overloaded where too much is waiting."""
        if self._waiting >= self._max_waiting:
            raise Overloaded("more large requests are waiting than can be worked at in time: ask again later")
        self._waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        future.add_done_callback(self._done)  # rather than here: what nobody waits for any more may run all the same
        return await future

    def _done(self, _: object) -> None:
        self._waiting -= 1

    def stop(self) -> None:
        """Take no more work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

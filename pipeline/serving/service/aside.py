"""Runs slow work outside the event loop, so that quick requests are answered meanwhile."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pipeline.errors import Overloaded

THREADS = 2
MAX_WAITING = 64

Result = TypeVar("Result")


class Aside:
    """A few threads with a bounded queue."""

    def __init__(self, threads: int = THREADS, max_waiting: int = MAX_WAITING) -> None:
        self._pool = ThreadPoolExecutor(threads, "aside")
        self._max_waiting = max_waiting
        self._waiting = 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of the work. Raises what the work raises, and Overloaded if too much is waiting."""
        if self._waiting >= self._max_waiting:
            raise Overloaded("more large requests are waiting than can be worked at in time: ask again later")
        self._waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        future.add_done_callback(self._done)  # not here: work that nobody waits for any more may still run
        return await future

    def _done(self, _: object) -> None:
        self._waiting -= 1

    def stop(self) -> None:
        """Accept no more work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

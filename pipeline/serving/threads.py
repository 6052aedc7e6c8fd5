"""Runs blocking calls in threads, so that the event loop goes on."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from pipeline.deadline import Deadline, set_deadline

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Threads:
    """A pool of threads. A call ends early, through its deadline, when its caller is cancelled."""

    def __init__(self, threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(threads)

    async def run(
        self, call: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Result:
        """The result of the call. If this coroutine is cancelled, `look` ends the call at its next step."""
        deadline = Deadline()

        def carry_out() -> Result:
            with set_deadline(deadline):
                return call(*arguments, **options)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, carry_out)
        except asyncio.CancelledError:
            deadline.give_up()
            raise

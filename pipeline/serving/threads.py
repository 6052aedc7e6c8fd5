"""Calls carried out by threads, while the event loop goes on."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from pipeline.deadline import Deadline, held

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Threads:
    """So many threads of its own. What is called is told by its deadline when nobody waits for it any more."""

    def __init__(self, threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(threads)

    async def run(
        self, call: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Result:
        """What the call returns. Where this is cancelled, `look` ends the call at its next step."""
        deadline = Deadline()

        def carry_out() -> Result:
            with held(deadline):
                return call(*arguments, **options)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, carry_out)
        except asyncio.CancelledError:
            deadline.give_up()
            raise

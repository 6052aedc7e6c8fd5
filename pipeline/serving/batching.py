"""Micro-batches: what arrives while a call is under way goes together in the next one.

Nothing waits for others to come: an item that finds no call under way goes at once and alone. Ray Serve's own
`serve.batch` works only inside of a replica and knows no deadline of a single item.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class MicroBatcher(Generic[Item, Result]):
    """Gathers items for `call`, which takes up to `max_items` and gives as many results, an exception for a failure.

    At most `calls_at_once` calls are under way. To be used from one event loop.
    """

    def __init__(
        self,
        call: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]],
        max_items: int,
        calls_at_once: int = 1,
    ) -> None:
        self._call = call
        self._max_items = max_items
        self._free = calls_at_once
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, item: Item) -> "asyncio.Future[Result]":
        """The result of an item, later. One that is cancelled before its turn costs nothing."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._free:
            self._free -= 1
            task = asyncio.get_running_loop().create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return future

    async def _work(self) -> None:
        try:
            while batch := self._next():
                await self._carry_out(batch)
        finally:
            self._free += 1

    def _next(self) -> list[tuple[Item, "asyncio.Future[Result]"]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._waiting and len(batch) < self._max_items:
            item, future = self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
        return batch

    async def _carry_out(self, batch: "list[tuple[Item, asyncio.Future[Result]]]") -> None:
        results: Sequence[Result | Exception]
        try:
            results = await self._call([item for item, _ in batch])
        except Exception as error:  # whatever it is, it is for those who wait to judge
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

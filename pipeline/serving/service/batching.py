"""Micro-batches: what arrives while a call is under way goes together in the next one.

Nothing waits for others to come: an item that finds no call under way goes at once and alone. Items come from parties
(a request is one), which take turns, so that one which asks much does not hold up one which asks little. Ray Serve's
own `serve.batch` works only inside of a replica and knows neither deadlines of single items nor turns.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class MicroBatcher(Generic[Item, Result]):
    """Gathers items for `call`, which takes up to `max_items` and gives as many results, an exception for a failure.

    The costs of those that go together come to no more than `max_cost`, but for one that is dearer alone. At most
    `calls_at_once` calls are under way; one whose items nobody waits for any more is cancelled. To be used from one
    event loop.
    """

    def __init__(
        self,
        call: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]],
        max_items: int,
        calls_at_once: int = 1,
        max_cost: float = float("inf"),
    ) -> None:
        self._call = call
        self._max_items = max_items
        self._max_cost = max_cost
        self._free = calls_at_once
        self._waiting: dict[Hashable, deque[tuple[Item, float, asyncio.Future[Result]]]] = {}  # the next party first
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def ask(self, item: Item, party: Hashable = None, cost: float = 1.0) -> "asyncio.Future[Result]":
        """The result of an item, later. One that is cancelled before its turn costs nothing."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(party, deque()).append((item, cost, future))
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
        """What goes together next: an item of each party in turn, as long as there is room."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        left = self._max_cost
        while self._waiting and len(batch) < self._max_items:
            party, items = next(iter(self._waiting.items()))
            item, cost, future = items[0]
            if not future.done():
                if batch and cost > left:
                    break
                batch.append((item, future))
                left -= cost
                self._waiting[party] = self._waiting.pop(party)  # it is the turn of the others
            items.popleft()
            if not items:
                del self._waiting[party]
        return batch

    async def _carry_out(self, batch: "list[tuple[Item, asyncio.Future[Result]]]") -> None:
        worker = asyncio.current_task()
        awaited, is_called, is_left = len(batch), True, False

        def let_go(_: "asyncio.Future[Result]") -> None:
            nonlocal awaited, is_left
            awaited -= 1
            if not awaited and is_called and worker is not None:
                is_left = True
                worker.cancel()

        for _, future in batch:
            future.add_done_callback(let_go)
        results: Sequence[Result | Exception]
        try:
            results = await self._call([item for item, _ in batch])
        except asyncio.CancelledError:
            if not is_left or worker is None:
                raise
            worker.uncancel()
            return
        except Exception as error:  # whatever it is, it is for those who wait to judge
            results = [error] * len(batch)
        finally:
            is_called = False
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

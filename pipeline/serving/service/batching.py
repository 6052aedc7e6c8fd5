"""Micro-batches: items that arrive while a call is under way go into the next call together.

No item waits for others to arrive: if a call is free, the item goes at once and alone. Items belong to parties (a
request is a party). Parties take turns, so that a large request does not delay a small one. Ray Serve's own
`serve.batch` works only inside a replica, and supports neither deadlines of single items nor turns.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class MicroBatcher(Generic[Item, Result]):
    """Gathers items for `call`, which takes up to `max_items` and returns as many results (an exception for a failure).

    The total cost of a batch is at most `max_cost`; an item that costs more goes alone. At most `calls_at_once` calls
    are under way. A call is cancelled once nobody waits for any of its items. Use it from one event loop only.
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
        self._waiting: dict[Hashable, deque[tuple[Item, float, asyncio.Future[Result]]]] = {}  # next party first
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def ask(self, item: Item, party: Hashable = None, cost: float = 1.0) -> "asyncio.Future[Result]":
        """A future with the result of an item. An item that is cancelled before its turn costs nothing."""
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
        """The next batch: an item of each party in turn, while there is room."""
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
                self._waiting[party] = self._waiting.pop(party)  # moved to the end: the others come first
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
        except Exception as error:  # the callers that wait decide what to do about it
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

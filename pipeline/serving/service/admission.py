"""Limits what is under way at once. Small parties enter at once, large ones wait until there is room.

A party is a request. The total that it has under way makes it small or large. A list of many small questions is
therefore large, like one large question.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

from pipeline.deadline import Deadline
from pipeline.errors import Overloaded

SHARE_OF_LARGE = 0.75  # of the room; the rest is reserved for small parties


class Room:
    """Room for `limit` units at once. A party is small while it has at most `small` units under way.

    Use it from one event loop only. An amount larger than the room runs alone.
    """

    def __init__(self, limit: int, small: int, what: str) -> None:
        self._limit = limit
        self._small = small
        self._what = what
        self._under_way = 0
        self._large = 0
        self._parties: dict[Hashable, int] = {}
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def taken(self, amount: int, party: Hashable, deadline: Deadline) -> AsyncIterator[None]:
        """Hold room during the block. Raises Overloaded: at once if small, at the deadline if large."""
        mine = self._parties.get(party, 0) + amount
        is_large = mine > self._small
        self._parties[party] = mine
        try:
            if is_large:
                await self._until_there_is_room(amount, deadline)
            elif self._under_way and self._under_way + amount > self._limit:
                raise self._overloaded()
            else:
                self._under_way += amount
            try:
                yield
            finally:
                self._under_way -= amount
                self._large -= amount * is_large
                self._let_in()
        finally:
            self._parties[party] -= amount
            if not self._parties[party]:
                del self._parties[party]

    async def _until_there_is_room(self, amount: int, deadline: Deadline) -> None:
        if not self._waiting and self._fits(amount):
            self._enter(amount)
            return
        let_in: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = amount, let_in
        self._waiting.append(place)
        try:
            await asyncio.wait_for(asyncio.shield(let_in), max(deadline.left, 0))
        except BaseException as error:
            if let_in.done():  # it was admitted at the same moment
                self._under_way -= amount
                self._large -= amount
            else:
                self._waiting.remove(place)
            self._let_in()
            if isinstance(error, TimeoutError):
                raise self._overloaded() from None
            raise

    def _fits(self, amount: int) -> bool:
        return not self._under_way or (
            self._large + amount <= self._limit * SHARE_OF_LARGE and self._under_way + amount <= self._limit
        )

    def _enter(self, amount: int) -> None:
        self._under_way += amount
        self._large += amount

    def _let_in(self) -> None:
        """Admit the waiting parties in their order, while they fit."""
        while self._waiting and self._fits(self._waiting[0][0]):
            amount, let_in = self._waiting.popleft()
            self._enter(amount)
            let_in.set_result(None)

    def _overloaded(self) -> Overloaded:
        return Overloaded(f"{self._under_way:,} {self._what} are under way already: ask again later", 1.0)

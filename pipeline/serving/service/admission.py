"""Room for what is under way at once: what is small goes first, and what is large waits for its share.

A party is a request. What it has under way together makes it small or large, so that a list of many small questions is
large, as one large question is.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

from pipeline.deadline import Deadline
from pipeline.errors import Overloaded

SHARE_OF_LARGE = 0.75  # of the room: the rest is for small ones, however many large ones wait


class Room:
    """Room for `limit` of something, of which a party is small as long as it has no more than `small` under way.

    To be used from one event loop. What is larger than the room goes alone.
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
        """Hold room in the block. Raises Overloaded: at once for what is small, when time is over for what is large."""
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
            if let_in.done():  # it was let in just then
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
        """Let in those who wait, in their order."""
        while self._waiting and self._fits(self._waiting[0][0]):
            amount, let_in = self._waiting.popleft()
            self._enter(amount)
            let_in.set_result(None)

    def _overloaded(self) -> Overloaded:
        return Overloaded(f"{self._under_way:,} {self._what} are under way already: ask again later", 1.0)

"""Micro-batches: what waits goes together, nothing waits without need, and a failure is everybody's own."""

import asyncio
from collections.abc import Sequence

import pytest

from pipeline.serving.service.batching import MicroBatcher


def test_what_comes_while_a_call_is_under_way_goes_together() -> None:
    async def run() -> None:
        batches: list[list[int]] = []
        go_on = asyncio.Event()

        async def call(items: Sequence[int]) -> list[int | Exception]:
            batches.append([*items])
            await go_on.wait()
            return [ValueError("odd") if item % 2 else item * 10 for item in items]

        queue = MicroBatcher[int, int](call, max_items=4)
        futures = [queue.ask(item) for item in range(7)]
        await asyncio.sleep(0)
        assert batches == [[0, 1, 2, 3]]
        futures[5].cancel()
        go_on.set()
        await asyncio.wait(futures)
        assert batches == [[0, 1, 2, 3], [4, 6]]
        assert [future.result() for future in futures[::2]] == [0, 20, 40, 60]
        for future in (futures[1], futures[3]):
            with pytest.raises(ValueError, match="odd"):
                future.result()
        assert len(queue) == 0
        assert await queue.ask(8) == 80

    asyncio.run(run())


def test_a_call_that_fails_fails_for_those_in_it() -> None:
    async def run() -> None:
        async def call(items: Sequence[int]) -> list[int]:
            if 1 in items:
                raise ConnectionError("gone")
            return [*items]

        queue = MicroBatcher[int, int](call, max_items=1, calls_at_once=2)
        results = await asyncio.gather(*(queue.ask(item) for item in range(3)), return_exceptions=True)
        assert (results[0], results[2]) == (0, 2)
        assert isinstance(results[1], ConnectionError)

    asyncio.run(run())


def test_parties_take_turns_and_costs_are_bounded() -> None:
    async def run() -> None:
        batches: list[list[str]] = []
        go_on = asyncio.Event()

        async def call(items: Sequence[str]) -> list[str]:
            batches.append([*items])
            await go_on.wait()
            return [*items]

        queue = MicroBatcher[str, str](call, max_items=8, max_cost=4)
        first = queue.ask("first", "hog", 10)  # dearer than allowed: it goes alone
        await asyncio.sleep(0)
        others = [queue.ask(f"hog {number}", "hog", 3) for number in range(3)]
        others += [queue.ask(f"small {number}", f"client {number}") for number in range(2)]
        go_on.set()
        await asyncio.wait([first, *others])
        assert batches == [["first"], ["hog 0", "small 0"], ["small 1", "hog 1"], ["hog 2"]]

    asyncio.run(run())


def test_a_call_that_nobody_waits_for_is_cancelled() -> None:
    async def run() -> None:
        ended: list[str] = []

        async def call(items: Sequence[str]) -> list[str]:
            try:
                await asyncio.sleep(60 if "slow" in items else 0)
            except asyncio.CancelledError:
                ended.extend(items)
                raise
            return [*items]

        queue = MicroBatcher[str, str](call, max_items=2)
        slow, beside = queue.ask("slow"), queue.ask("beside")
        await asyncio.sleep(0.01)
        slow.cancel()
        await asyncio.sleep(0.01)
        assert not ended  # one still waits
        beside.cancel()
        after = await asyncio.wait_for(queue.ask("after"), 5)
        assert (ended, after) == (["slow", "beside"], "after")

    asyncio.run(run())

"""Work that goes on only while the client waits for it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

Result = TypeVar("Result")


async def gone(request: Request) -> None:
    """Ends when the client has left. To be waited for once the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def while_waited_for(request: Request, working: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives. It is cancelled, and ClientDisconnect raised, when the client leaves."""
    work, left = asyncio.ensure_future(working), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait([work, left], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        left.result()  # it may have sent too much rather than have left
        raise ClientDisconnect
    finally:
        for task in (work, left):
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody waits for it
            task.cancel()

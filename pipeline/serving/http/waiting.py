"""Work that continues only while the client waits for it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

Result = TypeVar("Result")


async def client_left(request: Request) -> None:
    """Ends when the client has left. Await it only after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def while_waited_for(request: Request, working: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work. If the client leaves, cancels the work and raises ClientDisconnect."""
    worker = asyncio.current_task()
    assert worker is not None  # noqa: S101  # a request is a task
    left = asyncio.ensure_future(client_left(request))
    is_left = False

    def end(_: "asyncio.Task[None]") -> None:
        nonlocal is_left
        is_left = True
        worker.cancel()

    left.add_done_callback(end)
    try:
        return await working
    except asyncio.CancelledError:
        if not is_left:
            raise
        worker.uncancel()
        left.result()  # raises if the client sent too much instead of leaving
        raise ClientDisconnect from None
    finally:
        left.remove_done_callback(end)
        left.cancel()

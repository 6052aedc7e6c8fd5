"""Calls a deployment as the ingress does, leaves, and prints how long after that the work of the replica ended."""

import asyncio
import time
from pathlib import Path

import ray
from ray import serve

from jobs.ray_cluster.on_ray import start_ray
from pipeline.deadline import look
from pipeline.serving.application import _Remote
from pipeline.serving.threads import Threads

LIMIT_SECONDS = 20.0


@serve.deployment
class Working:
    """Works for as long as somebody waits."""

    def __init__(self) -> None:
        self._threads = Threads()

    async def work(self, begun: str, ended: str) -> None:
        await self._threads.run(self._work, Path(begun), Path(ended))

    def _work(self, begun: Path, ended: Path) -> None:
        begun.touch()
        until = time.monotonic() + LIMIT_SECONDS
        try:
            while time.monotonic() < until:
                time.sleep(0.02)
                look()
        finally:
            ended.touch()


async def seconds_until_it_ended(folder: Path) -> float:
    remote = _Remote(serve.get_app_handle("working"))
    begun, ended = folder / "begun", folder / "ended"
    call = asyncio.ensure_future(remote._once("work", str(begun), str(ended)))
    await _appears(begun)
    call.cancel()
    left = time.monotonic()
    await _appears(ended)
    return time.monotonic() - left


async def _appears(path: Path) -> None:
    until = time.monotonic() + 2 * LIMIT_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise TimeoutError(path)
        await asyncio.sleep(0.01)


def main(folder: str) -> None:
    """What the test runs in a process of its own, with `set_defaults` called before this module is imported."""
    start_ray()
    serve.start(proxy_location="Disabled")
    serve.run(Working.bind(), name="working")  # type: ignore[attr-defined]
    print("ended after", asyncio.run(seconds_until_it_ended(Path(folder))))
    ray.shutdown()

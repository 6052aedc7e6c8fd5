"""The queue between the images of many requests and the encoder. It measures them before decoding, and enforces limits.

The headers of its images show what a request costs (images/decoding/passes.py). Requests with large images wait in a
lane of their own, so that they do not delay small ones. All code here runs on one event loop.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from pipeline.errors import Overloaded, SourceError, Unavailable, VisualMemoryError
from pipeline.images.decoding.decode import Rejected, Work, work_of
from pipeline.serving.service.batching import MicroBatcher
from pipeline.serving.service.group_clients import CALLERS_FAULT, CALLS_AT_ONCE

IMAGES_A_CALL = 32
LARGE_AT_ONCE = 4  # images of large requests in a call: the slowest one delays the others
LARGE_PIXELS = 16_000_000  # the cost of all images of a request; a photograph of most cameras costs less
_MEASURED_HERE_BYTES = 1 << 20  # images up to this size are measured on the event loop, in less than 1 ms

Waiting = tuple[bytes, float]  # an image, and the moment from which nobody waits for it any more


class EncoderClient(Protocol):
    """Embeds images."""

    async def embed(
        self, images: Sequence[bytes], seconds: float | None = None, *, apart: bool = False
    ) -> Sequence[np.ndarray | VisualMemoryError]:
        """For each image a vector (float32 [D], unit length) or the error; within `seconds`, if given.

        With `apart` they are decoded where they do not delay other images.
        """


class ImageLimits(Protocol):
    """The limits of images; see `service.Limits`."""

    @property
    def images(self) -> int: ...

    @property
    def image_pixels(self) -> int: ...

    @property
    def request_pixels(self) -> int: ...

    @property
    def pixels(self) -> int: ...


def works_of(images: Sequence[bytes], limits: ImageLimits) -> list[Work]:
    """The work of decoding each image. Raises SourceError if one image, or all together, are too large."""
    works: list[Work] = []
    for position, image in enumerate(images):
        which = f" (number {position + 1} of {len(images)})" if len(images) > 1 else ""
        try:
            work = work_of(image)
        except Rejected as rejected:
            raise SourceError(f"the image cannot be used ({rejected.reason}): send another{which}") from None
        if work.pixels > limits.image_pixels:
            raise SourceError(
                f"the image has {work.width:,} x {work.height:,} pixels, and {limits.image_pixels:,} are taken: "
                f"send it smaller{which}"
            )
        works.append(work)
    cost = sum(work.cost for work in works)
    if cost > limits.request_pixels:
        what = "has the work of" if len(works) == 1 else f"and {len(works) - 1:,} others have the work of"
        raise SourceError(
            f"the image {what} {cost:,} pixels to decode, and {limits.request_pixels:,} are taken in one request: send "
            "smaller images, or fewer at once"
        )
    return works


class _Lane:
    """A queue of images for the encoder, with their number and cost."""

    def __init__(self, encoder: EncoderClient, *, apart: bool) -> None:
        self.images = 0
        self.cost = 0
        self.seconds_an_image = 0.0
        self._encoder = encoder
        self._apart = apart
        self.queue = MicroBatcher[Waiting, np.ndarray](
            self._embed, LARGE_AT_ONCE if apart else IMAGES_A_CALL, CALLS_AT_ONCE
        )

    async def _embed(self, waiting: Sequence[Waiting]) -> Sequence[np.ndarray | Exception]:
        began = time.monotonic()
        seconds = max(max(until for _, until in waiting) - began, 0.0)
        vectors = await self._encoder.embed([image for image, _ in waiting], seconds, apart=self._apart)
        took = (time.monotonic() - began) / len(waiting)
        self.seconds_an_image = 0.9 * (self.seconds_an_image or took) + 0.1 * took
        return vectors


class ImageQueue:
    """Admits images, and passes them to the encoder in batches."""

    def __init__(self, encoder: EncoderClient, limits: ImageLimits) -> None:
        self._limits = limits
        self._small, self._large = _Lane(encoder, apart=False), _Lane(encoder, apart=True)
        self._measuring = ThreadPoolExecutor(1, thread_name_prefix="measure")

    async def embed(self, images: Sequence[bytes], timeout: float) -> np.ndarray:
        """The vectors (float32 [Q, D]) of image files, given as bytes.

        Raises SourceError naming the first unusable image, Overloaded, and Unavailable if it takes longer than
        `timeout` seconds.
        """
        until = time.monotonic() + timeout
        cost = sum(work.cost for work in await self._measured(images))
        lane = self._large if cost > LARGE_PIXELS else self._small
        self._admit(lane, len(images), cost, timeout)
        lane.images += len(images)
        lane.cost += cost
        futures = [lane.queue.ask((image, until)) for image in images]
        try:
            _, late = await asyncio.wait(futures, timeout=until - time.monotonic())
        finally:
            lane.images -= len(images)
            lane.cost -= cost
            for future in futures:
                if not future.done():
                    future.cancel()
        if late:
            raise Unavailable(f"the image was not embedded within {timeout:g} s: ask again later")
        errors = [future.exception() for future in futures]
        for position, error in enumerate(errors):
            if isinstance(error, CALLERS_FAULT):
                which = f" (number {position + 1} of {len(images)})" if len(images) > 1 else ""
                raise type(error)(f"{error}{which}")
            if isinstance(error, Unavailable):
                raise error
            if error is not None:
                raise Unavailable("the image could not be embedded just now: ask again") from error
        return np.stack([future.result() for future in futures])

    async def _measured(self, images: Sequence[bytes]) -> list[Work]:
        if sum(map(len, images)) <= _MEASURED_HERE_BYTES:
            return works_of(images, self._limits)
        return await asyncio.get_running_loop().run_in_executor(self._measuring, works_of, images, self._limits)

    def _admit(self, lane: _Lane, num_images: int, cost: int, timeout: float) -> None:
        """Raise Overloaded for images that would wait too long. An idle lane accepts any request."""
        images = self._small.images + self._large.images + num_images
        most = self._limits.request_pixels if lane is self._large else self._limits.pixels
        expected = lane.images * lane.seconds_an_image / CALLS_AT_ONCE
        if lane.images and (images > self._limits.images or lane.cost + cost > most or expected > timeout):
            raise Overloaded(
                "more images are waiting than can be embedded in time: ask again later", max(expected, 1.0)
            )

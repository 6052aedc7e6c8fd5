"""Decodes the images of a source to batches of pixels in order, several batches ahead of the consumer.

This module decodes in threads of this process; `on_ray.py` decodes in tasks on other nodes. Both cut the same batches
and return the same bits.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import numpy as np

from pipeline.embeddings.apart import pixels_here_or_apart
from pipeline.embeddings.pixels import ImageFacts
from pipeline.images.containers.items import Item
from pipeline.images.decoding.decode import Rejected
from pipeline.images.reading.files import is_remote, read_file
from pipeline.store.tables.identity import Preprocessing

BATCHES_AHEAD = 2
BYTES_AHEAD = 256 << 20  # bytes of files from containers that wait to be decoded
FETCHES_AT_ONCE = 32  # fetches of remote files at once; most of their time is waiting

Drawn = TypeVar("Drawn")
Begun = TypeVar("Begun")

_Read = tuple[bytes | Rejected, float]  # the bytes of a file or why it was rejected, and the seconds it took


@dataclass(frozen=True)
class BatchForm:
    """The form of a batch: the number of images, their preprocessing, and whether they get thumbnails."""

    batch_size: int
    preprocessing: Preprocessing
    thumbnails: bool = False


@dataclass(frozen=True)
class DecodedBatch:
    """Consecutive images: pixels uint8 [B, S, S, 3], and for each item its ImageFacts or why it was rejected.

    Pixels are black for rejected images, and after the last image of a source. `reading` and `decoding` are seconds
    summed over all threads. `node` names the node that decoded the batch (None: this process).
    """

    items: list[Item]
    pixels_BSS3: np.ndarray
    images: list[ImageFacts | Rejected]
    reading: float
    decoding: float
    node: str | None = None


class Decoding(Protocol):
    """A source of decoded batches."""

    def batches(self, items: Iterable[Item], form: BatchForm) -> Generator[DecodedBatch]:
        """Decode items in order. The last batch can have fewer items. Raises what `items` raises, and StorageError."""


def begin_ahead(
    items: Iterable[Drawn], batch_size: int, begin: Callable[[list[Drawn]], Begun], num_ahead: int
) -> Generator[tuple[list[Drawn], Begun, float]]:
    """Yield each batch of items, the result of `begin` for it, and the seconds that drawing the batch took.

    One separate thread draws the batches and calls `begin`, at most `num_ahead` batches before the caller asks.
    """
    rest = iter(items)

    def next_batch() -> tuple[list[Drawn], Begun, float] | None:
        began = time.perf_counter()
        batch = list(itertools.islice(rest, batch_size))
        took = time.perf_counter() - began
        return (batch, begin(batch), took) if batch else None

    with ExitStack() as stack:
        drawing = _pool(stack, 1, "read")
        ahead = deque(drawing.submit(next_batch) for _ in range(num_ahead + 1))
        while (found := ahead.popleft().result()) is not None:
            ahead.append(drawing.submit(next_batch))
            yield found


class Threads:
    """Decodes with `num_threads` threads of this process; further threads fetch remote files."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads

    def batches(self, items: Iterable[Item], form: BatchForm) -> Generator[DecodedBatch]:
        """Decode batches, a few ahead. The items that come back no longer hold bytes."""
        with ExitStack() as stack:
            fetching, decoding = _pool(stack, FETCHES_AT_ONCE, "fetch"), _pool(stack, self._num_threads, "decode")

            def begun_items() -> Generator[tuple[Item, Future[_Loaded], np.ndarray]]:
                """Start decoding each item as soon as it is drawn: a batch of large files is never held as a whole."""
                held = _HeldBytes(BYTES_AHEAD)
                pixels_BSS3 = _black(form)
                for position, item in enumerate(items):
                    row = position % form.batch_size
                    pixels_BSS3 = pixels_BSS3 if row else _black(form)
                    fetched = fetching.submit(_read, item.uri) if _is_elsewhere(item) else None
                    num_bytes = len(item.content) if isinstance(item.content, bytes) else 0
                    held.take(num_bytes)
                    future = decoding.submit(_load, item, fetched, form, pixels_BSS3[row])
                    future.add_done_callback(partial(held.give, num_bytes))
                    yield (replace(item, content=None) if num_bytes else item), future, pixels_BSS3

            begun = begin_ahead(begun_items(), form.batch_size, lambda _: None, BATCHES_AHEAD)
            for batch, _, took in stack.enter_context(closing(begun)):
                loaded = [future.result() for _, future, _ in batch]
                yield DecodedBatch(
                    [item for item, _, _ in batch],
                    batch[0][2],
                    [each.image for each in loaded],
                    took + sum(each.reading for each in loaded),
                    sum(each.decoding for each in loaded),
                )


def _black(form: BatchForm) -> np.ndarray:
    crop = form.preprocessing.crop
    return np.zeros((form.batch_size, crop, crop, 3), np.uint8)


class _HeldBytes:
    """Limits the bytes of files that wait to be decoded to `most`, or to one file if that is larger."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> None:
        """Wait until these bytes fit in the limit, then count them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + num_bytes <= self._most)
            self._held += num_bytes

    def give(self, num_bytes: int, _: "Future[_Loaded]") -> None:
        """Release bytes that were decoded, or whose decoding was cancelled."""
        with self._changed:
            self._held -= num_bytes
            self._changed.notify_all()


@dataclass(frozen=True)
class _Loaded:
    """The ImageFacts of an image whose pixels are in the batch, or why it was rejected, and the seconds it took."""

    image: ImageFacts | Rejected
    reading: float
    decoding: float


def _pool(stack: ExitStack, threads: int, name: str) -> ThreadPoolExecutor:
    """A thread pool that the stack shuts down when it closes; tasks that still wait are cancelled."""
    executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
    stack.callback(executor.shutdown, wait=True, cancel_futures=True)
    return executor


def _load(item: Item, fetched: Future[_Read] | None, form: BatchForm, pixels_SS3: np.ndarray) -> _Loaded:
    """Decode an image into its row of a batch."""
    if item.content is not None:
        data, reading = item.content, 0.0
    else:
        data, reading = fetched.result() if fetched else _read(item.uri)
    began = time.perf_counter()
    image: ImageFacts | Rejected
    try:
        if isinstance(data, Rejected):
            raise data
        loaded = pixels_here_or_apart(data, form.preprocessing, thumbnails=form.thumbnails)
        pixels_SS3[:] = loaded.pixels_SS3
        image = loaded.facts
    except Rejected as rejected:
        image = Rejected(rejected.stage, rejected.reason)  # the traceback of the original would hold the file's bytes
    return _Loaded(image, reading, time.perf_counter() - began)


def _read(uri: str) -> _Read:
    began = time.perf_counter()
    try:
        return read_file(uri), time.perf_counter() - began
    except Rejected as rejected:
        return rejected, time.perf_counter() - began


def _is_elsewhere(item: Item) -> bool:
    return item.content is None and is_remote(item.uri)

"""Images of a source to batches of pixels in order, several batches ahead of whoever takes them.

Threads of this process do it here; `on_ray.py` has it done by tasks on other nodes. Both cut the same batches and give
the same bits.
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
BYTES_AHEAD = 256 << 20  # of files out of containers that wait to be decoded
FETCHES_AT_ONCE = 32  # of remote files, most of whose time is waiting

Drawn = TypeVar("Drawn")
Begun = TypeVar("Begun")

_Read = tuple[bytes | Rejected, float]  # the bytes of a file or why there are none, and the seconds it took


@dataclass(frozen=True)
class BatchForm:
    """What batches are made of: so many images of this preprocessing, with thumbnails if asked for."""

    batch_size: int
    preprocessing: Preprocessing
    thumbnails: bool = False


@dataclass(frozen=True)
class DecodedBatch:
    """Consecutive images: pixels uint8 [B, S, S, 3], and for each item its facts or why it was rejected.

    Pixels are black where an image was rejected, and behind the last of a source. `reading` and `decoding` are the
    seconds of all threads; `node` is where it was decoded, None for the process that asked.
    """

    items: list[Item]
    pixels_BSS3: np.ndarray
    images: list[ImageFacts | Rejected]
    reading: float
    decoding: float
    node: str | None = None


class Decoding(Protocol):
    """Something that gives decoded batches."""

    def batches(self, items: Iterable[Item], form: BatchForm) -> Generator[DecodedBatch]:
        """The items in order, the last batch shorter. Raises what `items` raises, and StorageError."""


def begin_ahead(
    items: Iterable[Drawn], batch_size: int, begin: Callable[[list[Drawn]], Begun], num_ahead: int
) -> Generator[tuple[list[Drawn], Begun, float]]:
    """Each batch of items, what `begin` made of it, and the seconds it took to draw it.

    Both happen in a thread of their own, `num_ahead` batches before they are asked for, never more.
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
    """Decoding by `num_threads` threads of this process; more of them fetch what lies elsewhere."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads

    def batches(self, items: Iterable[Item], form: BatchForm) -> Generator[DecodedBatch]:
        """Decoded batches, a few ahead. Their items have no bytes any more."""
        with ExitStack() as stack:
            fetching, decoding = _pool(stack, FETCHES_AT_ONCE, "fetch"), _pool(stack, self._num_threads, "decode")

            def begun_items() -> Generator[tuple[Item, Future[_Loaded], np.ndarray]]:
                """Each is begun as soon as it is drawn, so that no batch of large files is ever held whole."""
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
    """Bytes of files that wait to be decoded, at most so many, or one file."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> None:
        """Wait until there is room."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + num_bytes <= self._most)
            self._held += num_bytes

    def give(self, num_bytes: int, _: "Future[_Loaded]") -> None:
        """Make room: they are decoded, or will not be."""
        with self._changed:
            self._held -= num_bytes
            self._changed.notify_all()


@dataclass(frozen=True)
class _Loaded:
    """What is known of an image whose pixels are in their place, or why there are none, and the seconds it took."""

    image: ImageFacts | Rejected
    reading: float
    decoding: float


def _pool(stack: ExitStack, threads: int, name: str) -> ThreadPoolExecutor:
    """Threads that are ended with the stack; what still waits for them then is given up."""
    executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
    stack.callback(executor.shutdown, wait=True, cancel_futures=True)
    return executor


def _load(item: Item, fetched: Future[_Read] | None, form: BatchForm, pixels_SS3: np.ndarray) -> _Loaded:
    """Decode an image into its place in a batch."""
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
        image = Rejected(rejected.stage, rejected.reason)  # its own traceback would hold the bytes of the file
    return _Loaded(image, reading, time.perf_counter() - began)


def _read(uri: str) -> _Read:
    began = time.perf_counter()
    try:
        return read_file(uri), time.perf_counter() - began
    except Rejected as rejected:
        return rejected, time.perf_counter() - began


def _is_elsewhere(item: Item) -> bool:
    return item.content is None and is_remote(item.uri)

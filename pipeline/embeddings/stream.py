"""Images of a source to vectors in order: fetching and decoding of the next batches go on while the model works on one.

Batches are cut by position and have one fixed size: an image that cannot be read keeps its place, and the last batch is
filled up, with black pixels whose vectors are thrown away. So a vector depends neither on which of its neighbours were
readable nor on the number of threads (oneDNN picks other convolutions, and other last bits, for small batches).
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.preprocessing import pixels_of
from pipeline.embeddings.stages import Stages
from pipeline.images.decode import Rejected, decode
from pipeline.images.files import is_remote, read_file
from pipeline.images.items import Item
from pipeline.images.thumbnails import thumbnail
from pipeline.store.identity import Preprocessing

BATCHES_AHEAD = 2
FETCHES_AT_ONCE = 32  # of remote files, most of whose time is waiting


@dataclass(frozen=True)
class ImageFacts:
    """What an entry keeps of its image file; width and height in pixels as displayed, the thumbnail if asked for."""

    sha256: str
    width: int
    height: int
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class Pixels:
    """One image ready for the encoder: uint8 [S, S, 3]."""

    pixels_SS3: np.ndarray
    facts: ImageFacts


@dataclass(frozen=True)
class EmbeddedBatch:
    """Consecutive images: vectors float32 [B, D], and for each item its facts or why it was rejected.

    The vector of a rejected image means nothing.
    """

    vectors_BD: np.ndarray
    items: list[Item]
    images: list[ImageFacts | Rejected]


@dataclass(frozen=True)
class _Loaded:
    """An image decoded, or why it was not, and the seconds that reading and decoding took."""

    image: Pixels | Rejected
    reading: float
    decoding: float


def pixels_of_bytes(data: bytes, preprocessing: Preprocessing, *, thumbnails: bool = False) -> Pixels:
    """Decode, resize and crop the bytes of an image file. Raises Rejected."""
    decoded = decode(data)
    width, height = decoded.image.size
    small = thumbnail(decoded.image) if thumbnails else None
    return Pixels(pixels_of(decoded.image, preprocessing), ImageFacts(decoded.sha256, width, height, small))


def embed_items(
    encoder: Encoder,
    items: Iterable[Item],
    num_threads: int,
    *,
    thumbnails: bool = False,
    stages: Stages | None = None,
) -> Iterator[EmbeddedBatch]:
    """Embed images in order, in batches of the encoder's size, with `num_threads` threads decoding.

    `items` is drawn from in a thread of its own, a few batches ahead. What each stage takes is added to `stages`.
    Raises what `items` raises, and StorageError.
    """
    stages = stages or Stages()
    with ExitStack() as stack:

        def pool(threads: int, name: str) -> ThreadPoolExecutor:
            executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
            stack.callback(executor.shutdown, wait=True, cancel_futures=True)
            return executor

        fetching, decoding = pool(FETCHES_AT_ONCE, "fetch"), pool(num_threads, "decode")
        reading = pool(1, "read")  # shut down first: it gives work to the others
        rest = iter(items)

        def decoded(data: bytes | Rejected, reading: float) -> _Loaded:
            began = time.perf_counter()
            image: Pixels | Rejected
            try:
                image = (
                    data
                    if isinstance(data, Rejected)
                    else pixels_of_bytes(data, encoder.identity.pixels, thumbnails=thumbnails)
                )
            except Rejected as rejected:
                image = rejected
            return _Loaded(image, reading, time.perf_counter() - began)

        def load(item: Item, fetched: Future[tuple[bytes | Rejected, float]] | None) -> _Loaded:
            if item.content is not None:
                return decoded(item.content, 0.0)
            return decoded(*(fetched.result() if fetched else _read(item.uri)))

        def next_batch() -> tuple[list[Item], list[Future[_Loaded]], float]:
            began = time.perf_counter()
            batch = list(itertools.islice(rest, encoder.batch_size))
            took = time.perf_counter() - began
            remote = [item.content is None and is_remote(item.uri) for item in batch]
            fetched = [
                fetching.submit(_read, item.uri) if far else None for item, far in zip(batch, remote, strict=True)
            ]
            return batch, [decoding.submit(load, *pair) for pair in zip(batch, fetched, strict=True)], took

        ahead = deque(reading.submit(next_batch) for _ in range(BATCHES_AHEAD + 1))
        while True:
            began = time.perf_counter()
            batch, futures, took = ahead.popleft().result()
            if not batch:
                return
            ahead.append(reading.submit(next_batch))
            loaded = [future.result() for future in futures]
            waited = time.perf_counter()
            embedded = _embedded(encoder, batch, loaded)
            stages.waiting += waited - began
            stages.model += time.perf_counter() - waited
            stages.reading += took + sum(each.reading for each in loaded)
            stages.decoding += sum(each.decoding for each in loaded)
            yield embedded


def _read(uri: str) -> tuple[bytes | Rejected, float]:
    began = time.perf_counter()
    try:
        return read_file(uri), time.perf_counter() - began
    except Rejected as rejected:
        return rejected, time.perf_counter() - began


def _embedded(encoder: Encoder, items: list[Item], loaded: list[_Loaded]) -> EmbeddedBatch:
    crop = encoder.identity.pixels.crop
    batch_BSS3 = np.zeros((encoder.batch_size, crop, crop, 3), np.uint8)
    images: list[ImageFacts | Rejected] = []
    for row, each in enumerate(loaded):
        if isinstance(each.image, Pixels):
            batch_BSS3[row] = each.image.pixels_SS3
            images.append(each.image.facts)
        else:
            images.append(each.image)
    return EmbeddedBatch(encoder.embed(batch_BSS3)[: len(images)], items, images)

"""Images of a source to vectors in order: fetching and decoding of the next batches go on while the model works on one.

Batches are cut by position and have one fixed size: an image that cannot be read keeps its place, and the last batch is
filled up, with black pixels whose vectors are thrown away. So a vector depends neither on which of its neighbours were
readable nor on the number of threads (oneDNN picks other convolutions, and other last bits, for small batches).
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.preprocessing import pixels_of
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


def pixels_of_bytes(data: bytes, preprocessing: Preprocessing, *, thumbnails: bool = False) -> Pixels:
    """Decode, resize and crop the bytes of an image file. Raises Rejected."""
    decoded = decode(data)
    width, height = decoded.image.size
    small = thumbnail(decoded.image) if thumbnails else None
    return Pixels(pixels_of(decoded.image, preprocessing), ImageFacts(decoded.sha256, width, height, small))


def embed_items(
    encoder: Encoder, items: Iterable[Item], num_threads: int, *, thumbnails: bool = False
) -> Iterator[EmbeddedBatch]:
    """Embed images in order, in batches of the encoder's size, with `num_threads` threads decoding.

    `items` is drawn from in a thread of its own, a few batches ahead. Raises what it raises, and StorageError.
    """
    with ExitStack() as stack:

        def pool(threads: int, name: str) -> ThreadPoolExecutor:
            executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
            stack.callback(executor.shutdown, wait=True, cancel_futures=True)
            return executor

        fetching, decoding = pool(FETCHES_AT_ONCE, "fetch"), pool(num_threads, "decode")
        reading = pool(1, "read")  # shut down first: it gives work to the others
        rest = iter(items)

        def load(item: Item, fetched: Future[bytes] | None) -> Pixels | Rejected:
            try:
                data = fetched.result() if fetched else item.content
                if isinstance(data, Rejected):
                    return data
                data = read_file(item.uri) if data is None else data
                return pixels_of_bytes(data, encoder.identity.preprocessing, thumbnails=thumbnails)
            except Rejected as rejected:
                return rejected

        def next_batch() -> tuple[list[Item], list[Future[Pixels | Rejected]]]:
            batch = list(itertools.islice(rest, encoder.batch_size))
            remote = [item.content is None and is_remote(item.uri) for item in batch]
            fetched = [
                fetching.submit(read_file, item.uri) if far else None for item, far in zip(batch, remote, strict=True)
            ]
            return batch, [decoding.submit(load, *pair) for pair in zip(batch, fetched, strict=True)]

        ahead = deque(reading.submit(next_batch) for _ in range(BATCHES_AHEAD + 1))
        while True:
            batch, futures = ahead.popleft().result()
            if not batch:
                return
            ahead.append(reading.submit(next_batch))
            yield _embedded(encoder, batch, futures)


def _embedded(encoder: Encoder, items: list[Item], futures: list[Future[Pixels | Rejected]]) -> EmbeddedBatch:
    crop = encoder.identity.preprocessing.crop
    batch_BSS3 = np.zeros((encoder.batch_size, crop, crop, 3), np.uint8)
    images: list[ImageFacts | Rejected] = []
    for row, future in enumerate(futures):
        loaded = future.result()
        if isinstance(loaded, Pixels):
            batch_BSS3[row] = loaded.pixels_SS3
            images.append(loaded.facts)
        else:
            images.append(loaded)
    return EmbeddedBatch(encoder.embed(batch_BSS3)[: len(images)], items, images)

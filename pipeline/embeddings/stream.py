"""Images by uri to vectors in order, decoding the next batches while the model works on this one.

Batches are cut by position and have one fixed size: an image that cannot be read keeps its place, and the last batch is
filled up, with black pixels whose vectors are thrown away. So a vector depends neither on which of its neighbours were
readable nor on the number of threads (oneDNN picks other convolutions, and other last bits, for small batches).
"""

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.preprocessing import pixels_of
from pipeline.images.decode import Rejected, decode, read_bytes
from pipeline.images.thumbnails import thumbnail
from pipeline.store.identity import Preprocessing

BATCHES_AHEAD = 2


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
    """Consecutive images: vectors float32 [B, D], and for each image its facts or why it was rejected.

    The vector of a rejected image means nothing.
    """

    vectors_BD: np.ndarray
    images: list[ImageFacts | Rejected]


def load_pixels(uri: str, preprocessing: Preprocessing, *, thumbnails: bool = False) -> Pixels | Rejected:
    """Read, decode, resize and crop one image."""
    try:
        return pixels_of_bytes(read_bytes(uri), preprocessing, thumbnails=thumbnails)
    except Rejected as rejected:
        return rejected


def pixels_of_bytes(data: bytes, preprocessing: Preprocessing, *, thumbnails: bool = False) -> Pixels:
    """Decode, resize and crop the bytes of an image file. Raises Rejected."""
    decoded = decode(data)
    width, height = decoded.image.size
    small = thumbnail(decoded.image) if thumbnails else None
    return Pixels(pixels_of(decoded.image, preprocessing), ImageFacts(decoded.sha256, width, height, small))


def embed_uris(
    encoder: Encoder, uris: Sequence[str], num_threads: int, *, thumbnails: bool = False
) -> Iterator[EmbeddedBatch]:
    """Embed images in order, in batches of the encoder's size, with `num_threads` threads reading and decoding."""
    load = functools.partial(load_pixels, preprocessing=encoder.identity.preprocessing, thumbnails=thumbnails)
    starts = range(0, len(uris), encoder.batch_size)
    pending: deque[list[Future[Pixels | Rejected]]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        try:
            for start in starts:
                batch = uris[start : start + encoder.batch_size]
                pending.append([pool.submit(load, uri) for uri in batch])
                if len(pending) > BATCHES_AHEAD:
                    yield _embedded(encoder, pending.popleft())
            while pending:
                yield _embedded(encoder, pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _embedded(encoder: Encoder, futures: list[Future[Pixels | Rejected]]) -> EmbeddedBatch:
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
    return EmbeddedBatch(encoder.embed(batch_BSS3)[: len(images)], images)

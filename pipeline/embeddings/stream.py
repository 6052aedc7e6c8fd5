"""Images of a source to vectors in order: fetching and decoding of the next batches go on while the model works on one.

Batches are cut by position and have one fixed size: an image that cannot be read keeps its place, and the last batch is
filled up, with black pixels whose vectors are thrown away. So a vector depends neither on which of its neighbours were
readable nor on the number of threads (oneDNN picks other convolutions, and other last bits, for small batches).
"""

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.embeddings.decoding import BatchForm, DecodedBatch, Decoding
from pipeline.embeddings.pixels import ImageFacts
from pipeline.embeddings.stages import Stages
from pipeline.images.containers.items import Item
from pipeline.images.decoding.decode import Rejected

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder


@dataclass(frozen=True)
class EmbeddedBatch:
    """Consecutive images: vectors float32 [B, D], and for each item its facts or why it was rejected.

    The vector of a rejected image means nothing. `decoded_on` names the node, None for this process.
    """

    vectors_BD: np.ndarray
    items: list[Item]
    images: list[ImageFacts | Rejected]
    decoded_on: str | None = None


def embed_items(
    encoder: "Encoder",
    items: Iterable[Item],
    decoding: Decoding,
    *,
    thumbnails: bool = False,
    stages: Stages | None = None,
) -> Generator[EmbeddedBatch]:
    """Embed images in order, in batches of the encoder's size, as `decoding` gives them.

    `items` is drawn from in a thread of its own, a few batches ahead. What each stage takes is added to `stages`.
    Raises what `items` raises, and StorageError.
    """
    stages = stages or Stages()
    decoded = decoding.batches(items, BatchForm(encoder.batch_size, encoder.identity.pixels, thumbnails))
    begun: tuple[DecodedBatch, Callable[[], np.ndarray]] | None = None
    with closing(decoded):
        while True:
            began = time.perf_counter()
            batch = next(decoded, None)
            waited = time.perf_counter()
            stages.waiting += waited - began
            # The next batch is begun before the vectors of the last are waited for: a GPU is never without work.
            following = (batch, encoder.begin(batch.pixels_BSS3)) if batch is not None else None
            embedded = _embedded(*begun) if begun is not None else None
            stages.model += time.perf_counter() - waited
            if embedded is not None:
                yield embedded
            if batch is None:
                return
            stages.reading += batch.reading
            stages.decoding += batch.decoding
            begun = following


def _embedded(batch: DecodedBatch, wait: Callable[[], np.ndarray]) -> EmbeddedBatch:
    return EmbeddedBatch(wait()[: len(batch.images)], batch.items, batch.images, batch.node)

"""Embeds the images of a source in order. The next batches are fetched and decoded while the model computes one.

Batches are cut by position and have one fixed size. An image that cannot be read keeps its place, and the last batch is
padded; both use black pixels, whose vectors are discarded. So a vector depends neither on which images beside it were
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
    """Consecutive images: vectors float32 [B, D], and for each item its ImageFacts or why it was rejected.

    The vector of a rejected image has no meaning. `decoded_on` names the node (None: this process).
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
    """Embed images in order, in batches of the encoder's size, decoded by `decoding`.

    A separate thread draws from `items`, a few batches ahead. The seconds of each stage are added to `stages`. Raises
    what `items` raises, and StorageError.
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
            # Begin the next batch before waiting for the vectors of the last one: a GPU always has work.
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

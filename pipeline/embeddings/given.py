"""Reads vectors given in place of images, in the same batches that an encoder makes. They need no model."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline.embeddings.decoding import Decoding
from pipeline.embeddings.pixels import ImageFacts
from pipeline.embeddings.stages import Stages
from pipeline.embeddings.stream import EmbeddedBatch, embed_items
from pipeline.images.containers.container import Container, vectors_in
from pipeline.images.containers.notes import ContainerNotes
from pipeline.images.containers.vectors import VectorBatch
from pipeline.images.decoding.decode import Rejected
from pipeline.images.labels.labels import Labels
from pipeline.images.sources.listing import Listing, containers_of_vectors, items_of
from pipeline.store.tables.kept_columns import KeptColumn

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder


def batches_of_vectors(
    container: Container,
    labels: Labels,
    dimension: int,
    stages: Stages | None = None,
    kept: Sequence[KeptColumn] = (),
) -> Iterator[EmbeddedBatch]:
    """The vectors of a container in order. The seconds of reading are added to `stages`. Raises StorageError."""
    stages = stages or Stages()
    found = vectors_in(container, labels, dimension, kept)
    while True:
        began = time.perf_counter()
        batch = next(found, None)
        took = time.perf_counter() - began
        stages.reading += took
        stages.waiting += took
        if batch is None:
            return
        yield _embedded(batch)


def embed_source(
    listing: Listing,
    labels: Labels,
    dimension: int,
    decoding: Decoding,
    load: "Callable[[], Encoder]",
    notes: ContainerNotes | None = None,
) -> Iterator[EmbeddedBatch]:
    """Yield every image of a source embedded, then every given vector; `load` is called only if there are images.

    `notes` is complete when the iterator ends, and then has the labels that came late.
    """
    if listing.holds_images:
        yield from embed_items(load(), items_of(listing, labels, notes), decoding)
    for container in containers_of_vectors(listing):
        yield from batches_of_vectors(container, labels, dimension)


def _embedded(batch: VectorBatch) -> EmbeddedBatch:
    facts: list[ImageFacts | Rejected] = [
        one if isinstance(one, Rejected) else ImageFacts(one.sha256, one.width, one.height) for one in batch.facts
    ]
    return EmbeddedBatch(batch.vectors_BD, batch.items, facts)

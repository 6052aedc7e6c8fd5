"""One part of a plan embedded: its rows read from the plan, its files and completion mark written.

The same class works in this process and inside a Ray actor; it depends on neither.
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch

from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.stream import ImageFacts, embed_uris
from pipeline.images.decode import Rejected
from pipeline.store.schemas import REJECTED, THUMBNAILS, embedding_column, entries_schema
from pipeline.store.segments import PartMark, Reservation, publish_part, read_plan
from pipeline.store.storage import Storage


def available_cpus() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PartEmbedder:
    """Embeds parts of one segment with `num_cpus` threads for the model and as many for decoding."""

    def __init__(
        self, storage: Storage, reservation: Reservation, num_cpus: int, encoder: Encoder | None = None
    ) -> None:
        torch.set_num_threads(num_cpus)
        self._storage = storage
        self._reservation = reservation
        self._num_cpus = num_cpus
        self._encoder = encoder or Encoder.open(storage, reservation.identity)

    def embed(self, part: int) -> PartMark:
        """Embed one part and publish it; the mark returned is the one that stands."""
        plan = read_plan(self._storage, self._reservation, part)
        uris = plan.column("uri").to_pylist()
        vectors_ND = np.zeros((len(uris), self._reservation.identity.dimension), np.float16)
        images: list[ImageFacts | Rejected] = []
        for batch in embed_uris(self._encoder, uris, self._num_cpus, thumbnails=self._reservation.thumbnails):
            vectors_ND[len(images) : len(images) + len(batch.images)] = batch.vectors_BD.astype(np.float16)
            images += batch.images
        entry_ids = plan.column("id").to_numpy()
        kept = np.array([row for row, image in enumerate(images) if isinstance(image, ImageFacts)], np.int64)
        facts = [image for image in images if isinstance(image, ImageFacts)]
        entries = pa.table(
            [
                pa.array(entry_ids[kept]),
                plan.column("uri").take(kept),
                plan.column("label").take(kept),
                pa.array([self._reservation.dataset] * len(kept), pa.string()),
                embedding_column(vectors_ND[kept]),
                pa.array([image.sha256 for image in facts], pa.string()),
                pa.array([image.width for image in facts], pa.int32()),
                pa.array([image.height for image in facts], pa.int32()),
            ],
            schema=entries_schema(self._reservation.identity),
        )
        rejects = [(row, image) for row, image in enumerate(images) if not isinstance(image, ImageFacts)]
        rejected = pa.table(
            [
                pa.array(np.delete(entry_ids, kept)),
                pa.array([uris[row] for row, _ in rejects], pa.string()),
                pa.array([reject.stage for _, reject in rejects], pa.string()),
                pa.array([reject.reason for _, reject in rejects], pa.string()),
            ],
            schema=REJECTED,
        )
        thumbnails = None
        if self._reservation.thumbnails:
            columns = [pa.array(entry_ids[kept]), pa.array([image.thumbnail for image in facts], pa.binary())]
            thumbnails = pa.table(columns, schema=THUMBNAILS)
        return publish_part(self._storage, self._reservation, part, entries, rejected, thumbnails)


def embed_here(
    storage: Storage, reservation: Reservation, parts: Sequence[int], encoder: Encoder
) -> Iterator[PartMark]:
    """Embed parts one after another in this process."""
    embedder = PartEmbedder(storage, reservation, available_cpus(), encoder)
    for part in parts:
        yield embedder.embed(part)

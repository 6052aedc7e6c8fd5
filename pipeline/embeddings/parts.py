"""One part of a plan embedded: its rows read from the plan, its files and completion mark written.

The same class works in this process and inside a Ray actor; it depends on neither.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.stages import Stages
from pipeline.embeddings.stream import ImageFacts, embed_items
from pipeline.errors import SourceError
from pipeline.images.containers import Container, images_in
from pipeline.images.decode import MAX_FILE_BYTES, Rejected
from pipeline.images.items import Item
from pipeline.images.labels import Labels
from pipeline.store.ids import MAX_ROWS, part_ids
from pipeline.store.schemas import REJECTED, THUMBNAILS, embedding_column, entries_schema
from pipeline.store.segments import PartMark, Reservation, publish_part, read_container, read_plan
from pipeline.store.storage import Storage

TOO_LARGE = Rejected("read", f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")


def available_cpus() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PartEmbedder:
    """Embeds parts of one segment with `num_cpus` threads for the model and as many for decoding.

    `node` is what completion marks call the machine it runs on; None takes the name of the host.
    """

    def __init__(
        self,
        storage: Storage,
        reservation: Reservation,
        num_cpus: int,
        encoder: Encoder | None = None,
        node: str | None = None,
    ) -> None:
        torch.set_num_threads(num_cpus)
        self._storage = storage
        self._reservation = reservation
        self._num_cpus = num_cpus
        self._node = node
        self._encoder = encoder or Encoder.open(storage, reservation.identity)

    def embed(self, part: int) -> PartMark:
        """Embed one part and publish it; the mark returned is the one that stands."""
        vectors, items, images, stages = [], list[Item](), list[ImageFacts | Rejected](), Stages()
        batches = embed_items(
            self._encoder, self._items(part), self._num_cpus, thumbnails=self._with_thumbnails, stages=stages
        )
        for batch in batches:
            vectors.append(batch.vectors_BD.astype(np.float16))
            # The bytes of a member have done their work.
            items += [item if item.content is None else replace(item, content=None) for item in batch.items]
            images += batch.images
        if len(items) > MAX_ROWS:
            raise SourceError(f"{items[0].uri.partition('#')[0]} holds more than {MAX_ROWS:,} images: split it")
        none_ND = np.empty((0, self._reservation.identity.dimension), np.float16)
        began = time.perf_counter()
        tables = self._tables(part, np.concatenate([none_ND, *vectors]), items, images)
        mark = publish_part(self._storage, self._reservation, part, *tables, seconds=stages.to_json(), node=self._node)
        stages.writing = time.perf_counter() - began
        return mark.model_copy(update={"seconds": stages.to_json()})

    def described(self, part: int) -> str:
        """What a part holds, in a few words for a message."""
        reservation = self._reservation
        if part >= reservation.containers_from:
            return f"an image in {read_container(self._storage, reservation, part)['uri']}"
        first = part * reservation.rows_per_part
        last = min(first + reservation.rows_per_part, reservation.planned) - 1
        return f"one of images {first:,} to {last:,} of {reservation.source}"

    @property
    def _with_thumbnails(self) -> bool:
        return self._reservation.thumbnails

    def _items(self, part: int) -> Iterator[Item]:
        """The images of a part, those of a container as they are read."""
        if part >= self._reservation.containers_from:
            container = Container(**read_container(self._storage, self._reservation, part))
            yield from images_in(container, Labels(self._reservation.labels))
            return
        plan = read_plan(self._storage, self._reservation, part)
        columns = (plan.column(name).to_pylist() for name in ("uri", "label", "num_bytes"))
        for uri, label, num_bytes in zip(*columns, strict=True):
            yield Item(uri, label, TOO_LARGE if (num_bytes or 0) > MAX_FILE_BYTES else None)

    def _tables(
        self, part: int, vectors_ND: np.ndarray, items: Sequence[Item], images: Sequence[ImageFacts | Rejected]
    ) -> tuple[pa.Table, pa.Table, pa.Table | None]:
        """Entries, rejected images and thumbnails; their ids are their positions in the part."""
        entry_ids = part_ids(self._reservation.number, part, len(items))
        kept = [row for row, image in enumerate(images) if isinstance(image, ImageFacts)]
        facts = [image for image in images if isinstance(image, ImageFacts)]
        entries = pa.table(
            [
                pa.array(entry_ids[kept]),
                pa.array([items[row].uri for row in kept], pa.string()),
                pa.array([items[row].label for row in kept], pa.string()),
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
                pa.array([items[row].uri for row, _ in rejects], pa.string()),
                pa.array([reject.stage for _, reject in rejects], pa.string()),
                pa.array([reject.reason for _, reject in rejects], pa.string()),
            ],
            schema=REJECTED,
        )
        if not self._with_thumbnails:
            return entries, rejected, None
        columns = [pa.array(entry_ids[kept]), pa.array([image.thumbnail for image in facts], pa.binary())]
        return entries, rejected, pa.table(columns, schema=THUMBNAILS)


def embed_here(
    storage: Storage, reservation: Reservation, parts: Sequence[int], encoder: Encoder
) -> Iterator[PartMark]:
    """Embed parts one after another in this process."""
    embedder = PartEmbedder(storage, reservation, available_cpus(), encoder)
    for part in parts:
        yield embedder.embed(part)

"""Embeds one part of a plan: reads its rows from the plan, writes its files and its completion mark.

The same class runs in this process and inside a Ray actor; it depends on neither.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import pyarrow as pa

from pipeline.embeddings.decoding import BatchForm, Decoding, Threads
from pipeline.embeddings.given import batches_of_vectors
from pipeline.embeddings.loading import open_encoder
from pipeline.embeddings.numerics import MEASURED_IMAGES, decide, encoder_in, needs_measuring
from pipeline.embeddings.pixels import ImageFacts
from pipeline.embeddings.stages import Stages
from pipeline.embeddings.stream import EmbeddedBatch, embed_items
from pipeline.errors import SourceError
from pipeline.images.containers.container import Container, ImageChoice
from pipeline.images.containers.in_turn import images_in_turn
from pipeline.images.containers.items import Item
from pipeline.images.containers.notes import ContainerNotes
from pipeline.images.decoding.decode import MAX_FILE_BYTES, Rejected
from pipeline.images.labels.labels import Labels
from pipeline.resources import available_cpus
from pipeline.store.lookup.frozen_digests import FrozenDigests
from pipeline.store.segments.part_marks import DUPLICATE, PartMark, PartWork, publish_part
from pipeline.store.segments.reservations import Reservation, read_containers, read_numerics, read_plan
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.digest_files import digests_in
from pipeline.store.tables.ids import MAX_ROWS, part_ids
from pipeline.store.tables.kept_columns import rows_of
from pipeline.store.tables.schemas import OFFSETS, PLAN, REJECTED, THUMBNAILS, embedding_column, entries_schema

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder

TOO_LARGE = Rejected("read", f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")


@dataclass(frozen=True)
class EmbeddedPart:
    """The images of a part in order: ids int64 [N], vectors float32 [N, D], items, ImageFacts or reasons of rejection.

    The vector of a rejected image has no meaning. `decoded_on` names the nodes that decoded for this one. `notes` are
    those of the readers of its containers; None if the part has image files.
    """

    ids_N: np.ndarray
    vectors_ND: np.ndarray
    items: list[Item]
    images: list[ImageFacts | Rejected]
    decoded_on: tuple[str, ...] = ()
    notes: ContainerNotes | None = None

    @property
    def unlabelled(self) -> Counter[str]:
        """Counts of the images in containers that are not rejected and have no label, by reason."""
        items = (self.items[row] for row in self.accepted if self.notes)
        return Counter(item.no_label for item in items if item.label is None and item.no_label)

    @property
    def accepted(self) -> list[int]:
        """The rows of images that are not rejected."""
        return [row for row, image in enumerate(self.images) if isinstance(image, ImageFacts)]

    def rejected(self) -> pa.Table:
        """The rejected images as a table with schema REJECTED."""
        rejects = [(row, image) for row, image in enumerate(self.images) if isinstance(image, Rejected)]
        return pa.table(
            [
                pa.array(self.ids_N[[row for row, _ in rejects]]),
                pa.array([self.items[row].uri for row, _ in rejects], pa.string()),
                pa.array([reject.stage for _, reject in rejects], pa.string()),
                pa.array([reject.reason for _, reject in rejects], pa.string()),
            ],
            schema=REJECTED,
        )


class Worker(Protocol):
    """Does parts, one after another."""

    def do(self, part: int) -> PartMark:
        """Do one part and publish it; return its mark, or another attempt's mark if that one was first."""

    def described(self, part: int) -> str:
        """A short description of a part's content, for a message."""


class Work(Protocol):
    """The work to do on each part of a plan. It can be pickled; the worker's process opens it.

    If it `uses_gpu`, each worker on a cluster takes a GPU, where there are some.
    """

    uses_gpu: ClassVar[bool]

    def open(
        self,
        num_cpus: int,
        node: str | None = None,
        encoder: "Encoder | None" = None,
        decoding: Decoding | None = None,
    ) -> Worker:
        """A worker with `num_cpus` threads on the node named `node`.

        `encoder` is an encoder that is loaded already (None: the worker loads one when needed). `decoding` decodes its
        images (None: threads of its own).
        """


@dataclass(frozen=True)
class Remember:
    """The work of an add: each part becomes entries of the memory."""

    storage: Storage
    reservation: Reservation
    uses_gpu: ClassVar[bool] = True

    def open(
        self,
        num_cpus: int,
        node: str | None = None,
        encoder: "Encoder | None" = None,
        decoding: Decoding | None = None,
    ) -> "PartEmbedder":
        def load() -> "Encoder":
            return encoder or open_encoder(self.storage, self.reservation.identity)

        return PartEmbedder(self.storage, self.reservation, num_cpus, load, node, decoding)


class PartEmbedder:
    """Embeds parts of one plan. `decoding` decodes the images (None: `num_cpus` threads of this process).

    It calls `load` for the encoder once, before the first image; a part of given vectors needs no encoder. `node` names
    the machine in the marks (None: the name of this host).
    """

    def __init__(
        self,
        storage: Storage,
        reservation: Reservation,
        num_cpus: int,
        load: "Callable[[], Encoder]",
        node: str | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        self._storage = storage
        self._reservation = reservation
        self._decoding = decoding or Threads(num_cpus)
        self._node = node
        self._load = load
        self._num_cpus = num_cpus
        self._encoder: Encoder | None = None
        self._numerics_settled = reservation.precision == "float32"
        self._held: FrozenDigests | None = None

    def do(self, part: int) -> PartMark:
        """Embed one part and publish its entries."""
        stages = Stages()
        embedded, duplicates = self._without_duplicates(self.embed(part, stages))
        began = time.perf_counter()
        mark = publish_part(
            self._storage,
            self._reservation,
            part,
            self._entries(embedded),
            embedded.rejected(),
            self._pictures(embedded) if self._reservation.thumbnails else None,
            self._offsets(embedded),
            PartWork(
                seconds=stages.to_json(),
                node=self._node,
                decoded_on=embedded.decoded_on,
                unlabelled=embedded.unlabelled,
                noted=embedded.notes.counts() if embedded.notes else {},
                duplicates=duplicates,
            ),
        )
        stages.writing = time.perf_counter() - began
        return mark.model_copy(update={"seconds": stages.to_json()})

    def embed(self, part: int, stages: Stages) -> EmbeddedPart:
        """Embed one part and add the seconds of each stage to `stages`."""
        vectors, items, images = [], list[Item](), list[ImageFacts | Rejected]()
        decoded_on = set[str]()
        notes = ContainerNotes() if part >= self._reservation.containers_from else None
        for batch in self._batches(part, stages, notes):
            vectors.append(batch.vectors_BD)
            # The bytes of a member are no longer needed.
            items += [item if item.content is None else replace(item, content=None) for item in batch.items]
            images += batch.images
            if batch.decoded_on is not None:
                decoded_on.add(batch.decoded_on)
        if len(items) > MAX_ROWS:
            raise SourceError(self._too_many(items))
        none_ND = np.empty((0, self._reservation.identity.dimension), np.float32)
        ids_N = part_ids(self._reservation.number, part, len(items))
        items = notes.amended(items) if notes else items
        return EmbeddedPart(ids_N, np.concatenate([none_ND, *vectors]), items, images, tuple(sorted(decoded_on)), notes)

    def _without_duplicates(self, embedded: EmbeddedPart) -> tuple[EmbeddedPart, int]:
        """Reject images whose bytes the memory held when the add was planned; return the part and their number."""
        accepted = embedded.accepted
        if self._reservation.held is None or not accepted:
            return embedded, 0
        self._held = self._held or FrozenDigests(self._storage, self._reservation.held)
        facts = [image for image in embedded.images if isinstance(image, ImageFacts)]
        holders = self._held.holders(digests_in(pa.array([image.sha256 for image in facts], pa.string())))
        images = list(embedded.images)
        for row, holder in zip(accepted, holders.tolist(), strict=True):
            if holder >= 0:
                images[row] = Rejected(DUPLICATE, f"the memory holds these bytes already, as entry {holder}")
        return replace(embedded, images=images), int((holders >= 0).sum())

    def described(self, part: int) -> str:
        """A short description of a part's content, for a message."""
        reservation = self._reservation
        if part >= reservation.containers_from:
            containers = read_containers(self._storage, reservation, part)
            to_last = f" to {containers[-1]['uri']}" if len(containers) > 1 else ""
            return f"an image in {containers[0]['uri']}{to_last}"
        first = part * reservation.rows_per_part
        last = min(first + reservation.rows_per_part, reservation.planned) - 1
        return f"one of images {first:,} to {last:,} of {reservation.source}"

    def _batches(self, part: int, stages: Stages, notes: ContainerNotes | None) -> Iterator[EmbeddedBatch]:
        """The embedded images of a part, or its given vectors."""
        if part >= self._reservation.containers_from:
            containers = self._containers(part)
            if containers[0].holds_vectors:  # and so do the others
                kept, dimension = self._reservation.kept, self._reservation.identity.dimension
                each = (batches_of_vectors(one, self._labels, dimension, stages, kept) for one in containers)
                return itertools.chain.from_iterable(each)
        thumbnails = self._reservation.thumbnails
        encoder = self._settled_encoder(part)
        return embed_items(encoder, self._items(part, notes), self._decoding, thumbnails=thumbnails, stages=stages)

    def _settled_encoder(self, part: int) -> "Encoder":
        """The encoder in the precision recorded for the segment; if none is recorded, measure on the part's images."""
        encoder = self._encoder or self._load()
        if self._encoder is None:
            encoder.use_cores(self._num_cpus)
        self._encoder = encoder
        if self._numerics_settled:
            return encoder
        if not needs_measuring(self._storage, self._reservation, encoder):
            numerics = read_numerics(self._storage, self._reservation)
        else:
            form = BatchForm(encoder.batch_size, self._reservation.identity.pixels)
            with closing(self._items(part)) as items:
                batches = list(self._decoding.batches(itertools.islice(items, MEASURED_IMAGES), form))
            pixels = [
                batch.pixels_BSS3[row]
                for batch in batches
                for row, image in enumerate(batch.images)
                if isinstance(image, ImageFacts)
            ]
            if not pixels:  # a later part can have images to measure on
                return encoder
            numerics = decide(self._storage, self._reservation, encoder, np.stack(pixels))
        self._encoder = encoder_in(encoder, numerics)
        self._numerics_settled = True
        return self._encoder

    @property
    def _labels(self) -> Labels:
        return Labels(self._reservation.labels, self._reservation.source)

    def _items(self, part: int, notes: ContainerNotes | None = None) -> Generator[Item]:
        """The images of a part. A container is read while its images are yielded; so is the next one after it."""
        if part >= self._reservation.containers_from:
            choice = ImageChoice(self._reservation.exclude, self._reservation.image_extension)
            yield from images_in_turn(self._containers(part), self._labels, self._reservation.kept, choice, notes)
            return
        plan = read_plan(self._storage, self._reservation, part)
        columns = (plan.column(name).to_pylist() for name in ("uri", "label", "num_bytes"))
        kept = rows_of(plan.drop_columns(PLAN.names[1:]), self._reservation.kept)  # PLAN's own columns are not kept
        for (uri, label, num_bytes), values in zip(zip(*columns, strict=True), kept, strict=True):
            yield Item(uri, label, TOO_LARGE if (num_bytes or 0) > MAX_FILE_BYTES else None, values)

    def _containers(self, part: int) -> list[Container]:
        return [Container(**row) for row in read_containers(self._storage, self._reservation, part)]

    @staticmethod
    def _too_many(items: Sequence[Item]) -> str:
        """Why a part has more images than an id can count."""
        [(largest, number)] = Counter(item.uri.partition("#")[0] for item in items).most_common(1)
        if number > MAX_ROWS:
            return f"{largest} holds more than {MAX_ROWS:,} images: split it"
        return (
            f"{largest} and the archives beside it hold more than {MAX_ROWS:,} images, far more than their bytes let "
            "expect: add it from a folder of its own"
        )

    def _entries(self, embedded: EmbeddedPart) -> pa.Table:
        accepted = embedded.accepted
        facts = [image for image in embedded.images if isinstance(image, ImageFacts)]
        return pa.table(
            [
                pa.array(embedded.ids_N[accepted]),
                pa.array([embedded.items[row].uri for row in accepted], pa.string()),
                pa.array([embedded.items[row].label for row in accepted], pa.string()),
                pa.array([self._reservation.dataset] * len(accepted), pa.string()),
                embedding_column(embedded.vectors_ND[accepted].astype(np.float16)),
                pa.array([image.sha256 for image in facts], pa.string()),
                pa.array([image.width for image in facts], pa.int32()),
                pa.array([image.height for image in facts], pa.int32()),
                *(
                    pa.array([embedded.items[row].kept[at] for row in accepted], column.kind)
                    for at, column in enumerate(self._reservation.kept)
                ),
            ],
            schema=entries_schema(self._reservation.identity, self._reservation.kept),
        )

    def _pictures(self, embedded: EmbeddedPart) -> pa.Table:
        """The thumbnails of the images that have one; given vectors have none."""
        images = [(row, image) for row, image in enumerate(embedded.images) if isinstance(image, ImageFacts)]
        pictures = [(row, image.thumbnail) for row, image in images if image.thumbnail is not None]
        ids_N = embedded.ids_N[[row for row, _ in pictures]]
        columns = [pa.array(ids_N, pa.int64()), pa.array([jpeg for _, jpeg in pictures], pa.binary())]
        return pa.table(columns, schema=THUMBNAILS)

    def _offsets(self, embedded: EmbeddedPart) -> pa.Table:
        """The offsets of images in their archive. Image files and images of other containers have no row."""
        spans = [(row, embedded.items[row].span) for row in embedded.accepted]
        known = [(row, *span) for row, span in spans if span is not None]
        ids_N = embedded.ids_N[[row for row, *_ in known]]
        offsets = [pa.array([each[at] for each in known], pa.int64()) for at in (1, 2)]
        return pa.table([pa.array(ids_N, pa.int64()), *offsets], schema=OFFSETS)


def do_parts_here(work: Work, parts: Sequence[int], encoder: "Encoder | None") -> Iterator[PartMark]:
    """Do parts one after another in this process. With `encoder` None the worker loads one when needed."""
    worker = work.open(available_cpus(), encoder=encoder)
    for part in parts:
        yield worker.do(part)

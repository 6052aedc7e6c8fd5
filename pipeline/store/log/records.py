"""The parts of a version: segments, single adds, label sets and the index, as JSON.

Unknown fields are refused: a file of a later release raises an error and is never misread.
"""

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.store.segments.container_parts import ContainerParts
from pipeline.store.storage.file_refs import DigestsFile, FileRef, RowsFile
from pipeline.store.tables.kept_columns import KeptColumn
from pipeline.store.values import Count, EntryId, Finite, Generation, SegmentNumber, Sha256

Refine = Literal["float16", "none"]
PARAMETERS = r"^(?:[A-Za-z_]{1,32}=[0-9]{1,9}(?:,[A-Za-z_]{1,32}=[0-9]{1,9})*)?$"  # as FAISS writes them
BASE64 = r"^[A-Za-z0-9+/]*={0,2}$"


class Record(BaseModel):
    """A part of a version or a commit: frozen, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Segment(Record):
    """All parts of one `add`; entries + rejected = planned.

    `identity` is the encoder's fingerprint. `fingerprint` is a hash of source, options and identity. `entries` is empty
    after the entries were compacted into packs. The segment of single adds has no plan, and grows. `containers` lists
    the containers of the source, whose images are not planned one by one; they make the parts from `containers_from`
    on. `container_parts` has the number of containers of each of these parts; empty means one container each. `kept`
    are the kept columns of the entries. `offsets` has the positions of images in archives; for single adds it lists the
    images that were read at their uri. `uris` and `sha256s` find its entries by digests of these; both are empty for
    single adds, and for segments of older releases.
    """

    number: SegmentNumber
    source: str
    dataset: str
    identity: str
    fingerprint: str
    planned: Count
    num_entries: Count
    num_rejected: Count
    plan: FileRef | None
    entries: tuple[RowsFile, ...]
    rejected: tuple[RowsFile, ...]
    thumbnails: tuple[RowsFile, ...] = ()
    offsets: tuple[RowsFile, ...] = ()
    containers: FileRef | None = None
    containers_from: Count | None = None
    container_parts: ContainerParts = ()
    kept: tuple[KeptColumn, ...] = ()
    uris: tuple[DigestsFile, ...] = ()
    sha256s: tuple[DigestsFile, ...] = ()


class Single(Record):
    """An entry that was added by itself. Its commit contains it until it is folded into a file.

    `embedding` is float16 [D], little-endian, as base64. `thumbnail` is a JPEG as base64, or None. `num_bytes` is the
    size of the file that was read at the uri; None if the caller gave the bytes, so that the uri is only a name.
    """

    id: EntryId
    uri: str
    label: str | None
    dataset: str
    embedding: str = Field(pattern=BASE64)
    sha256: Sha256
    width: int = Field(ge=0, lt=1 << 31)
    height: int = Field(ge=0, lt=1 << 31)
    thumbnail: str | None = Field(None, pattern=BASE64)
    num_bytes: Count | None = None


class Singles(Record):
    """Where the next single add goes: the segment, and the offset of the next id from the segment's first id."""

    segment: SegmentNumber
    next_row: Count = 0


class LabelSet(Record):
    """A view on labels: `map` translates stored labels; single entries may also have their own label in the set."""

    name: str
    map: FileRef | None = None


class Quality(Record):
    """Measurements of a shard: recall against exact search, and seconds for a query alone and for one in a batch.

    The queries are stored rows that the index was not trained on, if there are enough such rows.
    """

    recall_at_1: Finite
    recall_at_10: Finite
    recall_at_100: Finite
    seconds_alone: Finite
    seconds_in_batch: Finite

    @classmethod
    def measured(cls, at_1: float, at_10: float, at_100: float, alone: float, in_batch: float) -> "Quality":
        """Make a Quality from recalls (rounded to 6 digits) and seconds (rounded to 8)."""
        return cls(
            recall_at_1=round(at_1, 6),
            recall_at_10=round(at_10, 6),
            recall_at_100=round(at_100, 6),
            seconds_alone=round(alone, 8),
            seconds_in_batch=round(in_batch, 8),
        )


class Shard(Record):
    """One FAISS index over the live entries of some parts.

    `covers` holds inclusive id ranges: an entries file whose ids lie in one of them is searched through the shard.
    `index` is None for the key Flat, which searches `vectors`. `vectors` is None if candidates are not scored again.
    `centroid_distance` is the mean distance of the vectors to their nearest centroids; None if there are no centroids.
    """

    number: Count
    rows: Count
    covers: tuple[tuple[EntryId, EntryId], ...]
    index: FileRef | None
    ids: FileRef
    labels: FileRef
    vectors: FileRef | None
    entries: FileRef
    recall_at_10: Finite
    quality: Quality | None = None
    centroid_distance: Finite | None = None

    @property
    def num_bytes(self) -> int:
        files = (self.index, self.ids, self.labels, self.vectors, self.entries)
        return sum(file.num_bytes for file in files if file)

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of the FAISS index, which is searched in memory as a whole; for the key Flat, bytes of the vectors."""
        searched = self.index or self.vectors
        return searched.num_bytes if searched else 0

    def to_json(self) -> dict:
        """The shard as a JSON object for `status`; `bytes_per_vector` counts bytes in memory."""
        return {
            "number": self.number,
            "rows": self.rows,
            "bytes_per_vector": self.bytes_in_memory / max(self.rows, 1),
            "recall_at_10": self.recall_at_10,
            "quality": self.quality.model_dump() if self.quality else None,
        }


class Index(Record):
    """A generation of shards that share one trained quantizer and one set of search parameters.

    `parameters` is in FAISS's notation ("nprobe=16"), with `rerank` added: how many candidates are scored again of all
    shards of an inverted file together, or of each shard (`rerank_for`). `recall_at_10` is the lowest of any shard.
    With `refine` float16 the shards store their vectors, and candidates are scored again from them.
    `candidates` is the table of measured index keys. `centroid_distance` is that of the training sample.
    """

    generation: Generation
    key: str
    parameters: str = Field(pattern=PARAMETERS)
    trained: FileRef | None
    shards: tuple[Shard, ...]
    candidates: FileRef | None = None
    centroid_distance: Finite | None = None
    refine: Refine = "float16"
    rerank_for: Literal["shard", "index"] = "shard"

    @property
    def recall_at_10(self) -> float:
        return min((shard.recall_at_10 for shard in self.shards), default=1.0)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def drift(self) -> float | None:
        """The largest `centroid_distance` of any shard, divided by that of the training sample; may be None."""
        distances = [shard.centroid_distance for shard in self.shards if shard.centroid_distance is not None]
        return max(distances) / self.centroid_distance if distances and self.centroid_distance else None

    def to_json(self) -> dict:
        """The index as a JSON object for `status`."""
        return {
            "key": self.key,
            "bytes": self.num_bytes,
            "bytes_in_memory": self.bytes_in_memory,
            "refine": self.refine,
            "refine_bytes": sum(shard.vectors.num_bytes for shard in self.shards if shard.vectors),
            "recall_at_10": self.recall_at_10,
            "parameters": self.parameters,
            "drift": self.drift,
            "shards": [shard.to_json() for shard in self.shards],
        }

    @property
    def bytes_in_memory(self) -> int:
        """The sum of its shards' `bytes_in_memory`, and the centroids, which a process has once.

        A process that merges lists takes less once it is open, because these are padded once (index/search/merging.py).
        """
        trained = self.trained.num_bytes if self.trained else 0
        return trained + sum(shard.bytes_in_memory for shard in self.shards)


def shards_of(ids_N: np.ndarray, index: Index | None) -> np.ndarray:
    """The position in `index.shards` of the shard that covers each id (int64 [N]); -1 if no shard covers it."""
    covers = sorted((*span, at) for at, shard in enumerate(index.shards) for span in shard.covers) if index else []
    if not covers:
        return np.full(len(ids_N), -1)
    spans = np.array(covers, np.int64)
    at = np.maximum(np.searchsorted(spans[:, 0], ids_N, side="right") - 1, 0)
    inside = (ids_N >= spans[at, 0]) & (ids_N <= spans[at, 1])
    shards: np.ndarray = np.where(inside, spans[at, 2], -1)
    return shards

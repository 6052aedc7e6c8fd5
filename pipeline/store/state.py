"""What a memory is at one version, and the actions whose folding makes it.

A commit lists actions; the state is what they add up to. Both are written as JSON, and unknown fields are refused, so
that a file of a later release is named rather than misread.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.store.files import FileRef, RowsFile
from pipeline.store.identity import Identity
from pipeline.store.kept import KeptColumn, union
from pipeline.store.values import Count, EntryId, Finite, Generation, Nonce, SegmentNumber, Sha256, VersionNumber

SINGLES = "single adds"  # stands for the fingerprint of the segment they go to
PARAMETERS = r"^(?:[A-Za-z_]{1,32}=[0-9]{1,9}(?:,[A-Za-z_]{1,32}=[0-9]{1,9})*)?$"  # as FAISS writes them
BASE64 = r"^[A-Za-z0-9+/]*={0,2}$"
MAX_BROKEN = 1_000  # a lease broken longer ago than this many others belongs to no process that still runs


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Segment(_Frozen):
    """All parts of one `add`; entries + rejected = planned.

    `identity` is the encoder's fingerprint, `fingerprint` is over source, options and identity. `entries` is empty once
    they were compacted into packs. The segment of single adds has no plan, and grows. Images that were not planned one
    by one lie in `containers`, the parts from `containers_from` on. Entries have the columns `kept` besides their own.
    `offsets` tell where in an archive images lie, and of single adds which were read at their uri.
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
    kept: tuple[KeptColumn, ...] = ()


class Single(_Frozen):
    """An entry that was added by itself, kept in its commit until it is folded into a file.

    `embedding` is the base64 of float16 [D], little-endian; `thumbnail` that of a JPEG, where one is kept. `num_bytes`
    is the size of the file that was read at its uri; None where the bytes were given, and the uri is but a name.
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


class Singles(_Frozen):
    """Where single adds go: their segment, and the offset from its first id of the next entry."""

    segment: SegmentNumber
    next_row: Count = 0


class LabelSet(_Frozen):
    """A view on labels: `map` translates the labels as stored, entries may have one of their own besides."""

    name: str
    map: FileRef | None = None


class Quality(_Frozen):
    """What was measured of a shard: recall against exact search, and seconds of a query alone and among many at once.

    Queries are stored rows that the index was not trained on, as far as there are enough.
    """

    recall_at_1: Finite
    recall_at_10: Finite
    recall_at_100: Finite
    seconds_alone: Finite
    seconds_in_batch: Finite

    @classmethod
    def measured(cls, at_1: float, at_10: float, at_100: float, alone: float, in_batch: float) -> "Quality":
        """From recalls and seconds, rounded to what a measurement is worth."""
        return cls(
            recall_at_1=round(at_1, 6),
            recall_at_10=round(at_10, 6),
            recall_at_100=round(at_100, 6),
            seconds_alone=round(alone, 8),
            seconds_in_batch=round(in_batch, 8),
        )


Refine = Literal["float16", "none"]


class Shard(_Frozen):
    """One FAISS index over the live entries of some parts.

    `covers` holds inclusive id ranges: an entries file whose ids lie in one of them is searched through the shard.
    `index` is absent for the key Flat, whose vectors are their own index; `vectors` where nothing is scored again.
    `centroid_distance` is how far its vectors are from the centroids nearest to them, on average; None without those.
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
        """Bytes of the FAISS index, which is searched as a whole; for the key Flat those of the vectors."""
        searched = self.index or self.vectors
        return searched.num_bytes if searched else 0

    def to_json(self) -> dict:
        """What status says of a shard, as a JSON object; bytes in memory, for each vector."""
        return {
            "number": self.number,
            "rows": self.rows,
            "bytes_per_vector": self.bytes_in_memory / max(self.rows, 1),
            "recall_at_10": self.recall_at_10,
            "quality": self.quality.model_dump() if self.quality else None,
        }


class Index(_Frozen):
    """A generation of shards that share one trained quantizer and one set of search parameters.

    `parameters` is FAISS's own notation ("nprobe=16") and `rerank`; `recall_at_10` is the lowest of any shard.
    With `refine` float16 the shards keep their vectors, from which candidates are scored again.
    `candidates` is the table of the keys it was chosen from, `centroid_distance` that of the sample it was trained on.
    """

    generation: Generation
    key: str
    parameters: str = Field(pattern=PARAMETERS)
    trained: FileRef | None
    shards: tuple[Shard, ...]
    candidates: FileRef | None = None
    centroid_distance: Finite | None = None
    refine: Refine = "float16"

    @property
    def recall_at_10(self) -> float:
        return min((shard.recall_at_10 for shard in self.shards), default=1.0)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def drift(self) -> float | None:
        """The largest distance of a shard's vectors to their centroids, as a multiple of the training sample's."""
        distances = [shard.centroid_distance for shard in self.shards if shard.centroid_distance is not None]
        return max(distances) / self.centroid_distance if distances and self.centroid_distance else None

    def to_json(self) -> dict:
        """What status says of an index, as a JSON object."""
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
        """Those of its shards."""
        return sum(shard.bytes_in_memory for shard in self.shards)


class SetIdentity(_Frozen):
    """The encoder of the memory, fixed by the first add; no weights where vectors were given without one."""

    action: Literal["set_identity"] = "set_identity"
    identity: Identity
    weights: FileRef | None


class AddSegment(_Frozen):
    """A finished segment becomes part of the memory.

    `beside` numbers the segments of the same fingerprint that the writer knew of, all of whose entries are forgotten.
    """

    action: Literal["add_segment"] = "add_segment"
    segment: Segment
    beside: tuple[SegmentNumber, ...] = ()


class AddSingles(_Frozen):
    """Entries added by themselves; `segment` is the one of single adds, `next_row` the row that comes after them."""

    action: Literal["add_singles"] = "add_singles"
    segment: SegmentNumber
    next_row: Count
    identity: str
    entries: tuple[Single, ...]


class FoldSingles(_Frozen):
    """Single adds lie in these files from now on, up to the last id in them; later ones stay in their commits.

    Their thumbnails lie in `thumbnails`, up to the same id, and `offsets` tell which were read at their uri.
    """

    action: Literal["fold_singles"] = "fold_singles"
    segment: SegmentNumber
    files: tuple[RowsFile, ...]
    thumbnails: tuple[RowsFile, ...] = ()
    offsets: tuple[RowsFile, ...] = ()


class Forget(_Frozen):
    """Tombstones for the ids listed in a file. `forgotten` counts those that were live before.

    With `folds` the file also lists every id forgotten before, and stands for the files that did.
    """

    action: Literal["forget"] = "forget"
    tombstones: FileRef
    forgotten: Count
    folds: bool = False


class Relabel(_Frozen):
    """Other labels for the ids listed in a file; `folds` as in Forget. `label_set` None is the labels as stored."""

    action: Literal["relabel"] = "relabel"
    labels: FileRef
    relabelled: Count
    label_set: str | None = None
    folds: bool = False


class SetLabelSet(_Frozen):
    """A label set is made, or its map exchanged."""

    action: Literal["set_label_set"] = "set_label_set"
    label_set: LabelSet


class SetIndex(_Frozen):
    """Search through this index from now on. `replaces` is the generation it was built beside, None for none."""

    action: Literal["set_index"] = "set_index"
    index: Index
    replaces: Generation | None
    replaces_shards: Count = 0


class BreakLeases(_Frozen):
    """Whoever worked under these leases is taken for dead, and its files may be removed: it cannot commit any more."""

    action: Literal["break_leases"] = "break_leases"
    leases: tuple[Nonce, ...]


class SetState(_Frozen):
    """The memory is as given here from now on; `why` says which verb wrote it."""

    action: Literal["set_state"] = "set_state"
    why: Literal["rollback", "erase", "compact"]
    state: "State"


Action = Annotated[
    SetIdentity
    | AddSegment
    | AddSingles
    | FoldSingles
    | Forget
    | Relabel
    | SetLabelSet
    | SetIndex
    | BreakLeases
    | SetState,
    Field(discriminator="action"),
]


class State(_Frozen):
    """A memory at one version.

    `packs` hold the entries of compacted segments, `pending` those of single adds that no file holds yet. `retired`
    are segments that a rollback took away; their numbers stay used. `rewrites` counts rollbacks and erasures, after
    which work prepared before them does not fit any more; `erasures` names those whose traces are to be removed from
    older versions. `broken` are the last leases whose holders were taken for dead.
    """

    version: VersionNumber = 0
    identity: Identity | None = None
    weights: FileRef | None = None
    segments: tuple[Segment, ...] = ()
    packs: tuple[RowsFile, ...] = ()
    singles: Singles | None = None
    pending: tuple[Single, ...] = ()
    tombstones: tuple[FileRef, ...] = ()
    labels: tuple[FileRef, ...] = ()
    label_sets: tuple[LabelSet, ...] = ()
    index: Index | None = None
    retired: tuple[SegmentNumber, ...] = ()
    rewrites: Count = 0
    erasures: tuple[Nonce, ...] = ()
    broken: tuple[Nonce, ...] = ()

    @property
    def num_entries(self) -> int:
        """Entries stored, forgotten ones included."""
        return sum(segment.num_entries for segment in self.segments)

    @property
    def num_live(self) -> int:
        """Entries that are not forgotten: an id is listed in one file of tombstones at most."""
        return self.num_entries - sum(file.rows for file in self.tombstones)

    @property
    def kept(self) -> tuple[KeptColumn, ...]:
        """The kept columns of all segments that have entries."""
        return union([segment.kept for segment in self.segments if segment.num_entries])

    def after(self, action: Action) -> "State":
        """The state once an action is added to it."""
        return self.model_copy(update=self._changes(action))

    def _changes(self, action: Action) -> dict[str, object]:  # noqa: C901, PLR0911  # one line or two an action
        match action:
            case SetIdentity():
                return {"identity": action.identity, "weights": action.weights}
            case AddSegment():
                return {"segments": self._with(action.segment)}
            case AddSingles():
                return self._with_singles(action)
            case FoldSingles():
                folded = [segment for segment in self.segments if segment.number == action.segment]
                files = {"entries": action.files, "thumbnails": action.thumbnails, "offsets": action.offsets}
                moved = [self._with(segment.model_copy(update=files)) for segment in folded]
                last = action.files[-1].last_id if action.files else -1  # none is left where all were erased
                later = tuple(single for single in self.pending if single.id > last)
                return {"segments": moved[0] if moved else self.segments, "pending": later}
            case Forget():
                before = () if action.folds else self.tombstones
                return {"tombstones": (*before, action.tombstones)}
            case Relabel():
                sets = self.label_sets
                if action.label_set is not None and action.label_set not in {s.name for s in sets}:
                    sets = (*sets, LabelSet(name=action.label_set))
                return {"labels": (*(() if action.folds else self.labels), action.labels), "label_sets": sets}
            case SetLabelSet():
                others = tuple(s for s in self.label_sets if s.name != action.label_set.name)
                return {"label_sets": (*others, action.label_set)}
            case SetIndex():
                return {"index": action.index}
            case BreakLeases():
                return {"broken": (*self.broken, *action.leases)[-MAX_BROKEN:]}
            case SetState():
                return dict(action.state)

    def _with(self, segment: Segment) -> tuple[Segment, ...]:
        """The segments in order of their numbers, so that ids ascend from file to file, whoever came first."""
        others = [known for known in self.segments if known.number != segment.number]
        return tuple(sorted((*others, segment), key=lambda known: known.number))

    def _with_singles(self, action: AddSingles) -> dict[str, object]:
        number, added = action.segment, len(action.entries)
        known = [segment for segment in self.segments if segment.number == number]
        segment = known[0] if known else _segment_of_singles(number, action.identity)
        grown = {"planned": segment.planned + added, "num_entries": segment.num_entries + added}
        return {
            "segments": self._with(segment.model_copy(update=grown)),
            "singles": Singles(segment=number, next_row=action.next_row),
            "pending": (*self.pending, *action.entries),
        }

    def conflict(self, action: Action, base: "State") -> str | None:
        """Why an action prepared on `base` cannot follow this state; None when it can."""
        match action:
            case SetIdentity() if self.identity is not None and self.identity != action.identity:
                return f"another writer made this a memory of {self.identity}"
            case AddSegment() | AddSingles():
                return self._conflict_of_add(action)
            case SetIndex():
                generation = self.index.generation if self.index else None
                shards = len(self.index.shards) if self.index else 0
                if (generation, shards) != (action.replaces, action.replaces_shards):
                    return "another writer has changed the index"
                if self._is_cut_by(action.index):
                    return "another writer has moved entries that were being indexed into one file with others"
        if not isinstance(action, SetIdentity) and self.rewrites != base.rewrites:
            return "another writer has erased entries or rolled the memory back"
        return None

    def _conflict_of_add(self, action: AddSegment | AddSingles) -> str | None:
        added = action.segment.identity if isinstance(action, AddSegment) else action.identity
        if self.identity is not None and self.identity.fingerprint != added:
            return f"another writer made this a memory of {self.identity}"
        if isinstance(action, AddSegment):
            number = action.segment.number
            same = {s.number for s in self.segments if s.fingerprint == action.segment.fingerprint}
            if same - set(action.beside) or number in self.retired:
                return "another writer has added the same source"
        return None

    def entries_files(self) -> list[RowsFile]:
        """All entries files, in order of their ids."""
        files = [*self.packs, *(file for segment in self.segments for file in segment.entries)]
        return sorted(files, key=lambda file: file.first_id)

    def fresh_files(self) -> list[RowsFile]:
        """Entries files that no shard covers, in order of their ids."""
        files = self.entries_files()
        shards = shards_of(np.array([file.first_id for file in files], np.int64), self.index)
        return [file for file, shard in zip(files, shards.tolist(), strict=True) if shard < 0]

    def _is_cut_by(self, index: Index) -> bool:
        """Whether a shard covers the beginning of an entries file and not its end, which would never be searched."""
        files = self.entries_files()
        begin = shards_of(np.array([file.first_id for file in files], np.int64), index)
        end = shards_of(np.array([file.last_id for file in files], np.int64), index)
        return bool(((begin >= 0) & (begin != end)).any())

    @property
    def num_fresh(self) -> int:
        """Entries that no shard covers, forgotten ones included."""
        return sum(file.rows for file in self.fresh_files()) + len(self.pending)


def shards_of(ids_N: np.ndarray, index: Index | None) -> np.ndarray:
    """The position of the shard that covers each of some ids (int64 [N]), -1 where none does."""
    covers = sorted((*span, at) for at, shard in enumerate(index.shards) for span in shard.covers) if index else []
    if not covers:
        return np.full(len(ids_N), -1)
    spans = np.array(covers, np.int64)
    at = np.maximum(np.searchsorted(spans[:, 0], ids_N, side="right") - 1, 0)
    inside = (ids_N >= spans[at, 0]) & (ids_N <= spans[at, 1])
    shards: np.ndarray = np.where(inside, spans[at, 2], -1)
    return shards


def _segment_of_singles(number: int, identity: str) -> Segment:
    return Segment(
        number=number,
        source="",
        dataset="",
        identity=identity,
        fingerprint=SINGLES,
        planned=0,
        num_entries=0,
        num_rejected=0,
        plan=None,
        entries=(),
        rejected=(),
    )


def file_refs(part: object) -> Iterator[FileRef]:
    """Every file that a state, an action or any piece of them names."""
    if isinstance(part, FileRef):
        yield part
    elif isinstance(part, BaseModel):
        for _, value in part:
            yield from file_refs(value)
    elif isinstance(part, tuple):
        for value in part:
            yield from file_refs(value)


SetState.model_rebuild()

"""What a memory is at one version, and the actions whose folding makes it.

A commit lists actions; the state is what they add up to. Both are written as JSON, and unknown fields are refused, so
that a file of a later release is named rather than misread.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, Field

from pipeline.store.log.records import Index, LabelSet, Record, Segment, Single, Singles, shards_of
from pipeline.store.segments.reservations import SINGLES
from pipeline.store.storage.file_refs import FileRef, RowsFile
from pipeline.store.tables.identity import Identity
from pipeline.store.tables.kept_columns import KeptColumn, union
from pipeline.store.values import Count, Generation, Nonce, SegmentNumber, VersionNumber

MAX_BROKEN = 1_000  # a lease broken longer ago than this many others belongs to no process that still runs


class SetIdentity(Record):
    """The encoder of the memory, fixed by the first add; no weights where vectors were given without one."""

    action: Literal["set_identity"] = "set_identity"
    identity: Identity
    weights: FileRef | None


class AddSegment(Record):
    """A finished segment becomes part of the memory.

    `beside` numbers the segments of the same fingerprint that the writer knew of, all of whose entries are forgotten.
    """

    action: Literal["add_segment"] = "add_segment"
    segment: Segment
    beside: tuple[SegmentNumber, ...] = ()


class AddSingles(Record):
    """Entries added by themselves; `segment` is the one of single adds, `next_row` the row that comes after them."""

    action: Literal["add_singles"] = "add_singles"
    segment: SegmentNumber
    next_row: Count
    identity: str
    entries: tuple[Single, ...]


class FoldSingles(Record):
    """Single adds lie in these files from now on, up to the last id in them; later ones stay in their commits.

    Their thumbnails lie in `thumbnails`, up to the same id, and `offsets` tell which were read at their uri.
    """

    action: Literal["fold_singles"] = "fold_singles"
    segment: SegmentNumber
    files: tuple[RowsFile, ...]
    thumbnails: tuple[RowsFile, ...] = ()
    offsets: tuple[RowsFile, ...] = ()


class Forget(Record):
    """Tombstones for the ids listed in a file. `forgotten` counts those that were live before.

    With `folds` the file also lists every id forgotten before, and stands for the files that did.
    """

    action: Literal["forget"] = "forget"
    tombstones: FileRef
    forgotten: Count
    folds: bool = False


class Relabel(Record):
    """Other labels for the ids listed in a file; `folds` as in Forget. `label_set` None is the labels as stored."""

    action: Literal["relabel"] = "relabel"
    labels: FileRef
    relabelled: Count
    label_set: str | None = None
    folds: bool = False


class SetLabelSet(Record):
    """A label set is made, or its map exchanged."""

    action: Literal["set_label_set"] = "set_label_set"
    label_set: LabelSet


class SetIndex(Record):
    """Search through this index from now on. `replaces` is the generation it was built beside, None for none."""

    action: Literal["set_index"] = "set_index"
    index: Index
    replaces: Generation | None
    replaces_shards: Count = 0


class BreakLeases(Record):
    """Whoever worked under these leases is taken for dead, and its files may be removed: it cannot commit any more."""

    action: Literal["break_leases"] = "break_leases"
    leases: tuple[Nonce, ...]


class SetState(Record):
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


class State(Record):
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

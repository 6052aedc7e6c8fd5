"""The state of a memory at one version, and the actions that change a state.

A commit lists actions; the state is the result of applying all actions in order. Both are written as JSON. Unknown
fields are refused: a file of a later release raises an error and is never misread.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from pipeline.errors import ConflictCause
from pipeline.store.log.records import Index, LabelSet, Record, Segment, Single, Singles, shards_of
from pipeline.store.segments.reservations import SINGLES
from pipeline.store.storage.file_refs import FileRef, RowsFile
from pipeline.store.tables.identity import Identity
from pipeline.store.tables.kept_columns import KeptColumn, union
from pipeline.store.values import Count, Generation, Nonce, PathInside, SegmentNumber, VersionNumber

MAX_BROKEN = 1_000  # after this many later ones, the process of a broken lease no longer runs


class SetIdentity(Record):
    """The encoder of the memory, fixed by the first add; `weights` is None if vectors were given without an encoder."""

    action: Literal["set_identity"] = "set_identity"
    identity: Identity
    weights: FileRef | None


class Counts(Record):
    """A file of changes to the numbers of live entries by dataset and label.

    With `folds` the file has the numbers themselves, and replaces all earlier files of counts.
    """

    file: FileRef
    folds: bool = False


class AddSegment(Record):
    """A finished segment becomes part of the memory.

    `beside` are the numbers of segments with the same fingerprint that the writer knew of. All of their entries are
    forgotten. `counts` None, here and in other actions, means that an older release or an erasure left them unknown.
    """

    action: Literal["add_segment"] = "add_segment"
    segment: Segment
    beside: tuple[SegmentNumber, ...] = ()
    counts: Counts | None = None


class AddSingles(Record):
    """Entries added by themselves; `segment` is the segment of single adds, `next_row` the first row after them."""

    action: Literal["add_singles"] = "add_singles"
    segment: SegmentNumber
    next_row: Count
    identity: str
    entries: tuple[Single, ...]


class FoldSingles(Record):
    """Single adds up to the last id in `files` lie in these files from now on; later ones stay in their commits.

    Their thumbnails lie in `thumbnails`, up to the same id. `offsets` lists the images that were read at their uri.
    """

    action: Literal["fold_singles"] = "fold_singles"
    segment: SegmentNumber
    files: tuple[RowsFile, ...]
    thumbnails: tuple[RowsFile, ...] = ()
    offsets: tuple[RowsFile, ...] = ()
    counts: Counts | None = None


class Forget(Record):
    """Tombstones for the ids listed in a file. `forgotten` counts the ids that were live before.

    The file also lists the ids of the files that it `replaces`. With `folds`, which older releases wrote, it replaces
    all earlier files of tombstones.
    """

    action: Literal["forget"] = "forget"
    tombstones: RowsFile | FileRef
    forgotten: Count
    folds: bool = False
    replaces: tuple[PathInside, ...] = ()
    counts: Counts | None = None


class Relabel(Record):
    """New labels for the ids listed in a file. `label_set` None corrects the stored labels.

    `folds` and `replaces` as in Forget: the file also has the newest rows of the files that it replaces.
    """

    action: Literal["relabel"] = "relabel"
    labels: RowsFile | FileRef
    relabelled: Count
    label_set: str | None = None
    folds: bool = False
    replaces: tuple[PathInside, ...] = ()
    counts: Counts | None = None


class SetLabelSet(Record):
    """A label set is created, or its map is replaced."""

    action: Literal["set_label_set"] = "set_label_set"
    label_set: LabelSet


class SetIndex(Record):
    """Search through this index from now on. `replaces` is the generation in use when it was built (None: no index)."""

    action: Literal["set_index"] = "set_index"
    index: Index
    replaces: Generation | None
    replaces_shards: Count = 0


class BreakLeases(Record):
    """The holders of these leases are presumed dead: their files may be removed, and they can no longer commit."""

    action: Literal["break_leases"] = "break_leases"
    leases: tuple[Nonce, ...]


class SetState(Record):
    """Replace the whole state of the memory; `why` is the verb that wrote the action."""

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


class Conflict(NamedTuple):
    """Why an action cannot follow a state, and the same as the beginning of a sentence."""

    reason: ConflictCause
    said: str


class State(Record):
    """A memory at one version.

    `packs` hold the entries of compacted segments. `pending` are single adds that are not folded into a file yet.
    `counts` are files of the numbers of live entries by dataset and label, which add up; entries in `pending` are not
    in them, and None means that the numbers are unknown. `retired` are segments that a rollback removed; their numbers
    stay used. `rewrites` counts rollbacks and erasures: work prepared before one conflicts after it. `erasures` are the
    nonces of the erasures whose entries must be removed from older versions. `broken` are the newest leases whose
    holders were presumed dead.
    """

    version: VersionNumber = 0
    identity: Identity | None = None
    weights: FileRef | None = None
    segments: tuple[Segment, ...] = ()
    packs: tuple[RowsFile, ...] = ()
    singles: Singles | None = None
    pending: tuple[Single, ...] = ()
    tombstones: tuple[RowsFile | FileRef, ...] = ()
    labels: tuple[RowsFile | FileRef, ...] = ()
    counts: tuple[FileRef, ...] | None = None
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
        """Entries that are not forgotten. An id is listed in at most one file of tombstones."""
        return self.num_entries - sum(file.rows for file in self.tombstones)

    @property
    def kept(self) -> tuple[KeptColumn, ...]:
        """The kept columns of all segments that have entries."""
        return union([segment.kept for segment in self.segments if segment.num_entries])

    def after(self, action: Action) -> "State":
        """The state after an action."""
        return self.model_copy(update=self._changes(action))

    def _changes(self, action: Action) -> dict[str, object]:  # noqa: C901, PLR0911  # one or two lines for each action
        match action:
            case SetIdentity():
                return {"identity": action.identity, "weights": action.weights}
            case AddSegment():
                return {"segments": self._with(action.segment), "counts": self._counts_after(action.counts)}
            case AddSingles():
                return self._with_singles(action)
            case FoldSingles():
                folded = [segment for segment in self.segments if segment.number == action.segment]
                moved_to = {"entries": action.files, "thumbnails": action.thumbnails, "offsets": action.offsets}
                moved = [self._with(segment.model_copy(update=moved_to)) for segment in folded]
                last = action.files[-1].last_id if action.files else -1  # no file is left if all were erased
                later = tuple(single for single in self.pending if single.id > last)
                segments = moved[0] if moved else self.segments
                return {"segments": segments, "pending": later, "counts": self._counts_after(action.counts)}
            case Forget():
                tombstones = (*_left(self.tombstones, action), action.tombstones)
                return {"tombstones": tombstones, "counts": self._counts_after(action.counts)}
            case Relabel():
                sets = self.label_sets
                if action.label_set is not None and action.label_set not in {s.name for s in sets}:
                    sets = (*sets, LabelSet(name=action.label_set))
                files = (*_left(self.labels, action), action.labels)
                counts = self._counts_after(action.counts) if action.label_set is None else self.counts
                return {"labels": files, "label_sets": sets, "counts": counts}
            case SetLabelSet():
                others = tuple(s for s in self.label_sets if s.name != action.label_set.name)
                return {"label_sets": (*others, action.label_set)}
            case SetIndex():
                return {"index": action.index}
            case BreakLeases():
                return {"broken": (*self.broken, *action.leases)[-MAX_BROKEN:]}
            case SetState():
                return dict(action.state)

    @property
    def known_counts(self) -> tuple[FileRef, ...] | None:
        """`counts`, which are no files for a memory without entries in files; None if the numbers are unknown."""
        only_pending = self.num_entries == len(self.pending) and not (self.tombstones or self.labels)
        return () if self.counts is None and only_pending else self.counts

    def _counts_after(self, counts: Counts | None) -> tuple[FileRef, ...] | None:
        known = () if counts is not None and counts.folds else self.known_counts
        return None if counts is None or known is None else (*known, counts.file)

    def _with(self, segment: Segment) -> tuple[Segment, ...]:
        """The segments with this one added, ordered by number: ids ascend from file to file in any commit order."""
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

    def conflict(self, action: Action, base: "State") -> Conflict | None:
        """The reason why an action prepared on `base` cannot follow this state; None if it can."""
        match action:
            case SetIdentity() if self.identity is not None and self.identity != action.identity:
                return Conflict("another encoder", f"another writer made this a memory of {self.identity}")
            case AddSegment() | AddSingles():
                return self._conflict_of_add(action)
            case SetIndex():
                generation = self.index.generation if self.index else None
                shards = len(self.index.shards) if self.index else 0
                if (generation, shards) != (action.replaces, action.replaces_shards):
                    return Conflict("index changed", "another writer has changed the index")
                if self._is_cut_by(action.index):
                    return Conflict(
                        "entries moved",
                        "another writer has moved entries that were being indexed into one file with others",
                    )
        if not isinstance(action, SetIdentity) and self.rewrites != base.rewrites:
            return Conflict("rewritten", "another writer has erased entries or rolled the memory back")
        return None

    def _conflict_of_add(self, action: AddSegment | AddSingles) -> Conflict | None:
        added = action.segment.identity if isinstance(action, AddSegment) else action.identity
        if self.identity is not None and self.identity.fingerprint != added:
            return Conflict("another encoder", f"another writer made this a memory of {self.identity}")
        if isinstance(action, AddSegment):
            number = action.segment.number
            same = {s.number for s in self.segments if s.fingerprint == action.segment.fingerprint}
            if same - set(action.beside) or number in self.retired:
                return Conflict("same source", "another writer has added the same source")
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
        """Whether a shard covers the begin of an entries file but not its end: the end would never be searched."""
        files = self.entries_files()
        begin = shards_of(np.array([file.first_id for file in files], np.int64), index)
        end = shards_of(np.array([file.last_id for file in files], np.int64), index)
        return bool(((begin >= 0) & (begin != end)).any())

    @property
    def num_fresh(self) -> int:
        """Entries that no shard covers, forgotten ones included."""
        return sum(file.rows for file in self.fresh_files()) + len(self.pending)


def _left(files: tuple[RowsFile | FileRef, ...], action: Forget | Relabel) -> tuple[RowsFile | FileRef, ...]:
    """The overlay files that stay beside the new one."""
    return () if action.folds else tuple(file for file in files if file.path not in action.replaces)


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
    """Every file that a state, an action, or a part of one names."""
    if isinstance(part, FileRef):
        yield part
    elif isinstance(part, BaseModel):
        for _, value in part:
            yield from file_refs(value)
    elif isinstance(part, tuple):
        for value in part:
            yield from file_refs(value)


SetState.model_rebuild()

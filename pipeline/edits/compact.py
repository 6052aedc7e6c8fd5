"""Compacting merges many small files into few; ids do not change.

Single adds are moved from their commits into files, small entries files that follow each other are packed into one, and
the tombstones, the corrected labels and the counts become one file each. The files that older versions name stay until
`expire` drops these versions.

The packs, and the digests of segments that have none, are steps of a job: they run in this process or on Ray, each
leaves a completion mark (pack_marks.py), and a killed compaction goes on from the marks. The rest is small: it is made
anew.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pipeline.edits.pack_marks import Made, key_of, make_and_mark, take_up
from pipeline.edits.segment_sides import with_digests
from pipeline.errors import CommitConflict, DamagedFile
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.steps import PROCESS_BYTES, RunSteps, Step, run_steps_here
from pipeline.store.layout import pack_mark_path, packed_path
from pipeline.store.log.label_counts import count_singles
from pipeline.store.log.records import Index, Segment, shards_of
from pipeline.store.log.single_adds import files_beside_singles, files_of_singles, fold
from pipeline.store.log.state import BreakLeases, FoldSingles, SetState, State, file_refs
from pipeline.store.log.version_log import VersionLog
from pipeline.store.segments import reservations
from pipeline.store.storage.file_refs import FileRef, RowsFile
from pipeline.store.storage.interface import Storage, released
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.counts import added, read_counts, write_counts
from pipeline.store.tables.ids import first_id, split_id
from pipeline.store.tables.kept_columns import join_entries
from pipeline.store.tables.labels import newest_rows, read_label_rows, write_labels
from pipeline.store.tables.schemas import read_table, write_rows
from pipeline.store.tables.tombstones import read_tombstones, write_tombstones

SMALL_ROWS = 8_192  # a file below this is worth packing
PACK_ROWS = 65_536
ENTRY_BYTES = 600  # a generous estimate for all columns of an entry but its vector, while a pack is joined and written
DIGEST_BYTES = 256 << 20  # for the digests of a segment: one file of them is sorted at a time


@dataclass(frozen=True)
class CompactReport:
    """The number of files with entries, tombstones and labels that the memory is read from, before and after.

    `pending` counts the single adds that were stored in their commits before. `committed` is false if there was nothing
    to pack.
    """

    state: State = field(repr=False)
    files_before: int
    files_after: int
    pending: int = 0
    committed: bool = False

    @property
    def version(self) -> int:
        return self.state.version

    def to_json(self) -> dict:
        """The report as a JSON object."""
        return {
            "version": self.version,
            "committed": self.committed,
            "files_before": self.files_before,
            "files_after": self.files_after,
            "pending": self.pending,
            "entries": self.state.num_live,
        }


def compact(
    log: VersionLog,
    command: str = "compact",
    on_progress: OnProgress = ignore_progress,
    run_steps: RunSteps = run_steps_here,
) -> CompactReport:
    """Pack small files of the newest version. Commits nothing if there is nothing to pack. Raises CommitConflict.

    Each pack is one step, which reads and writes up to PACK_ROWS rows: that bounds the memory, beside the forgotten ids
    and the corrected labels. Killed and repeated, it takes up the packs that were finished: a request of about 1 KB for
    each, and none of their rows.
    """
    base = log.latest()
    before = _num_files(base)
    if not _has_work(log.storage, base):
        return CompactReport(base, before, before)
    with Lease(log.storage, "compact") as lease:
        packer = _Packer(log.storage, lease, on_progress, run_steps)

        def prepare(version: int, now: State) -> list[SetState | BreakLeases]:
            # Other writers commit in milliseconds, so packed files are used again if they still fit.
            if packer.packed is None or not packer.packed.fits(now):
                try:
                    packer.pack(now)
                except DamagedFile as error:  # the file may also be one that a newer version no longer names
                    if log.latest().version == now.version:
                        raise
                    raise CommitConflict(
                        "another writer removed files meanwhile, and nothing was changed: run the command again",
                        "versions dropped",
                    ) from error
            assert packer.packed is not None  # noqa: S101
            # Whoever left packs that are used here is presumed dead. It must not remove them if it is not.
            broken = [BreakLeases(leases=packer.broken)] if packer.broken else []
            return [SetState(why="compact", state=packer.applied(version, now)), *broken]

        try:
            state = log.commit(base, command, prepare, lease, packer.marked)
        except CommitConflict:
            packer.remove_marks()
            now = log.latest()
            if lease.nonce not in now.broken:  # else another one that believed this one dead has committed its packs
                packer.remove_unused(now)
            raise
        packer.remove_marks()
        packer.remove_unused(state)
        return CompactReport(state, before, _num_files(state), len(base.pending), committed=True)


@dataclass(frozen=True)
class _Pack:
    """The files that one file replaces. `segment` is their segment (None: they belong to several segments)."""

    paths: tuple[str, ...]
    file: RowsFile
    segment: int | None


@dataclass(frozen=True)
class _Packed:
    """The files written for a state, and their use in that state or in a later one."""

    base: State
    fold: FoldSingles | None
    packs: tuple[_Pack, ...]
    tombstones: FileRef | None
    labels: FileRef | None
    digested: Mapping[int, Segment]  # segments that had no digests, by number, with them

    def fits(self, now: State) -> bool:
        """Whether other writers have only added to the state that these files were written for."""
        files = {file.path for file in now.entries_files()}
        return (
            all(file.path in files for file in self.base.entries_files())
            and files_of_singles(now) == files_of_singles(self.base)
            and files_beside_singles(now) == files_beside_singles(self.base)
            and now.index == self.base.index
            and now.pending[: len(self.base.pending)] == self.base.pending
        )

    def applied(self, now: State) -> State:
        """The packed form of a state that these files fit. It does not count the single adds that `fold` moves."""
        if self.fold is not None:
            now = now.after(self.fold)
        now = _with_packs(now, self.packs)
        changes: dict[str, object] = {}
        for name in ("tombstones", "labels"):  # a writer may have merged some of these files with its own
            merged, before, files = getattr(self, name), getattr(self.base, name), getattr(now, name)
            if merged is not None and files[: len(before)] == before:
                changes[name] = (merged, *files[len(before) :])
        if self.digested:
            changes["segments"] = tuple(self._with_digests(segment) for segment in now.segments)
        return now.model_copy(update=changes)

    def _with_digests(self, segment: Segment) -> Segment:
        found = self.digested.get(segment.number)
        if found is None or segment.uris:
            return segment
        return segment.model_copy(update={"uris": found.uris, "sha256s": found.sha256s})


@dataclass
class _Packer:
    """Writes the files of a compaction. `broken` are the leases of dead processes whose packs it has taken up."""

    storage: Storage
    lease: Lease
    on_progress: OnProgress
    run_steps: RunSteps
    packed: _Packed | None = None
    broken: tuple[str, ...] = ()
    _made: dict[str, Made] = field(default_factory=dict)
    _counts: FileRef | None = None

    def pack(self, state: State) -> None:
        """Write the files of `packed`; what was written for another state is used again if this one still needs it."""
        folded = fold(self.storage, self.lease, state, counts=False) if state.pending else None
        after = state.after(folded) if folded is not None else state
        packs = self._packs(after, state.version)
        if folded is not None and any(folded.files[-1].path in pack.paths for pack in packs):
            self.storage.delete([folded.files[-1].path])  # a pack holds its rows
        digested = self._digested(state)
        tombstones = labels = None
        if len(state.tombstones) > 1:
            ids_N = read_tombstones(self.storage, state.tombstones)
            tombstones = write_tombstones(self.storage, self.lease, state.version, ids_N)
        if len(state.labels) > 1:
            rows = newest_rows(read_label_rows(self.storage, state.labels))
            labels = write_labels(self.storage, self.lease, state.version, rows)
        self.packed = _Packed(state, folded, packs, tombstones, labels, digested)

    def applied(self, version: int, now: State) -> State:
        """The packed form of a state that `packed` fits, which `version` follows, with one file of counts."""
        assert self.packed is not None  # noqa: S101
        state, pending = self.packed.applied(now), self.packed.base.pending
        self.storage.delete([self._counts.path] if self._counts else [])  # of an attempt that lost a race
        if now.known_counts is None or not (pending or len(now.known_counts) > 1):
            return state
        rows = added([read_counts(self.storage, now.known_counts), count_singles(pending)])
        self._counts = write_counts(self.storage, self.lease, version, rows)
        return state.model_copy(update={"counts": (self._counts,)})

    def marked(self) -> set[str]:
        """The files that marks name. Whoever presumes this process dead may commit them."""
        return {file.path for made in self._made.values() for file in made.files}

    def remove_marks(self) -> None:
        """Remove the marks."""
        self.storage.delete([pack_mark_path(key) for key in self._made])

    def remove_unused(self, state: State) -> None:
        """Remove the packs of attempts that were lost; `state` is the newest."""
        own = {path for path in self.marked() if self.lease.nonce in path}
        self.storage.delete(sorted(own - {file.path for file in file_refs(state)}))

    def _packs(self, state: State, version: int) -> tuple[_Pack, ...]:
        groups = {key_of("pack", group): group for group in _groups(self.storage, state)}
        dimension = state.identity.dimension if state.identity else 0
        num_bytes = 3 * PACK_ROWS * (ENTRY_BYTES + 2 * dimension)
        pack = partial(_pack, self.storage, self.lease.nonce, version)
        self._make("packing", {key: (partial(pack, tuple(group)), num_bytes) for key, group in groups.items()})
        return tuple(_pack_of(self._made[key], group) for key, group in groups.items())

    def _digested(self, state: State) -> Mapping[int, Segment]:
        """The segments of a state without digests, with digests."""
        files = {segment.number: _files_of(state, segment) for segment in _undigested(state)}
        keys = {number: key_of(f"digests {number}", of) for number, of in files.items()}
        segments = {segment.number: segment for segment in state.segments if segment.number in files}
        digest = partial(_digest, self.storage, self.lease.nonce)
        wanted = {
            keys[number]: (partial(digest, segment, tuple(files[number])), DIGEST_BYTES)
            for number, segment in segments.items()
        }
        self._make("digesting names", wanted)
        made = {number: self._made[keys[number]] for number in segments}
        return {
            number: segment.model_copy(update={"uris": made[number].uris, "sha256s": made[number].sha256s})
            for number, segment in segments.items()
        }

    def _make(self, stage: str, wanted: Mapping[str, tuple[Callable[[], Made], int]]) -> None:
        """Do what has no mark, within so many bytes beside those of a process."""
        left = [key for key in wanted if key not in self._made]
        if left:
            taken, dead = take_up(self.storage, self.lease, left)
            self._made |= taken
            self.broken = (*self.broken, *(record.nonce for record in dead if record.nonce not in self.broken))
            left = [key for key in left if key not in taken]
        done = len(wanted) - len(left)
        if wanted:
            self.on_progress(Progress(stage, done, len(wanted)))
        steps = [
            Step(number, partial(make_and_mark, self.storage, key, wanted[key][0]), PROCESS_BYTES + wanted[key][1])
            for number, key in enumerate(left)
        ]
        for number, made in self.run_steps(steps):
            self._made[left[number]] = made
            done += 1
            self.on_progress(Progress(stage, done, len(wanted)))


def _pack(storage: Storage, nonce: str, version: int, group: Sequence[RowsFile]) -> Made:
    """Join the rows of some files to one file. Reads and writes up to PACK_ROWS rows."""
    with released(storage, *(file.path for file in group)):
        table = join_entries([read_table(storage, file) for file in group])
    # The path has the version and the first id, so that packs written for different states get different paths.
    path = packed_path(_segment_of(group), version, group[0].first_id, nonce)
    return Made(nonce=nonce, pack=write_rows(storage, path, table))


def _digest(storage: Storage, nonce: str, segment: Segment, files: Sequence[RowsFile]) -> Made:
    digested = with_digests(storage, nonce, segment, files)
    return Made(nonce=nonce, uris=digested.uris, sha256s=digested.sha256s)


def _pack_of(made: Made, group: Sequence[RowsFile]) -> _Pack:
    assert made.pack is not None  # noqa: S101  # its key is that of a pack
    return _Pack(tuple(file.path for file in group), made.pack, _segment_of(group))


def _segment_of(group: Sequence[RowsFile]) -> int | None:
    """The segment that all entries of some files belong to; None if they belong to several."""
    first, last = split_id(group[0].first_id)[0], split_id(group[-1].last_id)[0]
    return first if first == last else None


def small_rows(state: State) -> int:
    """The rows in files that are small enough to be packed."""
    return sum(file.rows for file in state.entries_files() if file.rows < SMALL_ROWS)


def _has_work(storage: Storage, state: State) -> bool:
    several = max(len(state.tombstones), len(state.labels), len(state.counts or ())) > 1
    return bool(state.pending or several or _undigested(state) or _groups(storage, state))


def _undigested(state: State) -> list[Segment]:
    """The segments whose entries are not found by digests: of older releases, and of adds that went on on a store."""
    single = state.singles.segment if state.singles else None
    return [s for s in state.segments if s.num_entries and not s.uris and s.number != single]


def _files_of(state: State, segment: Segment) -> list[RowsFile]:
    """The files that may hold entries of a segment."""
    first, last = first_id(segment.number, 0), first_id(segment.number + 1, 0) - 1
    return [*segment.entries, *(file for file in state.packs if file.last_id >= first and file.first_id <= last)]


def _groups(storage: Storage, state: State) -> list[list[RowsFile]]:
    """Runs of small files that may become one: one shard covers them, and no new id can come between them."""
    barriers = _numbers_to_come(storage, state)
    files = state.entries_files()
    shards = shards_of(np.array([file.first_id for file in files], np.int64), state.index).tolist()
    groups: list[list[RowsFile]] = [[]]
    rows, shard_before = 0, -1
    for file, shard in zip(files, shards, strict=True):
        group = groups[-1]
        if group and not (
            rows + file.rows <= PACK_ROWS
            and shard == shard_before
            and not _between(barriers, group[-1], file)
            and file.rows < SMALL_ROWS
        ):
            groups.append([])
            rows = 0
        if file.rows < SMALL_ROWS:
            groups[-1].append(file)
            rows, shard_before = rows + file.rows, shard
    return [group for group in groups if len(group) > 1]


def _numbers_to_come(storage: Storage, state: State) -> np.ndarray:
    """Segments that can still get entries: the one of single adds, and those of unfinished adds (int64, ascending)."""
    used = {*(segment.number for segment in state.segments), *state.retired}
    numbers = reservations.reserved_numbers(storage)
    coming = {number for number in numbers if number not in used and _may_come(storage, state, number)}
    if state.singles is not None:
        coming.add(state.singles.segment)
    return np.array(sorted(coming), np.int64)


def _may_come(storage: Storage, state: State, number: int) -> bool:
    """Whether a reserved segment can still be committed."""
    if reservations.is_given_up(storage, number):
        return False
    try:
        reservation = reservations.read_reservation(storage, number)
    except DamagedFile:  # the process that took the number has not described it yet, or died before
        return True
    return reservation is not None or state.singles is None  # None: reserved for single adds, which have a segment now


def _with_packs(state: State, packs: Sequence[_Pack]) -> State:
    """The state with the files of packs in place of the files they were made of. The cost is that of one pass."""
    named = {path for pack in packs for path in pack.paths}
    if not named:
        return state
    by_path = {file.path: file for file in state.entries_files() if file.path in named}
    of_segments: dict[int | None, list[RowsFile]] = {}
    for pack in packs:
        of_segments.setdefault(pack.segment, []).append(pack.file)

    def without(files: tuple[RowsFile, ...]) -> tuple[RowsFile, ...]:
        return tuple(file for file in files if file.path not in named)

    def placed(segment: Segment) -> Segment:
        entries = without(segment.entries)
        if segment.number in of_segments:
            entries = _in_order((*entries, *of_segments[segment.number]))
        return segment if entries == segment.entries else segment.model_copy(update={"entries": entries})

    spans = [(by_path[pack.paths[0]].first_id, by_path[pack.paths[-1]].last_id) for pack in packs]
    return state.model_copy(
        update={
            "segments": tuple(placed(segment) for segment in state.segments),
            "packs": _in_order((*without(state.packs), *of_segments.get(None, ()))),
            "index": _covering(state.index, spans),
        }
    )


def _covering(index: Index | None, packed: Sequence[tuple[int, int]]) -> Index | None:
    """The index with the ranges of shards joined within each pack (its first and last id, ascending).

    No fresh entry lies between the files of a pack, and one shard covers all of them or none.
    """
    if index is None:
        return None
    firsts = [first for first, _ in packed]
    shards = []
    for shard in index.shards:
        covers: list[tuple[int, int]] = []
        for begin, end in sorted(shard.covers):
            at = bisect.bisect_right(firsts, begin) - 1
            if covers and at >= 0 and begin <= packed[at][1] and covers[-1][0] <= packed[at][0] <= covers[-1][1]:
                covers[-1] = (covers[-1][0], end)
            else:
                covers.append((begin, end))
        joined = tuple(covers)
        shards.append(shard if joined == shard.covers else shard.model_copy(update={"covers": joined}))
    return index.model_copy(update={"shards": tuple(shards)})


def _in_order(files: tuple[RowsFile, ...]) -> tuple[RowsFile, ...]:
    return tuple(sorted(files, key=lambda file: file.first_id))


def _between(numbers: np.ndarray, before: RowsFile, after: RowsFile) -> bool:
    """Whether a segment that can still get entries lies between two files; the first file's segment counts too."""
    first, last = split_id(before.last_id)[0], split_id(after.first_id)[0]
    return first != last and bool(np.searchsorted(numbers, first) < np.searchsorted(numbers, last))


def _num_files(state: State) -> int:
    return len(state.entries_files()) + len(state.tombstones) + len(state.labels)

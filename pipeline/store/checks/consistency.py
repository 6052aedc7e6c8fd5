"""Checks that versions and the contents of their files agree, version by version.

Most of a state is the same from version to version. Only the changes of a version are checked, except for a version
that replaced the whole state. If a file is damaged, checks that need it are skipped.

Cost: a shard is compared with its own files, found by bisection, and one file's ids are written out at a time. Segments
are compared by runs of ids. So the time grows with the rows, and memory with the files and their gaps.
"""

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence

import numpy as np

from pipeline.store.checks.file_contents import FileFacts, off_unit
from pipeline.store.checks.findings import Finding, damage
from pipeline.store.checks.id_runs import IdRuns
from pipeline.store.checks.version_files import Step
from pipeline.store.layout import commit_path
from pipeline.store.log.records import Index, Segment, Shard, Single, shards_of
from pipeline.store.log.single_adds import thumbnails_of_singles, vectors_of_singles
from pipeline.store.log.state import State
from pipeline.store.segments.reservations import SINGLES
from pipeline.store.storage.file_ranges import FileRanges
from pipeline.store.storage.file_refs import FileRef, RowsFile
from pipeline.store.tables.ids import first_id, is_in, split_id
from pipeline.store.tables.kept_columns import KeptColumn

JPEG = b"\xff\xd8"  # the first bytes of a JPEG

RANGES_HELD = 4_096  # lists of files whose ranges are held; each is sorted again when it is needed later

_NONE = np.empty(0, np.int64)


class Consistency:
    """Checks one version after the other; `facts` holds the contents of undamaged files with ids, by path."""

    def __init__(self, facts: Mapping[str, FileFacts]) -> None:
        self._facts = facts
        self._seen: dict[tuple[int, ...], object] = {}  # by id(); references keep the ids from being reused
        self._tombstones: tuple[FileRef, ...] = ()
        self._forgotten = _NONE
        self._all_forgotten_known = True
        self._ranges: dict[int, tuple[object, FileRanges[RowsFile]]] = {}  # by id() of the files, as `_seen`
        self._entries_of: tuple[object, object, FileRanges[RowsFile]] | None = None
        self.numbers: set[int] = set()

    def check(self, step: Step) -> Iterator[Finding]:
        """The contradictions in one version. Versions must be given in order."""
        state = step.after
        if state is None:
            return
        before = State() if step.before is None or step.is_whole else step.before
        path = commit_path(step.number)
        for what in self._disagreements(state, before, step.is_whole):
            yield damage(path, what)

    def _disagreements(self, state: State, before: State, wholly: bool) -> Iterator[str]:
        self.numbers |= {segment.number for segment in state.segments} | set(state.retired)
        if state.singles is not None:
            self.numbers.add(state.singles.segment)
        yield from self._identity(state)
        if state.segments is not before.segments or state.packs is not before.packs:
            yield from self._segments(state)
        yield from self._pending(state, before)
        forgotten_now = yield from self._forget(state, wholly)
        missing = self._missing(state, forgotten_now)
        if len(missing):
            yield f"forgets {len(missing):,} ids that are no entries, the first {missing[0]}"
        yield from self._labels(state, before)
        yield from self._counts(state)
        if state.index is not None:
            moved = state.segments is not before.segments or state.packs is not before.packs
            yield from self._index(state, state.index, wholly, moved)

    def _is_new(self, *parts: object) -> bool:
        """Whether these objects, by identity, have not been checked together yet."""
        key = tuple(id(part) for part in parts)
        if key in self._seen:
            return False
        self._seen[key] = parts
        return True

    # Segments

    def _identity(self, state: State) -> Iterator[str]:
        if state.identity is None:
            if state.segments:
                yield "has entries and names no encoder"
            return
        if state.identity.is_given:
            if state.weights is not None:
                yield "names weights for vectors that were given without an encoder"
        elif state.weights is None or state.weights.path != state.identity.weights_path:
            yield "names other weights than its encoder's"

    def _segments(self, state: State) -> Iterator[str]:
        numbers = [segment.number for segment in state.segments]
        if len(set(numbers)) != len(numbers):
            yield "holds a segment twice"
        for number in set(numbers) & set(state.retired):
            yield f"holds segment {number}, which was retired"
        if self._is_new(state.packs):
            yield from self._order("packs", state.packs)
        for file in state.packs:
            if file.path in self._facts:
                for number in self._facts[file.path].ids.segments() - set(numbers):
                    yield f"has entries of segment {number} in {file.path}, and no such segment"
        for segment in state.segments:
            if segment.fingerprint == SINGLES:
                yield from self._singles(state, segment)
            elif self._is_new(segment, state.packs):
                yield from self._segment(state, segment)
                yield from self._check_kept(state, segment)

    def _singles(self, state: State, segment: Segment) -> Iterator[str]:
        pending = sum(split_id(single.id)[0] == segment.number for single in state.pending)
        stored = sum(file.rows for file in segment.entries)
        if state.packs:
            ids = self._entries(state, segment)
            stored = len(ids) if ids is not None else segment.num_entries - pending
        if not segment.planned == segment.num_entries == stored + pending:
            yield f"tells of {segment.num_entries:,} single adds where {stored + pending:,} are there"
        if state.singles is None:
            yield "has single adds and does not say where the next goes"
            return
        if state.singles.segment == segment.number:
            last = max([*(file.last_id for file in segment.entries), *(s.id for s in state.pending)], default=-1)
            if last >= first_id(segment.number, 0) + state.singles.next_row:
                yield "would give an id of a single add to another"
        if self._is_new(segment.entries):
            yield from self._order(f"segment {segment.number}", segment.entries)
        if self._is_new(segment.thumbnails, segment.offsets):
            for _, files in _beside_entries(segment):
                yield from self._order(f"segment {segment.number}", files)
            entries = self._entries(state, segment)
            yield from self._beside(segment, entries) if entries is not None else ()

    def _segment(self, state: State, segment: Segment) -> Iterator[str]:
        """Check a segment made from a plan: each planned image must be an entry or rejected, exactly once."""
        name = f"segment {segment.number}"
        if state.identity is not None and segment.identity != state.identity.fingerprint:
            yield f"holds {name} of another encoder than its own"
        for files in (segment.entries, segment.rejected, segment.thumbnails, segment.offsets):
            yield from self._order(name, files)
        if segment.planned != segment.num_entries + segment.num_rejected:
            ends = f"{segment.num_entries:,} entries and {segment.num_rejected:,} rejected images"
            yield f"tells of {ends} in {name} where {segment.planned:,} were planned"
        planned = self._runs(segment.plan) if segment.plan is not None else IdRuns.of(_NONE)
        entries, rejected = self._entries(state, segment), self._all(segment.rejected)
        for found, told, thing in (
            (planned if segment.containers_from is None else None, segment.planned, "planned images"),
            (entries, segment.num_entries, "entries"),
            (rejected, segment.num_rejected, "rejected images"),
        ):
            if found is not None and len(found) != told:
                yield f"tells of {told:,} {thing} in {name} where {len(found):,} are there"
        if planned is None or entries is None or rejected is None:
            return
        if planned.segments() - {segment.number}:
            yield f"has a plan of {name} with ids of another"
        made = _planned_one_by_one(segment, IdRuns.joined([entries, rejected])).ordered()
        if not (planned.ascend and made.ascend and made.same_as(planned.ordered())):
            yield f"has other entries and rejected images in {name} than were planned"
        yield from self._beside(segment, entries)

    def _digests(self, segment: Segment, entries: IdRuns) -> Iterator[str]:
        """Check that every entry of a segment is found by digests, if any is."""
        for kind, files in (("uri", segment.uris), ("hash", segment.sha256s)):
            found = [self._facts[file.path].total for file in files if file.path in self._facts]
            same_rows = sum(file.rows for file in files) == len(entries)
            if len(found) == len(files) > 0 and not (same_rows and sum(found) == entries.total()):
                yield f"does not find every entry of segment {segment.number} by its {kind}"

    def _counts(self, state: State) -> Iterator[str]:
        """Check that the counts of a version add up to its live entries."""
        facts = [self._facts.get(file.path) for file in state.counts or ()]
        if state.counts is not None and None not in facts:
            counted = sum(known.total for known in facts if known is not None) + len(state.pending)
            if counted != state.num_live:
                yield f"counts {counted:,} live entries by label where {state.num_live:,} are live"

    def _beside(self, segment: Segment, entries: IdRuns) -> Iterator[str]:
        """Check that thumbnails and offsets of a segment have only ids of its entries."""
        for kind, files in _beside_entries(segment):
            found = self._all(files)
            if found is not None and not entries.ordered().hold(found):
                yield f"keeps {kind} in segment {segment.number} of what is no entry"
        yield from self._digests(segment, entries)

    def _check_kept(self, state: State, segment: Segment) -> Iterator[str]:
        """Check that every file with entries of a segment has its kept columns, in their type or as strings."""
        first, last = _ids_of(segment)
        files = [file for file in self._files_of(state, segment) if file.path in self._facts] if segment.kept else []
        for file in files:
            facts = self._facts[file.path]
            if len(facts.ids.within(first, last)):
                for column in segment.kept:
                    if not {column, KeptColumn(name=column.name, type="string")} & {*facts.kept}:
                        yield f"keeps {column.name} ({column.type}) of segment {segment.number}, not so in {file.path}"

    def _order(self, name: str, files: Sequence[RowsFile]) -> Iterator[str]:
        for below, above in itertools.pairwise(files):
            if below.last_id >= above.first_id:
                yield f"has files in {name} whose ids overlap or do not ascend: {below.path}, {above.path}"

    # Single adds, tombstones and labels

    def _pending(self, state: State, before: State) -> Iterator[str]:
        """Check the single adds that are new in this version and not folded into a file yet."""
        known = len(before.pending) if state.pending[: len(before.pending)] == before.pending else 0
        singles = state.pending[known:]
        if not singles or state.identity is None:
            return
        ids = np.array([single.id for single in state.pending], np.int64)
        if (np.diff(ids) <= 0).any():
            yield "has single adds whose ids do not ascend"
        if any(not single.uri or not single.dataset for single in singles):
            yield "has single adds without a uri or a dataset"
        yield from self._vectors(singles, state.identity.dimension)
        yield from self._thumbnails(singles)
        stored = state.model_copy(update={"pending": ()})
        in_files = len(singles) - len(self._missing(stored, ids[known:], unknown_is_there=False))
        if in_files:
            yield f"has {in_files:,} single adds that lie in files too"

    def _vectors(self, singles: Sequence[Single], dimension: int) -> Iterator[str]:
        try:
            wrong = off_unit(vectors_of_singles(singles, dimension))
        except ValueError:  # binascii.Error is one
            yield "has single adds whose vectors cannot be read"
            return
        if len(wrong):
            yield f"has single adds whose vectors are not of unit length, the first of entry {singles[wrong[0]].id}"

    def _thumbnails(self, singles: Sequence[Single]) -> Iterator[str]:
        try:
            jpegs = thumbnails_of_singles(singles)
        except ValueError:
            jpegs = {singles[0].id: b""}
        if not all(jpeg.startswith(JPEG) for jpeg in jpegs.values()):
            yield "has single adds whose thumbnails cannot be read"

    def _forget(self, state: State, wholly: bool) -> Generator[str, None, np.ndarray]:
        """Yields a message if an id is forgotten twice; returns the ids to look up among the entries."""
        known = self._tombstones
        if state.tombstones == known:
            return self._forgotten if wholly else _NONE
        grows = state.tombstones[: len(known)] == known
        before = self._forgotten if grows else _NONE
        added = state.tombstones[len(known) :] if grows else state.tombstones
        ids = np.concatenate([_NONE, *(self._facts[f.path].ids_N for f in added if f.path in self._facts)])
        unique = np.unique(ids)
        new = unique[~is_in(unique, before)]
        self._tombstones, self._forgotten = state.tombstones, np.insert(before, np.searchsorted(before, new), new)
        self._all_forgotten_known = all(file.path in self._facts for file in state.tombstones)
        if len(new) != len(ids):
            yield "forgets an id twice"
        return self._forgotten if wholly else ids

    def _labels(self, state: State, before: State) -> Iterator[str]:
        known = before.labels
        added = state.labels[len(known) :] if state.labels[: len(known)] == known else state.labels
        sets = {label_set.name for label_set in state.label_sets} | {None}
        for file in added:
            facts = self._facts.get(file.path)
            if facts is None:
                continue
            missing = self._missing(state, facts.ids_N)
            if len(missing):
                yield f"labels {len(missing):,} ids that are no entries, the first {missing[0]}"
            for name in facts.label_sets - sets:
                yield f"gives labels in the label set {name}, which it does not have"

    def _missing(self, state: State, ids: np.ndarray, *, unknown_is_there: bool = True) -> np.ndarray:
        """The ids that are not entries of the state. With `unknown_is_there` a damaged file counts as holding an id."""
        if not len(ids):
            return _NONE
        ids = ids if (ids[1:] > ids[:-1]).all() else np.unique(ids)
        there = is_in(ids, np.sort(np.array([single.id for single in state.pending], np.int64)))
        segments = {segment.number: segment for segment in state.segments}
        numbers, starts = np.unique(ids >> 39, return_index=True)
        for number, start, stop in zip(numbers.tolist(), starts, [*starts[1:], len(ids)], strict=True):
            segment = segments.get(number)
            if segment is None:
                continue
            of_it, there_of_it = ids[start:stop], there[start:stop]
            for files in (segment.entries, state.packs):
                for file, here in self._by_id(files).holding(of_it):
                    held = self._ids(file)
                    there_of_it[here] |= unknown_is_there if held is None else is_in(of_it[here], np.sort(held))
        return ids[~there]

    # The index

    def _index(self, state: State, index: Index, wholly: bool, moved: bool) -> Iterator[str]:
        new = [shard for shard in index.shards if self._is_new(shard) or wholly]
        if new or moved:
            yield from self._covers(state, index)
        for shard in new:
            yield from self._shard(state, shard)

    def _covers(self, state: State, index: Index) -> Iterator[str]:
        """Check that each entries file as a whole is searched through one shard, or exactly."""
        spans = np.array(sorted(span for shard in index.shards for span in shard.covers), np.int64).reshape(-1, 2)
        if (spans[:-1, 1] >= spans[1:, 0]).any():
            yield "searches entries through two shards"
            return
        entries = self._entries_files(state)
        if not len(spans) or not entries.files:
            return
        begin_F = np.searchsorted(spans[:, 0], entries.first_F, "right")
        end_F = np.searchsorted(spans[:, 0], entries.last_F, "right")
        inside_F = (begin_F > 0) & (entries.last_F <= spans[begin_F - 1, 1])
        outside_F = (begin_F == end_F) & ((begin_F == 0) | (entries.first_F > spans[begin_F - 1, 1]))
        for file in (entries.files[at] for at in np.flatnonzero(~(inside_F | outside_F)).tolist()):
            ids = self._ids(file)
            if ids is not None and len(np.unique(shards_of(ids, index))) > 1:
                yield f"does not search all of {file.path} in one way: a shard covers some of its entries"

    def _shard(self, state: State, shard: Shard) -> Iterator[str]:
        ids = self._ids(shard.ids)
        if ids is None:
            return
        if shard.index is not None and shard.index.rows != shard.rows:
            yield f"tells of {shard.index.rows:,} rows in {shard.index.path} where the shard has {shard.rows:,}"
        missing = self._missing(state, ids)
        if len(missing):
            yield f"searches {len(missing):,} ids in shard {shard.number} that are no entries, the first {missing[0]}"
        known = np.sort(ids)
        covered = np.zeros(len(ids), bool)
        for first, last in shard.covers:
            covered |= (ids >= first) & (ids <= last)
            for file in self._entries_files(state).overlapping(first, last):
                held = self._ids(file)
                if held is not None and self._all_forgotten_known:
                    held = held[(held >= first) & (held <= last)]
                    lost = np.unique(held[~is_in(held, known)])
                    lost = lost[~is_in(lost, self._forgotten)]
                    if len(lost):
                        yield f"covers {len(lost):,} entries of {file.path} with a shard that has not got them"
        if not covered.all():
            yield f"has entries in shard {shard.number} that its ranges do not cover"

    # Ids by file

    def _ids(self, file: FileRef) -> np.ndarray | None:
        facts = self._facts.get(file.path)
        return facts.ids_N if facts is not None else None

    def _runs(self, file: FileRef) -> IdRuns | None:
        facts = self._facts.get(file.path)
        return facts.ids if facts is not None else None

    def _all(self, files: Sequence[FileRef]) -> IdRuns | None:
        """The ids in some files; None if one of the files is damaged."""
        lists = [self._runs(file) for file in files]
        known = [runs for runs in lists if runs is not None]
        return IdRuns.joined(known) if len(known) == len(lists) else None

    def _entries(self, state: State, segment: Segment) -> IdRuns | None:
        """The ids of a segment's entries, in its own files or in packs; None if one of the files is damaged."""
        runs = self._all(self._files_of(state, segment))
        return runs.within(*_ids_of(segment)) if runs is not None else None

    def _files_of(self, state: State, segment: Segment) -> list[RowsFile]:
        """The files that hold entries of a segment; packs may hold entries of other segments too."""
        return [*segment.entries, *self._by_id(state.packs).overlapping(*_ids_of(segment))]

    def _by_id(self, files: tuple[RowsFile, ...]) -> FileRanges[RowsFile]:
        """The ranges of some files of a state, which are the same object in the versions that share them."""
        if id(files) not in self._ranges:
            if len(self._ranges) >= RANGES_HELD:
                self._ranges.pop(next(iter(self._ranges)))
            self._ranges[id(files)] = files, FileRanges(files)
        return self._ranges[id(files)][1]

    def _entries_files(self, state: State) -> FileRanges[RowsFile]:
        """The ranges of all files with entries."""
        known = self._entries_of
        if known is None or known[0] is not state.segments or known[1] is not state.packs:
            known = self._entries_of = state.segments, state.packs, FileRanges(state.entries_files())
        return known[2]


def _beside_entries(segment: Segment) -> tuple[tuple[str, tuple[RowsFile, ...]], ...]:
    """The kinds of files beside the entries of a segment (thumbnails, offsets), each with its files."""
    return ("thumbnails", segment.thumbnails), ("offsets", segment.offsets)


def _ids_of(segment: Segment) -> tuple[int, int]:
    """The first and the last id that a segment can have."""
    return segment.number << 39, ((segment.number + 1) << 39) - 1


def _planned_one_by_one(segment: Segment, ids: IdRuns) -> IdRuns:
    """The ids without the ids of images in containers."""
    if segment.containers_from is None:
        return ids
    return ids.within(0, first_id(segment.number, segment.containers_from) - 1)

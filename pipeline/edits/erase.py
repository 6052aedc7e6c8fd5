"""Erasing: what was forgotten leaves every file and every version, so that not even its bytes are left.

New files are written without it, a version naming them is committed, older versions are redacted to name them too, and
only then the old files go. A plan written before the commit lets whoever comes next finish an erasure that was killed;
one that was killed before its commit has changed nothing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.edits.everything import Everything, Facts, facts_of, kind_of, may_hold
from pipeline.errors import CommitConflict
from pipeline.index.shards import holds_any_vector, shard_ids, without_entries
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store import segments
from pipeline.store.erasure import FOLDER, ErasurePlan, Rewritten
from pipeline.store.files import FileRef, RowsFile, describe
from pipeline.store.garbage import remove_garbage, take_census
from pipeline.store.leases import Lease, live, standing
from pipeline.store.schemas import read_table, write_rows, write_table
from pipeline.store.state import Index, SetState, Shard, State
from pipeline.store.storage import Storage
from pipeline.store.versions import VersionLog


@dataclass(frozen=True)
class ErasureReport:
    """What an erasure did: the version without the entries, files written anew and removed, versions redacted.

    `forgotten` counts the entries that were live until then. `index_dropped`: the trained quantizer was one of the vectors itself, so the index had to go.
    """

    state: State
    forgotten: int
    rewritten: tuple[str, ...]
    removed: tuple[str, ...]
    redacted: int
    index_dropped: bool


def erase(
    log: VersionLog, ids_N: np.ndarray, command: str, on_progress: OnProgress = ignore_progress
) -> tuple[Facts, ErasureReport]:
    """Erase entries (ids int64 [N]) that some version holds. Raises CommitConflict or DamagedFile."""
    finish_erasures(log)
    with Lease(log.storage, "erase") as lease:
        eraser = _Eraser(log, lease, ids_N, on_progress)

        def prepare(_: int, now: State) -> list[SetState]:
            return [SetState(why="erase", state=eraser.prepared(now))]

        base = log.latest()
        eraser.gather(base)
        committed = log.commit(base, eraser.plan.command(command), prepare, lease)
        redacted, removed = _finish(log, eraser.plan, "forget --erase", on_progress)
        report = ErasureReport(
            state=committed,
            forgotten=eraser.forgotten,
            rewritten=tuple(sorted(eraser.plan.files)),
            removed=tuple(removed),
            redacted=redacted,
            index_dropped=eraser.index_dropped,
        )
        return eraser.facts, report


def finish_erasures(log: VersionLog) -> int:
    """Carry on with erasures that were committed and killed; how many. Raises CommitConflict for one under way."""
    finished = 0
    for name in log.storage.list(FOLDER):
        nonce = name.removesuffix(".json")
        holders = [record for record in standing(log.storage) if record.nonce == nonce]
        for record in live(log.storage, holders):
            raise CommitConflict(f"{record.process} is erasing right now: wait until it is done")
        state = log.newest()
        if state is not None and nonce in state.erasures:
            plan = ErasurePlan.model_validate_json(log.storage.read(f"{FOLDER}/{name}"))
            _finish(log, plan, "verify --clean", ignore_progress)
            finished += 1
        else:
            log.storage.delete([f"{FOLDER}/{name}"])
    return finished


class _Eraser:
    def __init__(self, log: VersionLog, lease: Lease, ids_N: np.ndarray, on_progress: OnProgress) -> None:
        self._log = log
        self._storage = log.storage
        self._lease = lease
        self._progress = on_progress
        self._ids_N = np.unique(ids_N)
        self._ids = pa.array(self._ids_N)
        self._all = Everything()
        self._seen: set[str] = set()
        self.plan = ErasurePlan(nonce=lease.nonce, ids=frozenset(self._ids_N.tolist()), uris=frozenset())
        self.facts = Facts(self._ids_N, (), (), (), (), np.empty((0, 0), np.float16))
        self.index_dropped = False
        self.forgotten = 0

    def gather(self, state: State) -> None:
        """Read what the entries are, and which of their uris nothing else has."""
        self._all.look(self._log, state.version)
        self.facts = facts_of(self._log, self._all, self._ids_N)
        uris = set(self.facts.uris)
        self.plan.uris = frozenset(uris) - self._uris_of_others(pa.array(sorted(uris), pa.string()))

    def prepared(self, now: State) -> State:
        """The state to commit, every file of it that held something written anew, and the plan that says so."""
        self._all.look(self._log, now.version)
        rows = ("entries", "plan", "rejected", "thumbnails", "tombstones", "labels")
        todo = [file for file in self._all.of_kind(*rows) if file.path not in self._seen]
        for done, file in enumerate(todo):
            self._progress(Progress("rewriting", done, len(todo)))
            self._seen.add(file.path)
            rewritten = self._rewritten(file)
            if rewritten is not None:
                self.plan.files[file.path] = rewritten
        self._rewrite_shards(now)
        self._storage.replace(self.plan.path, self.plan.model_dump_json().encode())
        erased = self.plan.state(now)
        self.forgotten = now.num_live - erased.num_live
        erasures = (*now.erasures, self.plan.nonce)
        return erased.model_copy(update={"rewrites": now.rewrites + 1, "erasures": erasures})

    def _uris_of_others(self, uris: pa.Array) -> set[str]:
        """Those of the uris that entries have which are not erased."""
        others = {single.uri for single in self._all.singles.values() if single.id not in self.plan.ids}
        for file in self._all.of_kind("entries"):
            table = read_table(self._storage, file, ["id", "uri"])
            stay = pc.and_(pc.is_in(table.column("uri"), uris), pc.invert(pc.is_in(table.column("id"), self._ids)))
            others |= set(table.column("uri").filter(stay).to_pylist())
        return others

    def _rewritten(self, file: FileRef) -> Rewritten | None:
        """The file without what is erased, or None when it holds nothing of it."""
        kind = kind_of(file.path)
        by_uri = kind in ("plan", "rejected") and self.plan.uris
        if not by_uri and not may_hold(file, self._ids_N):
            return None
        columns = ["id", "uri"] if by_uri else ["id"]
        table = read_table(self._storage, file, columns)
        gone = pc.is_in(table.column("id"), self._ids)
        if by_uri:
            gone = pc.or_(gone, pc.is_in(table.column("uri"), pa.array(sorted(self.plan.uris), pa.string())))
        lost = table.column("id").filter(gone)
        if not len(lost):
            return None
        kept = read_table(self._storage, file).filter(pc.invert(gone))
        by: FileRef | None = None
        if kept.num_rows:
            path = f"{file.path.rpartition('/')[0]}/{self._lease.nonce}-{len(self.plan.files):06d}.parquet"
            by = self._written(path, kept, with_ids=isinstance(file, RowsFile))
        return Rewritten(by=by, ids=tuple(lost.to_pylist()))

    def _written(self, path: str, table: pa.Table, *, with_ids: bool) -> FileRef:
        if with_ids:
            return write_rows(self._storage, path, table)
        with self._storage.publishing(path) as local:
            write_table(table, local)
            return describe(path, local, table.num_rows)

    def _rewrite_shards(self, now: State) -> None:
        """Write the shards of the index in use anew; those of indexes past are given up where they held anything."""
        current = {shard.ids.path: shard for shard in now.index.shards} if now.index else {}
        for path, shard in self._all.shards.items():
            if path in self.plan.shards or path in self.plan.stale:
                continue
            holds = np.isin(shard_ids(self._storage, shard), self._ids_N).any()
            if holds and path not in current:
                self.plan.stale |= {path}
            elif holds and now.index is not None:
                self.plan.shards[path] = self._shard_anew(now.index, shard, now)
            elif self._at_border(shard):
                self.plan.shards[path] = self._with_covers(shard, now)
        if now.index is not None and self._quantizer_holds(now.index):
            self.index_dropped = True
            self.plan.stale |= set(current)

    def _shard_anew(self, index: Index, shard: Shard, now: State) -> Shard | None:
        assert now.identity is not None  # noqa: S101  # there are entries
        folder = f"{shard.ids.path.rpartition('/')[0]}-{self._lease.nonce}"
        anew = without_entries(self._storage, folder, index, shard, now.identity.dimension, self._ids_N)
        return self._with_covers(anew, now) if anew is not None else None

    def _at_border(self, shard: Shard) -> bool:
        return any(border in self.plan.ids for span in shard.covers for border in span)

    def _with_covers(self, shard: Shard, now: State) -> Shard:
        """A shard whose ranges begin and end with entries that stay."""
        files = self.plan.state(now.model_copy(update={"index": None})).entries_files()
        spans = []
        for first, last in shard.covers:
            inside = [file for file in files if first <= file.first_id and file.last_id <= last]
            if inside:
                spans.append((inside[0].first_id, inside[-1].last_id))
        return shard.model_copy(update={"covers": tuple(spans)})

    def _quantizer_holds(self, index: Index) -> bool:
        """Whether one of the vectors stands in the trained quantizer as it is: a centroid of a single row."""
        return index.trained is not None and holds_any_vector(self._storage, index.trained, self.facts.vectors_ND)


def _finish(log: VersionLog, plan: ErasurePlan, command: str, on_progress: OnProgress) -> tuple[int, list[str]]:
    """Redact the older versions, then remove the files that none of them needs any more, and last the plan.

    Each step leaves things so that beginning anew ends the same. Returns how many versions were redacted, and the paths
    removed.
    """
    redacted = _redact(log, plan, on_progress)
    removed = [path for path in _stale_marks(log, plan) if log.storage.exists(path)]
    log.storage.delete(removed)
    _redact_reservations(log, plan)
    census = take_census(log)
    hiding = {number for number in census.unfinished if _plans_erased(log.storage, number, plan)}
    spared = tuple(segments.segment_folder(number) for number in census.unfinished if number not in hiding)
    removed += remove_garbage(log, census, command, lambda path: not path.startswith(spared))
    log.storage.delete([plan.path])
    return redacted, removed


def _redact(log: VersionLog, plan: ErasurePlan, on_progress: OnProgress) -> int:
    kept = log.kept()
    redacted = 0
    for number in log.checkpoints():
        checkpoint = log.read_checkpoint(number)
        if (erased := plan.state(checkpoint)) != checkpoint:
            log.rewrite_checkpoint(erased)
    before = State() if kept[0] == 1 else log.read_checkpoint(kept[0])
    for commit in log.commits(kept):
        on_progress(Progress("redacting", commit.version - kept[0], len(kept)))
        if commit.version == kept[0] != 1:
            without, _ = plan.commit(commit, before)
            rows = {"rows_before": commit.rows_before, "rows_after": before.num_live}
            without = without.model_copy(update=rows)
        else:
            without, before = plan.commit(commit, before)
        if without != commit:
            log.rewrite(without)
            redacted += 1
    return redacted


def _touched_segments(plan: ErasurePlan) -> set[int]:
    return {int(path.split("/")[1]) for path in plan.files if path.startswith("segments/")}


def _stale_marks(log: VersionLog, plan: ErasurePlan) -> Iterator[str]:
    """Completion marks that name files which are no more: they have served since the segment was committed."""
    for number in _touched_segments(plan):
        folder = f"{segments.segment_folder(number)}done"
        yield from (f"{folder}/{name}" for name in log.storage.list(folder))


def _redact_reservations(log: VersionLog, plan: ErasurePlan) -> None:
    for number in segments.reserved(log.storage):
        path = f"{segments.segment_folder(number)}{segments.DESCRIPTION}"
        if not log.storage.exists(path):
            continue
        reservation = segments.read_reservation(log.storage, number)
        if reservation is not None and plan.source(reservation.source) != reservation.source:
            redacted = reservation.model_copy(update={"source": plan.source(reservation.source)})
            log.storage.replace(path, redacted.model_dump_json(indent=1).encode())


def _plans_erased(storage: Storage, number: int, plan: ErasurePlan) -> bool:
    """Whether an add that was interrupted was to remember what is erased: then it cannot go on."""
    reservation = segments.read_reservation(storage, number)
    if reservation is None or not storage.exists(reservation.plan.path):
        return True
    uris = read_table(storage, reservation.plan, ["uri"]).column("uri")
    return bool(pc.any(pc.is_in(uris, pa.array(sorted(plan.uris), pa.string()))).as_py())


def working_on_erased(storage: Storage, uris: Iterable[str]) -> list[str]:
    """Adds under way, by living processes, that plan some of these uris."""
    wanted = pa.array(sorted(set(uris)), pa.string())
    found = []
    for record in live(storage, standing(storage)):
        for number in (int(folder.split("/")[1]) for folder in record.holds if folder.startswith("segments/")):
            reservation = segments.read_reservation(storage, number)
            if reservation is not None:
                planned = read_table(storage, reservation.plan, ["uri"]).column("uri")
                if pc.any(pc.is_in(planned, wanted)).as_py():
                    found.append(str(record))
    return found

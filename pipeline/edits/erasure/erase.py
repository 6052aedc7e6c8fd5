"""Erases entries from every file and every version, so that not even their bytes remain.

New files are written without the entries, and a version that names these files is committed. Then older versions are
redacted to name them too, and only then the old files are deleted (redact.py). A plan is written before the commit.
With it, another process can finish an erasure that was killed. An erasure that was killed before its commit has changed
nothing.
"""

import contextlib
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.edits.erasure.all_versions import Duplicate, EntryFacts, facts_of
from pipeline.edits.erasure.byte_search import quantizer_holds
from pipeline.edits.erasure.redact import finish, finish_erasures
from pipeline.edits.erasure.rewriting import FILES_A_STEP, FILES_COMPARED, Comparer, Rewriter, ShardRewriter
from pipeline.errors import CommitConflict, VisualMemoryError
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.steps import RunSteps, run_steps_here
from pipeline.store.checks.garbage import remove_garbage, take_census
from pipeline.store.checks.inventory import Inventory
from pipeline.store.layout import (
    INDEX,
    Kind,
    folder_at_the_top,
    is_build,
)
from pipeline.store.log.erasure_plan import ErasurePlan
from pipeline.store.log.label_counts import count_singles
from pipeline.store.log.records import Shard
from pipeline.store.log.state import SetState, State, file_refs
from pipeline.store.log.version_log import VersionLog
from pipeline.store.lookup.entry_lookup import EntryLookup
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.counts import added, read_counts, write_counts
from pipeline.store.tables.digest_files import digests_in, digests_of_uris
from pipeline.store.tables.ids import within

WITH_IDS: tuple[Kind, ...] = ("entries", "plan", "rejected", "thumbnails", "offsets", "digests", "tombstones", "labels")


@dataclass(frozen=True)
class ErasureReport:
    """The result of an erasure: the state without the entries, and the paths of rewritten and removed files.

    `redacted` counts the redacted versions. `forgotten` counts the erased entries that were live before.
    `index_dropped` is true if the trained quantizer held one of the vectors unchanged, so that the index was dropped.
    `duplicates` are other entries with the uri or the hash of an erased entry; they stay.
    """

    state: State = field(repr=False)
    forgotten: int
    rewritten: tuple[str, ...]
    removed: tuple[str, ...]
    redacted: int
    index_dropped: bool
    duplicates: tuple[Duplicate, ...]


def erase(
    log: VersionLog,
    ids_N: np.ndarray,
    command: str,
    on_progress: OnProgress = ignore_progress,
    run_steps: RunSteps = run_steps_here,
) -> tuple[EntryFacts, ErasureReport]:
    """Erase entries (ids int64 [N]) that some version holds; `run_steps` does what is done to their files.

    Raises CommitConflict or DamagedFile.
    """
    finish_erasures(log)
    _give_up_builds(log, command)
    with Lease(log.storage, "erase") as lease:
        eraser = _Eraser(log, lease, ids_N, on_progress, run_steps)

        def prepare(_: int, now: State) -> list[SetState]:
            return [SetState(why="erase", state=eraser.prepared(now))]

        base = log.latest()
        eraser.gather(base)
        try:
            committed = log.commit(base, eraser.plan.command(command), prepare, lease)
        except CommitConflict:
            eraser.give_up()
            raise
        except BaseException:
            if not eraser.is_prepared:  # otherwise the version may have been published
                eraser.give_up()
            raise
        redacted, removed = finish(log, eraser.plan, "forget --erase", on_progress)
        report = ErasureReport(
            state=committed,
            forgotten=eraser.forgotten,
            rewritten=tuple(sorted(eraser.plan.files)),
            removed=tuple(removed),
            redacted=redacted,
            index_dropped=eraser.index_dropped,
            duplicates=tuple(eraser.duplicates.values()),
        )
        return eraser.facts, report


def _give_up_builds(log: VersionLog, command: str) -> None:
    """Remove the files of interrupted index builds: no version names them, and they hold whole vectors."""
    if any(map(is_build, log.storage.list(INDEX))):
        remove_garbage(log, take_census(log), command, lambda path: folder_at_the_top(path) == INDEX)


class _Eraser:
    def __init__(
        self, log: VersionLog, lease: Lease, ids_N: np.ndarray, on_progress: OnProgress, run_steps: RunSteps
    ) -> None:
        self._log = log
        self._storage = log.storage
        self._lease = lease
        self._progress = on_progress
        self._run_steps = run_steps
        self._num_named = 0  # files that were given a new name
        self._ids_N = np.unique(ids_N)
        self._all = Inventory()
        self._seen: set[str] = set()
        self._compared: set[str] = set()
        self._sound: set[str] = set()
        self._uris_of_others: set[str] = set()
        self.plan = ErasurePlan(nonce=lease.nonce, ids=frozenset(self._ids_N.tolist()), uris=frozenset())
        self.facts = EntryFacts(self._ids_N, (), (), (), (), np.empty((0, 0), np.float16))
        self.duplicates: dict[int, Duplicate] = {}
        self.index_dropped = False
        self.is_prepared = False
        self.forgotten = 0
        self._counted: FileRef | None = None

    def gather(self, state: State) -> None:
        """Read the fields of the entries, and find which of their uris no other entry has."""
        self._all.walk(self._log, last=state.version)
        self.facts = facts_of(self._log, self._all, self._ids_N)
        if len(self.facts.ids_N) < len(self._ids_N):
            raise CommitConflict(
                "another process has erased some of these entries meanwhile, and nothing was changed: run the command "
                "again",
                "rewritten",
            )
        self._compare()

    def prepared(self, now: State) -> State:
        """Rewrite every file that holds erased entries, write the plan, and return the state to commit."""
        self.is_prepared = False
        self._all.walk(self._log, last=now.version)
        self._compare()  # entries that other writers added meanwhile may share a uri with the erased ones
        digests_N = np.concatenate([digests_of_uris(self.facts.uris), digests_in(pa.array(self.facts.hashes))])
        rewriter = Rewriter(self._storage, self._lease.nonce, self._ids_N, frozenset(self.plan.uris), digests_N)
        unseen = [file for file in self._all.of_kind(*WITH_IDS) if file.path not in self._seen]
        self._seen |= {file.path for file in unseen}
        todo = [file for file in unseen if rewriter.may_change(file)]
        self._progress(Progress("rewriting", 0, len(todo)))
        steps = list(rewriter.steps(todo, self._num_named))
        self._num_named += len(todo)
        for done, (_, rewritten) in enumerate(self._run_steps(steps), start=1):
            self.plan.files |= dict(rewritten)
            self._progress(Progress("rewriting", min(done * FILES_A_STEP, len(todo)), len(todo)))
        self._give_up_indexes(now)
        self._rewrite_shards(now)
        self._storage.replace(self.plan.path, self.plan.model_dump_json().encode())
        erased = self.plan.state(now)
        self.forgotten = now.num_live - erased.num_live
        erasures = (*now.erasures, self.plan.nonce)
        self.is_prepared = True
        return erased.model_copy(
            update={"rewrites": now.rewrites + 1, "erasures": erasures, "counts": self._counts(now)}
        )

    def _counts(self, now: State) -> tuple[FileRef, ...] | None:
        """New counts without the erased entries, and without labels that only these had; None if `now` has none."""
        if now.known_counts is None:
            return None
        if self._counted is not None:  # of an attempt that lost a race
            self._storage.delete([self._counted.path])
        lookup = EntryLookup(self._storage, now)
        lost = count_singles([single for single in now.pending if single.id in self.plan.ids])  # counted as pending
        live = lookup.counts_of(self._ids_N[lookup.contains(self._ids_N)], -1)
        rows = added([read_counts(self._storage, now.known_counts), lost, live])
        self._counted = write_counts(self._storage, self._lease, now.version, rows)
        return (self._counted,)

    def give_up(self) -> None:
        """Remove the files written for an erasure that was not committed."""
        shards = [file for shard in self.plan.shards.values() for file in file_refs(shard)]
        written = [*(rewritten.by for rewritten in self.plan.files.values()), *shards, self._counted]
        paths = {file.path for file in written if file is not None and self._lease.nonce in file.path}
        with contextlib.suppress(VisualMemoryError, OSError):  # files that remain are garbage
            self._storage.delete([self.plan.path, *sorted(paths)])

    def _compare(self) -> None:
        """Find the remaining entries that share a uri or a hash with the erased ones.

        Reads three columns of each entries file that was not compared before.
        """
        uris, hashes = frozenset(self.facts.uris), frozenset(self.facts.hashes)
        found = [(s.id, s.uri, s.sha256) for s in self._all.singles.values() if s.uri in uris or s.sha256 in hashes]
        files = [file for file in self._all.of_kind("entries") if file.path not in self._compared]
        steps = list(Comparer(self._storage, uris, hashes).steps(files))
        for done, (_, same) in enumerate(self._run_steps(steps), start=1):
            found += same
            self._progress(Progress("comparing", min(done * FILES_COMPARED, len(files)), len(files)))
        self._compared |= {file.path for file in files}
        for entry_id, uri, sha256 in found:
            if entry_id not in self.plan.ids:
                same_as = [name for name, is_same in (("uri", uri in uris), ("hash", sha256 in hashes)) if is_same]
                self.duplicates[entry_id] = Duplicate(entry_id, uri, " and ".join(same_as))
                self._uris_of_others.add(uri)
        self.plan.uris = uris - self._uris_of_others

    def _give_up_indexes(self, now: State) -> None:
        """Give up every index whose trained quantizer holds one of the vectors unchanged."""
        for file, shards in self._all.quantizers.values():
            if shards <= self.plan.stale or file.path in self._sound:
                continue
            if quantizer_holds(self._storage, file, self.facts.vectors_ND):
                self.plan.stale |= shards
                self.index_dropped |= now.index is not None and now.index.trained == file
            else:
                self._sound.add(file.path)

    def _rewrite_shards(self, now: State) -> None:
        """Rewrite the shards of the index in use that hold erased entries; give up such shards of older indexes.

        Reads the ids of the shards whose ranges have one of the erased ids.
        """
        near: list[Shard] = []
        for path, shard in self._all.shards.items():
            if path in self.plan.shards or path in self.plan.stale or path in self._seen:
                continue
            if any(len(self._ids_N[within(self._ids_N, *span)]) for span in shard.covers):
                near.append(shard)
            else:
                self._seen.add(path)
        current = {shard.ids.path for shard in now.index.shards} if now.index else set()
        dimension = now.identity.dimension if now.identity else 0
        rewriter = ShardRewriter(self._storage, self._lease.nonce, self._ids_N, now.index, dimension)
        for done, (number, (holds, anew)) in enumerate(self._run_steps(rewriter.steps(near, now.entries_files())), 1):
            path = near[number].ids.path
            if not holds:
                self._seen.add(path)
            elif path in current:
                self.plan.shards[path] = anew
            else:
                self.plan.stale |= {path}
            self._progress(Progress("rewriting shards", done, len(near)))

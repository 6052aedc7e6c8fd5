"""Erases entries from every file and every version, so that not even their bytes remain.

New files are written without the entries, and a version that names these files is committed. Then older versions are
redacted to name them too, and only then the old files are deleted (redact.py). A plan is written before the commit.
With it, another process can finish an erasure that was killed. An erasure that was killed before its commit has changed
nothing.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.edits.erasure.all_versions import Duplicate, EntryFacts, facts_of, may_hold
from pipeline.edits.erasure.byte_search import quantizer_holds
from pipeline.edits.erasure.redact import finish, finish_erasures
from pipeline.edits.erasure.values import Values, in_batches
from pipeline.errors import CommitConflict, VisualMemoryError
from pipeline.index.search.shard_files import shard_ids, without_entries
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.checks.garbage import remove_garbage, take_census
from pipeline.store.checks.inventory import Inventory
from pipeline.store.layout import (
    INDEX,
    Kind,
    folder_at_the_top,
    is_build,
    kind_of,
    rewritten_path,
    rewritten_shard_folder,
)
from pipeline.store.log.erasure_plan import ErasurePlan, Rewritten
from pipeline.store.log.label_counts import count_singles
from pipeline.store.log.records import Index, Shard
from pipeline.store.log.state import SetState, State, file_refs
from pipeline.store.log.version_log import VersionLog
from pipeline.store.lookup.entry_lookup import EntryLookup
from pipeline.store.storage.file_refs import DigestsFile, FileRef
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.counts import added, read_counts, write_counts
from pipeline.store.tables.digest_files import digests_in, digests_of_uris, write_digests
from pipeline.store.tables.ids import is_in, within
from pipeline.store.tables.parquet_columns import read_columns_of
from pipeline.store.tables.row_groups import chosen_row_groups, write_some_rows
from pipeline.store.tables.schemas import read_table

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
    log: VersionLog, ids_N: np.ndarray, command: str, on_progress: OnProgress = ignore_progress
) -> tuple[EntryFacts, ErasureReport]:
    """Erase entries (ids int64 [N]) that some version holds. Raises CommitConflict or DamagedFile."""
    finish_erasures(log)
    _give_up_builds(log, command)
    with Lease(log.storage, "erase") as lease:
        eraser = _Eraser(log, lease, ids_N, on_progress)

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
    def __init__(self, log: VersionLog, lease: Lease, ids_N: np.ndarray, on_progress: OnProgress) -> None:
        self._log = log
        self._storage = log.storage
        self._lease = lease
        self._progress = on_progress
        self._ids_N = np.unique(ids_N)
        self._ids_in_order = self._ids_N.tolist()
        self._all = Inventory()
        self._seen: set[str] = set()
        self._compared: set[str] = set()
        self._sound: set[str] = set()
        self._uris_of_others: set[str] = set()
        self._own: tuple[frozenset[str], Values] | None = None
        self.plan = ErasurePlan(nonce=lease.nonce, ids=frozenset(self._ids_in_order), uris=frozenset())
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
        todo = [file for file in self._all.of_kind(*WITH_IDS) if file.path not in self._seen]
        for done, file in enumerate(todo):
            self._progress(Progress("rewriting", done, len(todo)))
            self._seen.add(file.path)
            rewritten = self._rewritten(file)
            if rewritten is not None:
                self.plan.files[file.path] = rewritten
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

        Reads three columns of each entries file that was not compared before, some files at a time.
        """
        uris, hashes = frozenset(self.facts.uris), frozenset(self.facts.hashes)
        wanted = Values(uris), Values(hashes)
        found = [(s.id, s.uri, s.sha256) for s in self._all.singles.values() if s.uri in uris or s.sha256 in hashes]
        files = [file for file in self._all.of_kind("entries") if file.path not in self._compared]
        tables = read_columns_of(self._storage, files, ["id", "uri", "sha256"])
        done = 0
        for table in in_batches(tables, max(map(len, wanted))):
            same = pc.or_(wanted[0].found_in(table.column("uri")), wanted[1].found_in(table.column("sha256")))
            found += [(row["id"], row["uri"], row["sha256"]) for row in table.filter(same).to_pylist()]
            done += table.num_rows
            self._progress(Progress("comparing", done, sum(file.rows for file in files)))
        self._compared |= {file.path for file in files}
        for entry_id, uri, sha256 in found:
            if entry_id not in self.plan.ids:
                same_as = [name for name, is_same in (("uri", uri in uris), ("hash", sha256 in hashes)) if is_same]
                self.duplicates[entry_id] = Duplicate(entry_id, uri, " and ".join(same_as))
                self._uris_of_others.add(uri)
        self.plan.uris = uris - self._uris_of_others

    def _rewritten(self, file: FileRef) -> Rewritten | None:
        """Write the file without the erased rows, one row group at a time; None if it holds none of them.

        Plans and rejects are searched for uris too. Only row groups whose statistics allow an erased id or uri are
        read. From an object store only the columns searched are fetched, unless the file must be written anew.
        """
        if isinstance(file, DigestsFile):
            return self._digests_rewritten(file)
        by_uri = kind_of(file.path) in ("plan", "rejected") and bool(self.plan.uris)
        if not by_uri and not may_hold(file, self._ids_N):
            return None
        own = self._own_uris()

        def gone(table: pa.Table) -> pa.ChunkedArray:
            gone_N = pa.array(is_in(table.column("id").to_numpy(), self._ids_N))
            return pc.or_(gone_N, own.found_in(table.column("uri"))) if by_uri else pa.chunked_array([gone_N])

        wanted: dict[str, Sequence[Any]] = {"id": self._ids_in_order}
        wanted |= {"uri": own.in_order} if by_uri else {}
        lost: list[int] = []
        for table in chosen_row_groups(self._storage, file, [*wanted], wanted=wanted):
            lost += table.column("id").filter(gone(table)).to_pylist()
        if not lost:
            return None
        path = rewritten_path(file.path, self._lease.nonce, len(self.plan.files))
        by = write_some_rows(self._storage, file, path, lambda table: pc.invert(gone(table)))
        return Rewritten(by=by, ids=tuple(lost))

    def _own_uris(self) -> Values:
        """The uris that only erased entries have."""
        if self._own is None or self._own[0] != self.plan.uris:
            self._own = self.plan.uris, Values(self.plan.uris)
        return self._own[1]

    def _digests_rewritten(self, file: DigestsFile) -> Rewritten | None:
        """Write a file of digests without the erased rows; None if it holds none of them."""
        digests_N = np.concatenate([digests_of_uris(self.facts.uris), digests_in(pa.array(self.facts.hashes))])
        if not ((digests_N >= file.first) & (digests_N <= file.last)).any():
            return None
        table = read_table(self._storage, file)
        gone = pa.array(is_in(table.column("id").to_numpy(), self._ids_N))
        if not pc.any(gone).as_py():
            return None
        left = table.filter(pc.invert(gone))
        path = rewritten_path(file.path, self._lease.nonce, len(self.plan.files))
        by = write_digests(self._storage, path, left) if left.num_rows else None
        return Rewritten(by=by, ids=tuple(table.column("id").filter(gone).to_pylist()))

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
        current = {shard.ids.path for shard in now.index.shards} if now.index else set()
        for path, shard in self._all.shards.items():
            if path in self.plan.shards or path in self.plan.stale or path in self._seen:
                continue
            near = any(len(self._ids_N[within(self._ids_N, *span)]) for span in shard.covers)
            if not near or not is_in(shard_ids(self._storage, shard), self._ids_N).any():
                self._seen.add(path)
            elif path in current and now.index is not None:
                self.plan.shards[path] = self._shard_anew(now.index, shard, now)
            else:
                self.plan.stale |= {path}

    def _shard_anew(self, index: Index, shard: Shard, now: State) -> Shard | None:
        assert now.identity is not None  # noqa: S101  # there are entries
        folder = rewritten_shard_folder(shard.ids.path, self._lease.nonce)
        files, dimension = now.entries_files(), now.identity.dimension
        return without_entries(self._storage, folder, index, shard, dimension, self._ids_N, files)

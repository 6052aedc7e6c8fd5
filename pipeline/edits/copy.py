"""Copies a whole memory, with every version that can be read, to another place.

The first file written there is a marker that names the source memory. The last is the version file without which no
other version can be read. So an interrupted copy is not a memory yet, and the same command continues it. Leases,
garbage and interrupted adds are not copied; the adds can be continued in the source memory.
"""

import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.edits.copy_files import THREADS, Copied, CopyWork, ToCopy, batches_of
from pipeline.errors import CommitConflict, DamagedFile, MemoryMissing, UsageError
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.steps import RunSteps, run_steps_here
from pipeline.store.checks.inventory import Inventory
from pipeline.store.layout import (
    FOLDERS,
    GIVEN_UP,
    HINT,
    LEASES,
    SEGMENTS,
    UNFINISHED_COPY,
    UNNAMED_OF_A_SEGMENT,
    checkpoint_path,
    commit_path,
    folder_at_the_top,
    is_aside,
    marks_folder,
    segment_folder,
)
from pipeline.store.log.erasure_plan import refuse_unfinished
from pipeline.store.log.rollups import CHECKPOINT_EVERY
from pipeline.store.log.state import State
from pipeline.store.log.version_log import Retained, VersionLog
from pipeline.store.segments import reservations
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import AlreadyExists, Storage, create_own
from pipeline.store.storage.leases import Lease, live_leases, read_leases
from pipeline.store.tables.schemas import FORMAT


class CopyMarker(BaseModel):
    """The content of `copying.json`: the uri of the source memory, and its newest version when the copy began."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    source: str
    version: int
    nonce: str = ""  # of the process that began the copy


@dataclass(frozen=True)
class CopyReport:
    """The result of a copy: this run copied `files` with `num_bytes`; the copy already held `already` files.

    The copy has the versions from `first_version` to `version`.
    """

    uri: str
    first_version: int
    version: int
    files: int
    num_bytes: int
    already: int
    seconds: float

    def to_json(self) -> dict:
        document = asdict(self)
        return {"versions": self.version - self.first_version + 1, "bytes": document.pop("num_bytes")} | document


@dataclass(frozen=True)
class _Contents:
    """The content that a copy must have.

    `kept` are the retained versions, `files` the files that they name. `small` are paths of small files that no version
    names. `given_up` numbers the segments that the copy must not continue. `erasures` shows whether an erasure was
    committed during the copy.
    """

    kept: range
    erasures: tuple[str, ...]
    files: dict[str, FileRef]
    small: tuple[str, ...]
    given_up: tuple[int, ...]

    @property
    def paths(self) -> set[str]:
        marks = {f"{segment_folder(number)}{GIVEN_UP}" for number in self.given_up}
        return {*self.files, *self.small, *marks}


def copy(
    log: VersionLog,
    target: Storage,
    on_progress: OnProgress = ignore_progress,
    run_steps: RunSteps = run_steps_here,
) -> CopyReport:
    """Copy a memory to a place that is empty, or holds an unfinished copy of it.

    Files pass through this machine, or those of a cluster, THREADS at once in a process, and are hashed on the way.
    Between two places of one object store the store copies them itself (a HEAD and a CopyObject each): then their
    lengths are checked, but not their hashes.

    Raises UsageError for any other place, DamagedFile naming the first file that was altered, and CommitConflict if an
    erasure is unfinished or another process is copying there.
    """
    newest = log.latest()
    refuse_unfinished(log.storage)
    _refuse_overlap(log.storage.uri, target.uri)
    _claim(target, CopyMarker(source=log.storage.uri, version=newest.version, nonce=secrets.token_hex(8)))
    with Lease(target, f"copy of {log.storage.uri}") as lease:
        dead = [record for record in read_leases(target) if record.nonce != lease.nonce]
        for record in live_leases(target, dead):
            raise CommitConflict(
                f"{record.process} is copying to {target.uri} right now: wait until it is done",
                "at work",
            )
        target.delete(record.path for record in dead)
        return _Copier(log, target, on_progress, run_steps).run()


def _refuse_overlap(source: str, target: str) -> None:
    ours, theirs = (f"{uri if '://' in uri else os.path.realpath(uri)}/" for uri in (source, target))
    if theirs.startswith(ours) or ours.startswith(theirs):
        raise UsageError(f"{target} and the memory at {source} lie in one another: name another place for the copy")


def _claim(target: Storage, marker: CopyMarker) -> None:
    """Write the marker if the place is empty; otherwise check that it holds an unfinished copy of this memory."""
    there = target.list("")
    if UNFINISHED_COPY not in there:
        if there:
            raise UsageError(f"{target.uri} is not empty: name an empty or new place for the copy")
        try:
            create_own(target, UNFINISHED_COPY, marker.model_dump_json(indent=1).encode())
        except AlreadyExists as error:
            raise CommitConflict(
                f"another process has just begun to copy to {target.uri}",
                "at work",
            ) from error
        return
    try:
        found = CopyMarker.model_validate_json(target.read(UNFINISHED_COPY))
    except ValidationError as error:
        raise DamagedFile(f"{UNFINISHED_COPY} in {target.uri} is not whole: empty the place and copy again") from error
    if found.source != marker.source:
        raise UsageError(
            f"{target.uri} holds an unfinished copy of the memory at {found.source}: finish that one, or name another "
            "place"
        )


class _Copier:
    def __init__(self, log: VersionLog, target: Storage, on_progress: OnProgress, run_steps: RunSteps) -> None:
        self._log = log
        self._source = log.storage
        self._target = target
        self._copied = VersionLog(target)
        self._progress = on_progress
        self._run_steps = run_steps
        self._work = CopyWork(self._source, target)
        self._began = time.monotonic()
        self._done = Copied()

    def run(self) -> CopyReport:
        kept = self._complete() or self._brought_over()
        self._finish()
        seconds, done = time.monotonic() - self._began, self._done
        return CopyReport(self._target.uri, kept[0], kept[-1], done.files, done.num_bytes, done.already, seconds)

    def _complete(self) -> range | None:
        """The versions in the copy if an earlier run was interrupted only in its last step; otherwise None."""
        try:
            return self._copied.retained()
        except (DamagedFile, MemoryMissing):
            return None

    def _brought_over(self) -> range:
        """Copy the memory; repeat until no erasure or expiry changes it during the copy."""

        def bring_over(_: Retained) -> range | None:
            contents = self._contents()
            return contents.kept if self._bring_over(contents) else None

        while (kept := self._log.over_retained(bring_over)) is None:
            pass
        return kept

    def _bring_over(self, contents: _Contents) -> bool:
        """Copy these contents and make them readable; False if an erasure was committed meanwhile."""
        first, *others = contents.kept
        self._copy_files(list(contents.files.values()))
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda path: self._target.replace(path, self._source.read(path)), contents.small))
        for number in contents.given_up:
            reservations.give_up(self._target, number)
        self._remove_strays(contents.paths | {commit_path(number) for number in contents.kept})
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self._copy_commit, others))
        start = self._log.at(first)
        [commit] = self._log.commits([first])
        refuse_unfinished(self._source)
        if self._log.latest().erasures != contents.erasures:
            return False
        # No version can be read without the first one, nor without its checkpoint unless it is version 1.
        self._copied.rewrite(commit)
        if first != 1:
            self._copied.rewrite_checkpoint(start)
        return True

    def _contents(self) -> _Contents:
        refuse_unfinished(self._source)
        erasures = self._log.latest().erasures
        kept = self._log.retained()
        inventory = Inventory.of(self._log, kept[0], kept[-1])
        committed = inventory.segments
        there = self._source.walk(SEGMENTS)
        reserved = reservations.reserved_numbers(self._source)
        marks = [segment_folder(n) + name for n in reserved for name in UNNAMED_OF_A_SEGMENT]
        small = [path for path in marks if path in there]
        done = tuple(marks_folder(segment_folder(number)) for number in committed)
        small += [path for path in there if path.startswith(done) and not is_aside(path)]
        given_up = tuple(number for number in reserved if number not in committed)
        return _Contents(kept, erasures, inventory.files, tuple(small), given_up)

    def _copy_files(self, files: list[FileRef]) -> None:
        there = self._target.walk()
        sizes = self._source.walk() if self._work.puts_are_whole and "://" in self._source.uri else {}
        batches = batches_of([ToCopy(file, there.get(file.path), sizes.get(file.path)) for file in files])
        done = told = 0

        def tell(num_files: int = 1) -> None:
            nonlocal done, told
            done, told = done + num_files, told + num_files
            self._progress(Progress("copying", done, len(files)))

        self._progress(Progress("copying", 0, len(files)))
        for place, copied in self._run_steps(replace(self._work, on_file=tell).steps(batches)):
            self._done += copied
            if told < len(batches[place]):  # copied by another process
                tell(len(batches[place]))
            told = 0

    def _copy_commit(self, number: int) -> None:
        [commit] = self._log.commits([number])
        self._copied.rewrite(commit)

    def _remove_strays(self, wanted: set[str]) -> None:
        """Remove files of an earlier attempt that the memory no longer has, and half-written files."""
        there = [path for path in self._target.walk() if folder_at_the_top(path) in FOLDERS - {LEASES}]
        strays = [path for path in there if path not in wanted and not is_aside(path)]
        self._target.delete(sorted({*strays, *self._target.abandoned()}))

    def _finish(self) -> None:
        """Read every version of the copy once more, write the other checkpoints, and delete the marker."""
        newest = State()
        for _, newest in self._copied.states():
            path = checkpoint_path(newest.version)
            if newest.version % CHECKPOINT_EVERY == 0 and not self._target.exists(path):
                self._copied.rewrite_checkpoint(newest)
        self._target.replace(HINT, str(newest.version).encode())
        self._copied.renew_rollup()
        self._target.delete([UNFINISHED_COPY])

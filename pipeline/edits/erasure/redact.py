"""Finishes a committed erasure: redacts older versions, then deletes the files that held the erased entries.

Any process that finds the plan of a committed erasure can finish it. Every step is idempotent: after a crash, start
again from the plan.
"""

import contextlib
import functools
from collections.abc import Collection, Iterable, Iterator

import pyarrow.compute as pc

from pipeline.edits.erasure.values import Values, in_batches
from pipeline.errors import CommitConflict, DamagedFile
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.checks.garbage import Census, remove_garbage, take_census
from pipeline.store.layout import (
    DESCRIPTION,
    ERASURES,
    folder_of,
    generation_of,
    in_segment,
    marks_folder,
    nonce_of,
    segment_folder,
)
from pipeline.store.log.documents import Commit
from pipeline.store.log.erasure_plan import ErasurePlan
from pipeline.store.log.state import BreakLeases, State
from pipeline.store.log.version_log import Retained, VersionLog
from pipeline.store.segments import reservations
from pipeline.store.storage.file_refs import check_places
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease, live_leases, read_leases
from pipeline.store.tables.row_groups import chosen_row_groups


def finish_erasures(log: VersionLog, command: str = "verify --clean") -> int:
    """Finish erasures that were killed after their commit; return their number.

    The plans of erasures that were killed before their commit are removed. Raises CommitConflict while another process
    is erasing.
    """
    finished = 0
    for name in log.storage.list(ERASURES):
        nonce, path = nonce_of(name), f"{ERASURES}/{name}"
        with Lease(log.storage, "finish an erasure") as lease:
            lease.hold(path)  # before reading other leases: of two processes at once, at least one sees the other
            records = [record for record in read_leases(log.storage) if record.nonce != lease.nonce]
            holders = [record for record in records if record.nonce == nonce or path in record.holds]
            for record in live_leases(log.storage, holders):
                raise CommitConflict(
                    f"{record.process} is erasing right now: wait until it is done",
                    "at work",
                )
            if not log.storage.exists(path):
                continue  # another process has just finished it
            state = log.latest()
            broken = BreakLeases(leases=tuple(record.nonce for record in holders if record.nonce == nonce))
            if nonce not in state.erasures and broken.leases:  # a process that is stopped, not dead, could still commit
                state = log.commit(state, command, functools.partial(_breaking, broken))
            log.storage.delete([record.path for record in holders])
            if nonce in state.erasures:
                finish(log, _read_plan(log, path), command)
                finished += 1
            else:
                log.storage.delete([path])
    return finished


def _read_plan(log: VersionLog, path: str) -> ErasurePlan:
    try:
        plan = ErasurePlan.model_validate_json(log.storage.read(path))
        check_places(plan.new_files())
        if plan.path != path:
            raise ValueError(f"it is the plan of {plan.nonce}")
    except ValueError as error:
        raise DamagedFile(
            f"{path} in the memory at {log.storage.uri} is not a whole plan of an erasure: remove it, and erase again"
        ) from error
    return plan


def _breaking(broken: BreakLeases, *_: object) -> list[BreakLeases]:
    return [broken]


def finish(
    log: VersionLog, plan: ErasurePlan, command: str, on_progress: OnProgress = ignore_progress
) -> tuple[int, list[str]]:
    """Redact the older versions, then remove the files that no version needs any more, and last the plan.

    Every step is idempotent: after a crash, start again from the plan. Returns how many versions were redacted, and the
    removed paths.
    """
    redacted = _redact(log, plan, on_progress)
    removed = [path for path in _stale_marks(log, plan) if log.storage.exists(path)]
    _redact_reservations(log, plan)
    census = take_census(log)
    removed += _replaced(plan, census)  # no holder of these files can commit any more
    log.storage.delete(removed)
    hiding = {number for number in census.unfinished if _plans_erased(log.storage, number, plan)}
    spared = tuple(segment_folder(number) for number in census.unfinished if number not in hiding)
    gone = set(removed)
    removed += remove_garbage(log, census, command, lambda path: path not in gone and not path.startswith(spared))
    log.storage.delete([plan.path])
    log.renew_rollup()
    return redacted, removed


def _redact(log: VersionLog, plan: ErasurePlan, on_progress: OnProgress) -> int:
    redacted: set[int] = set()

    def redact(_: Retained) -> None:
        kept = log.retained()
        log.remove_rollup()
        for number in log.checkpoints():
            checkpoint = log.read_checkpoint(number)
            if (erased := plan.state(checkpoint)) != checkpoint:
                log.rewrite_checkpoint(erased)
        for commit, without in _redactions(log, plan, kept):
            on_progress(Progress("redacting", commit.version - kept[0], len(kept)))
            if without != commit:
                log.rewrite(without)
                redacted.add(commit.version)

    log.over_retained(redact)
    return len(redacted)


def _redactions(log: VersionLog, plan: ErasurePlan, kept: range) -> Iterator[tuple[Commit, Commit]]:
    """Every commit with its redacted form. The checkpoints must be redacted already."""
    before = State() if kept[0] == 1 else log.read_checkpoint(kept[0])
    for commit in log.commits(kept):
        if commit.version == kept[0] != 1:
            without, _ = plan.commit(commit, before)  # the state before the first retained version is unknown
            rows = {"rows_before": commit.rows_before, "rows_after": before.num_live}
            without = without.model_copy(update=rows)
        else:
            without, before = plan.commit(commit, before)
        yield commit, without


def _replaced(plan: ErasurePlan, census: Census) -> list[str]:
    """Files that were rewritten, and the files of rewritten shards and of indexes that are given up."""
    folders = (*map(folder_of, plan.shards), *map(generation_of, plan.stale))
    old = (path for path in census.files if path in plan.files or path.startswith(folders))
    return [path for path in old if path not in census.named]


def _touched_segments(plan: ErasurePlan) -> set[int]:
    return {of_a_segment.number for of_a_segment in map(in_segment, plan.files) if of_a_segment}


def _stale_marks(log: VersionLog, plan: ErasurePlan) -> Iterator[str]:
    """Completion marks of rewritten segments. They name old files, and a committed segment does not need them."""
    for number in _touched_segments(plan):
        folder = marks_folder(segment_folder(number))
        yield from (f"{folder}{name}" for name in log.storage.list(folder))


def _redact_reservations(log: VersionLog, plan: ErasurePlan) -> None:
    for number in reservations.reserved_numbers(log.storage):
        path = f"{segment_folder(number)}{DESCRIPTION}"
        if not log.storage.exists(path):
            continue
        reservation = reservations.read_reservation(log.storage, number)
        if reservation is not None and plan.source(reservation.source) != reservation.source:
            redacted = reservation.model_copy(update={"source": plan.source(reservation.source)})
            log.storage.replace(path, redacted.model_dump_json(indent=1).encode())


def _plans_erased(storage: Storage, number: int, plan: ErasurePlan) -> bool:
    """Whether an interrupted add plans erased images, or cannot be read: then it cannot continue."""
    reservation = reservations.read_reservation(storage, number)
    if reservation is None:
        return True
    try:
        # `held` lists the digests that the memory held when the add was planned: they can include erased images.
        return reservation.held is not None or _plans(storage, reservation, plan.uris)
    except DamagedFile:
        return True


def _plans(storage: Storage, reservation: reservations.Reservation, uris: Collection[str]) -> bool:
    """Whether an add plans any of these uris, as an image file or inside a container. Raises DamagedFile."""
    inside = {uri.partition("#")[0] for uri in uris if "#" in uri}
    for file, wanted in ((reservation.plan, uris), (reservation.containers, inside)):
        if file is not None and wanted:
            values = Values(wanted)
            tables = chosen_row_groups(storage, file, ["uri"])
            if any(pc.any(values.found_in(table.column("uri"))).as_py() for table in in_batches(tables, len(values))):
                return True
    return False


def work_on_erased(storage: Storage, uris: Iterable[str]) -> list[str]:
    """The live leases of adds that plan any of these uris, each as text."""
    wanted = set(uris)
    found = []
    for record in live_leases(storage, read_leases(storage)):
        for held in filter(None, map(in_segment, record.holds)):
            with contextlib.suppress(DamagedFile):  # the add has ended meanwhile
                reservation = reservations.read_reservation(storage, held.number)
                if reservation is not None and _plans(storage, reservation, wanted):
                    found.append(str(record))
    return found

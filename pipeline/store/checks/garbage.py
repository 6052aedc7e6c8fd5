"""Garbage: files of a memory that no version names and no live lease holds.

Garbage is left by killed processes, by writers that lost a race, and by versions that were dropped. The census is safe
while writers are at work, because it lists files first, then leases, then versions. If a listed file is in use, either
its writer's lease is still there, or a version names it by the time the versions are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.errors import MemoryMissing
from pipeline.store.checks.inventory import Inventory
from pipeline.store.layout import (
    DESCRIPTION,
    FOLDERS,
    HINT,
    ROLLUP,
    UNNAMED_OF_A_SEGMENT,
    checkpoint_path,
    commit_path,
    erasure_path,
    folder_at_the_top,
    in_segment,
    is_aside,
    is_mark_of_job,
    segment_folder,
)
from pipeline.store.log.state import BreakLeases
from pipeline.store.log.version_log import Retained, VersionLog
from pipeline.store.segments import reservations
from pipeline.store.storage.leases import LeaseRecord, live_leases, read_leases


@dataclass(frozen=True)
class Census:
    """Every file of a memory with its size in bytes, and the owner of each.

    `version` is the newest version, 0 if there is none. `named` are the files that the retained versions need.
    `working` are leases with a live holder, `dead` all other leases. `unfinished` are segments that were reserved, are
    neither committed nor given up, and have no live lease. `foreign` are files that are not part of a memory.
    """

    version: int
    files: dict[str, int]
    named: set[str]
    working: tuple[LeaseRecord, ...]
    dead: tuple[LeaseRecord, ...]
    garbage: tuple[str, ...]
    unfinished: tuple[int, ...]
    foreign: tuple[str, ...]

    @property
    def garbage_bytes(self) -> int:
        return sum(self.files.get(path, 0) for path in self.garbage)


def take_census(log: VersionLog, first: int | None = None) -> Census:
    """List every file, lease and version. Raises MemoryMissing, DamagedFile or FormatError.

    With `first`, versions before it count as dropped.
    """
    storage = log.storage
    files = storage.walk()
    leases = read_leases(storage)
    working = live_leases(storage, leases)
    abandoned = set(storage.abandoned())
    inventory, named = _named(log, first)
    version, committed = inventory.version, inventory.segments
    reserved = reservations.reserved_numbers(storage)
    ours = {path for path in files if folder_at_the_top(path) in FOLDERS}
    kept_marks = {number for number in reserved if number in committed}

    def is_garbage(path: str) -> bool:
        if is_aside(path):
            return path in abandoned
        if path in named or any(record.covers(path) or path == record.path for record in working):
            return False
        of_a_segment = in_segment(path)
        if of_a_segment and of_a_segment.inside in UNNAMED_OF_A_SEGMENT:
            return False  # they record forever that the number is taken
        return not (of_a_segment and of_a_segment.is_mark and of_a_segment.number in kept_marks)

    garbage = tuple(sorted(filter(is_garbage, ours)))
    held = {number for number in reserved if any(r.covers(segment_folder(number)) for r in working)}
    unfinished = tuple(
        number
        for number in reserved
        if f"{segment_folder(number)}{DESCRIPTION}" in files  # else it was never reserved
        and number not in committed
        and number not in held
        and not reservations.is_given_up(storage, number)
        and any(path.startswith(segment_folder(number)) for path in garbage)
    )
    dead = tuple(record for record in leases if record not in working)
    return Census(version, files, named, tuple(working), dead, garbage, unfinished, tuple(sorted(set(files) - ours)))


def remove_garbage(
    log: VersionLog, census: Census, command: str, wanted: Callable[[str], bool] = lambda _: True
) -> Sequence[str]:
    """Remove the garbage that `wanted` selects, and return the removed paths.

    Before that, dead leases are broken: their holders can then no longer commit these files.
    """
    removed = [path for path in census.garbage if wanted(path)]
    broken = tuple(record.nonce for record in census.dead)
    if broken:
        log.commit(log.latest(), command, lambda *_: [BreakLeases(leases=broken)])
    for number in census.unfinished:
        folder = segment_folder(number)
        if any(path.startswith(folder) for path in removed):
            reservations.give_up(log.storage, number)
    log.storage.delete(record.path for record in census.dead)
    # Whoever goes on with a job takes a lease on the files that marks name, and then reads the marks again. So the
    # marks go first, and leases are read after that: what a mark named until then is held.
    marks = [path for path in removed if is_mark_of_job(path)]
    claimed = _claimed_since(log, census, removed) if marks else set()
    marks = [path for path in marks if path not in claimed]
    log.storage.delete(marks)
    claimed |= _claimed_since(log, census, removed)
    others = [path for path in removed if path not in claimed and not is_mark_of_job(path)]
    log.storage.delete(others)
    gone = {*marks, *others}
    return [path for path in removed if path in gone]


def _claimed_since(log: VersionLog, census: Census, paths: Sequence[str]) -> set[str]:
    """The paths that a lease holds or a version names since the census: they are no longer garbage.

    Leases are read first, as in the census. A process that takes a lease later finds the segment given up, or the
    version dropped.
    """
    leases = read_leases(log.storage)
    claimed = {path for path in paths if any(record.covers(path) for record in leases)}
    newest = log.newest()
    if newest is not None and newest.version > census.version:
        claimed |= _named(log, census.version + 1)[1]
    return claimed


def named_paths(log: VersionLog) -> set[str]:
    """Every path that a retained version needs, including its own version files. Reads all versions."""
    return _named(log, None)[1]


def _named(log: VersionLog, start: int | None) -> tuple[Inventory, set[str]]:
    """The inventory of the retained versions (from `start` on), and every path that they need, including their own."""
    try:
        log.retained()
    except MemoryMissing:
        return Inventory(), {HINT, ROLLUP}

    def look(kept: Retained) -> tuple[Inventory, set[str]]:
        inventory = Inventory.of(log, start)
        first = max(start or 0, kept.first)
        named = {HINT, ROLLUP, *inventory.files, *map(commit_path, range(first, inventory.version + 1))}
        named |= {checkpoint_path(number) for number in log.checkpoints() if number >= first}
        return inventory, named | set(map(erasure_path, log.latest().erasures))

    return log.over_retained(look)

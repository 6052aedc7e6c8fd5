"""Rolls back by committing a new version that repeats an older one. The versions in between stay readable."""

from dataclasses import asdict, dataclass

from pipeline.errors import CommitConflict, MemoryMissing, UsageError
from pipeline.store.layout import FOLDERS, LEASES, VERSIONS
from pipeline.store.log.erasure_plan import refuse_unfinished
from pipeline.store.log.state import SetState, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.leases import Lease


@dataclass(frozen=True)
class RollbackReport:
    """The version committed, the one it repeats, and the live entries before and after."""

    version: int
    rolled_back_to: int
    entries_before: int
    entries: int

    def to_json(self) -> dict:
        return asdict(self)


def roll_back(log: VersionLog, version: int, command: str) -> RollbackReport:
    """Commit the state at a version as the newest.

    Raises MemoryMissing for a version that never existed or was dropped, UsageError for the newest version, and
    CommitConflict if another writer commits meanwhile.
    """
    decided = log.latest()
    if version == decided.version:
        raise UsageError(f"version {version} is the newest one already: there is nothing to roll back")
    log.at(version)  # raises for a version that cannot be read, before anything is written

    def prepare(_: int, now: State) -> list[SetState]:
        if now.version != decided.version:
            raise CommitConflict(
                f"another writer has committed version {now.version} meanwhile, and nothing was changed: look at "
                "`history` and run the command again",
                "version committed",
            )
        refuse_unfinished(log.storage)
        return [SetState(why="rollback", state=state_of_rollback(now, log.at(version)))]

    with Lease(log.storage, f"rollback to version {version}") as lease:
        # From here on a clean-up spares the files of the version if it is dropped. If it is gone already, `at` raises.
        lease.hold(*sorted(f"{folder}/" for folder in FOLDERS - {LEASES, VERSIONS}))
        try:
            committed = log.commit(decided, command, prepare, lease)
        except MemoryMissing as error:
            raise CommitConflict(
                f"{error}; another process has dropped it meanwhile, nothing was changed",
                "versions dropped",
            ) from error
    return RollbackReport(committed.version, version, decided.num_live, committed.num_live)


def state_of_rollback(now: State, target: State) -> State:
    """The state of `target`, except for what must never go back: used ids, broken leases, erasures and rewrites."""
    there = {segment.number for segment in target.segments}
    growing = {now.singles.segment} if now.singles else set()
    taken_away = {*now.retired, *(segment.number for segment in now.segments)} - there - growing
    return target.model_copy(
        update={
            "identity": target.identity or now.identity,
            "weights": target.weights or now.weights,
            "singles": now.singles,
            "retired": tuple(sorted(taken_away)),
            "rewrites": now.rewrites + 1,
            "erasures": now.erasures,
            "broken": now.broken,
        }
    )

"""Expiring: old versions are dropped, and with them the files that nothing else needs.

Everything it does can be cut off anywhere and done again. The checkpoint of the first version kept comes first: from
then on nothing before it is needed. Older checkpoints go next and commits after them, the oldest first, because a
process that has not looked for long tells by a missing version that all before it are gone too. Files go last.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from pipeline.errors import UsageError
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.checks.garbage import Census, remove_garbage, take_census
from pipeline.store.layout import VERSIONS, checkpoint_number, checkpoint_path, commit_number, segment_folder
from pipeline.store.log.erasure_plan import refuse_unfinished
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog

Keep = timedelta | int  # an age, or a number of versions


@dataclass(frozen=True)
class ExpireReport:
    """How many versions were dropped (or would be), files and bytes removed, and which versions can be read still."""

    dropped: int
    files: int
    num_bytes: int
    first_kept: int
    newest: int

    def to_json(self) -> dict:
        document = asdict(self)
        return {"dropped": document.pop("dropped"), "bytes": document.pop("num_bytes")} | document


def plan_expire(log: VersionLog, keep: Keep) -> ExpireReport:
    """What `expire` would do. Changes nothing."""
    check_keep(keep)
    newest = log.latest()
    refuse_unfinished(log.storage)
    first = _first(log, keep).version
    census = take_census(log, first)
    doomed = [path for path in census.garbage if _wanted(census, newest)(path)]
    dropped = sum(commit_number(path) is not None for path in doomed)
    num_bytes = sum(census.files[path] for path in doomed)
    return ExpireReport(dropped, len(doomed), num_bytes, first, newest.version)


def expire(log: VersionLog, keep: Keep, command: str, on_progress: OnProgress = ignore_progress) -> ExpireReport:
    """Drop the versions that need not be kept, and remove the files that only they named.

    Adds that were interrupted stay, so that they can go on. Raises CommitConflict while an erasure is unfinished.
    """
    check_keep(keep)
    log.latest()
    refuse_unfinished(log.storage)
    first = _first(log, keep)
    files = log.storage.walk(VERSIONS)
    commits = _below(first.version, commit_number, files)
    checkpoints = _below(first.version, checkpoint_number, files)
    if commits and not log.storage.exists(checkpoint_path(first.version)):
        log.rewrite_checkpoint(first)
    for done, path in enumerate([*checkpoints, *commits]):
        on_progress(Progress("dropping", done, len(checkpoints) + len(commits)))
        log.storage.delete([path])  # one by one, for a store may remove what it is given together in any order
    census = take_census(log)
    removed = remove_garbage(log, census, command, _wanted(census, log.latest()))
    num_bytes = sum(files[path] for path in (*checkpoints, *commits)) + sum(census.files[path] for path in removed)
    num_files = len(checkpoints) + len(commits) + len(removed)
    kept = log.retained()
    return ExpireReport(len(commits), num_files, num_bytes, kept[0], kept[-1])


def first_to_keep(log: VersionLog, keep: Keep) -> int:
    """The first version to be kept: of those older than an age the last one, which was the memory at that age.

    So whatever the memory was since then can be rolled back to. What counts is the order of versions: the first that is
    young enough ends the search, whatever later ones say of when they were committed. A clock that was wrong so keeps
    too much rather than too little.
    """
    kept = log.retained()
    if isinstance(keep, int):
        return max(kept[0], kept[-1] - keep + 1)
    first = kept[0]
    try:
        cutoff = datetime.now(UTC) - keep
    except OverflowError:  # before the year 1
        return first
    for commit in log.commits(kept):
        if commit.committed_at >= cutoff:
            break
        first = commit.version
    return first


def _first(log: VersionLog, keep: Keep) -> State:
    """The state at the first version to be kept."""
    return log.over_retained(lambda _: log.at(first_to_keep(log, keep)))


def check_keep(keep: Keep) -> None:
    """Raises UsageError for what can never be kept."""
    if isinstance(keep, bool) or not isinstance(keep, timedelta | int):
        raise UsageError(f"keep is {keep!r}: give a timedelta, or a number of versions")
    if isinstance(keep, int) and keep < 1:
        raise UsageError(f"{keep} is not a number of versions to keep: the newest always stays, so give 1 or more")
    if isinstance(keep, timedelta) and keep < timedelta(0):
        raise UsageError(f"{keep} is not an age: give 0 or more")


def _wanted(census: Census, newest: State) -> Callable[[str], bool]:
    """What to remove of the garbage: all but adds that were interrupted, which the same command would go on with."""
    interrupted = [number for number in census.unfinished if number not in newest.retired]
    spared = tuple(segment_folder(number) for number in interrupted)
    return lambda path: not path.startswith(spared)


def _below(first: int, number_of: Callable[[str], int | None], files: Iterable[str]) -> list[str]:
    """The version files of a kind before a version, the oldest first."""
    return sorted(path for path in files if (number := number_of(path)) is not None and number < first)

"""Expiring drops old versions, and the files that only they need.

Every step is idempotent: after a crash, run it again. The first step writes the checkpoint of the first retained
version; from then on nothing before that version is needed. Next, the roll-up and older checkpoints are deleted, then
commits in groups, the oldest first (`in_droppable_groups` says what other processes rely on). Files are deleted last.
An S3 store gets two requests for a thousand versions.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from pipeline.errors import UsageError
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.checks.garbage import Census, remove_garbage, take_census
from pipeline.store.layout import (
    VERSIONS,
    checkpoint_number,
    checkpoint_path,
    commit_number,
    commit_path,
    segment_folder,
)
from pipeline.store.log.erasure_plan import refuse_unfinished
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog, in_droppable_groups

Keep = timedelta | int  # an age, or a number of versions


@dataclass(frozen=True)
class ExpireReport:
    """The number of versions dropped, and of files and bytes removed; in a plan, the numbers of the future `expire`.

    The versions from `first_kept` to `newest` can still be read.
    """

    dropped: int
    files: int
    num_bytes: int
    first_kept: int
    newest: int

    def to_json(self) -> dict:
        document = asdict(self)
        return {"dropped": document.pop("dropped"), "bytes": document.pop("num_bytes")} | document


def plan_expire(log: VersionLog, keep: Keep) -> ExpireReport:
    """The report that `expire` would return. Changes nothing."""
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
    """Drop the versions outside `keep`, and remove the files that only they name.

    The files of interrupted adds stay, so that these adds can continue. Raises CommitConflict while an erasure is
    unfinished.
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
    log.remove_rollup()
    log.storage.delete(checkpoints)
    newest = max(filter(None, map(commit_number, files)))
    numbers = sorted(number for number in map(commit_number, commits) if number is not None)
    done = 0
    for group in in_droppable_groups(numbers, newest):
        on_progress(Progress("dropping", done, len(numbers)))
        log.storage.delete(map(commit_path, group))
        done += len(group)
    census = take_census(log)
    removed = remove_garbage(log, census, command, _wanted(census, log.latest()))
    log.renew_rollup()
    num_bytes = sum(files[path] for path in (*checkpoints, *commits)) + sum(census.files[path] for path in removed)
    num_files = len(checkpoints) + len(commits) + len(removed)
    kept = log.retained()
    return ExpireReport(len(commits), num_files, num_bytes, kept[0], kept[-1])


def first_to_keep(log: VersionLog, keep: Keep) -> int:
    """The first version to retain. For an age it is the last version older than that: the memory as it was then.

    So every state of the memory since then can be rolled back to. The search follows the order of versions and ends at
    the first version that is young enough; the commit times of later versions do not count. So a wrong clock retains
    too many versions rather than too few.
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
    """The state at the first version to retain."""
    return log.over_retained(lambda _: log.at(first_to_keep(log, keep)))


def check_keep(keep: Keep) -> None:
    """Raises UsageError if `keep` is neither an age of 0 or more nor a number of versions of 1 or more."""
    if isinstance(keep, bool) or not isinstance(keep, timedelta | int):
        raise UsageError(f"keep is {keep!r}: give a timedelta, or a number of versions")
    if isinstance(keep, int) and keep < 1:
        raise UsageError(f"{keep} is not a number of versions to keep: the newest always stays, so give 1 or more")
    if isinstance(keep, timedelta) and keep < timedelta(0):
        raise UsageError(f"{keep} is not an age: give 0 or more")


def _wanted(census: Census, newest: State) -> Callable[[str], bool]:
    """Selects the garbage to remove: all but the files of interrupted adds, which the same command can continue."""
    interrupted = [number for number in census.unfinished if number not in newest.retired]
    spared = tuple(segment_folder(number) for number in interrupted)
    return lambda path: not path.startswith(spared)


def _below(first: int, number_of: Callable[[str], int | None], files: Iterable[str]) -> list[str]:
    """The version files of one kind whose number is below `first`, the oldest first."""
    return sorted(path for path in files if (number := number_of(path)) is not None and number < first)

"""The history of a memory: who committed each version, when, by which command, and how many entries it changed."""

from dataclasses import asdict, dataclass
from datetime import datetime

from pipeline.errors import MemoryMissing, UsageError
from pipeline.store.log.documents import Commit
from pipeline.store.log.state import (
    Action,
    AddSegment,
    AddSingles,
    BreakLeases,
    Forget,
    Relabel,
    SetIdentity,
    SetIndex,
    SetLabelSet,
    SetState,
)
from pipeline.store.log.version_log import VersionLog


@dataclass(frozen=True)
class VersionSummary:
    """One version: `rows_before` and `rows_after` count live entries, `actions` has a short text for each action."""

    version: int
    committed_at: datetime
    author: str
    command: str
    rows_before: int
    rows_after: int
    actions: tuple[str, ...]

    def to_json(self) -> dict:
        return asdict(self) | {"committed_at": self.committed_at.isoformat(), "actions": list(self.actions)}


def history(log: VersionLog, at: int | None = None, limit: int | None = None) -> list[VersionSummary]:
    """The readable versions, newest first: up to `at` (None: the newest), at most `limit` of them (None: all).

    Raises MemoryMissing or DamagedFile.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"{limit} is not a number of versions: show 1 or more")
    kept = log.retained()
    last = kept[-1] if at is None else at
    if last not in kept:
        raise MemoryMissing(
            f"the memory at {log.storage.uri} has no version {at}: it goes from {kept[0]} to {kept[-1]}"
        )
    first = kept[0] if limit is None else max(kept[0], last - limit + 1)
    return [_summary(commit) for commit in _commits(log, first, last)][::-1]


def _commits(log: VersionLog, first: int, last: int) -> list[Commit]:
    """Commits in order, without those that another process drops meanwhile."""
    return log.over_retained(lambda kept: [*log.commits(range(max(first, kept.first), last + 1))])


def _summary(commit: Commit) -> VersionSummary:
    return VersionSummary(
        version=commit.version,
        committed_at=commit.committed_at,
        author=commit.author,
        command=commit.command,
        rows_before=commit.rows_before,
        rows_after=commit.rows_after,
        actions=tuple(_in_words(action) for action in commit.actions),
    )


def _in_words(action: Action) -> str:  # noqa: C901, PLR0911  # one line for each action
    match action:
        case SetIdentity():
            return f"set encoder {action.identity.encoder}"
        case AddSegment():
            return f"add segment {action.segment.number} ({_entries(action.segment.num_entries)})"
        case AddSingles():
            return f"add {_entries(len(action.entries))}"
        case Forget():
            return f"forget {action.forgotten:,}"
        case Relabel():
            return f"relabel {action.relabelled:,}" + (f" in {action.label_set}" if action.label_set else "")
        case SetLabelSet():
            return f"label set {action.label_set.name}"
        case SetIndex():
            return f"index {action.index.key}"
        case BreakLeases():
            return f"break {len(action.leases)} lease{'' if len(action.leases) == 1 else 's'}"
        case SetState() if action.why == "rollback":
            return f"rollback to {action.state.version}"
        case SetState():
            return action.why
    return action.action.replace("_", " ")


def _entries(number: int) -> str:
    return f"{number:,} entr{'y' if number == 1 else 'ies'}"

"""Reads and checks the version files of a memory, damaged ones included.

Readers of a memory stop at the first damage. This module continues after an unreadable version, from the next
checkpoint.
"""

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

from pipeline.errors import DamagedFile, FormatError, MissingFile, NotPermitted
from pipeline.store.checks.findings import RESTORE, Finding, damage, not_looked_at
from pipeline.store.layout import (
    HINT,
    ROLLUP,
    VERSIONS,
    checkpoint_number,
    checkpoint_path,
    commit_number,
    commit_path,
)
from pipeline.store.log.documents import Commit
from pipeline.store.log.rollups import ROLLUP_EVERY
from pipeline.store.log.state import SetIndex, SetState, State
from pipeline.store.log.version_log import VersionLog

MOST_BEHIND = 2 * ROLLUP_EVERY  # versions; a roll-up that is further behind was not kept up
READERS = 8  # version files read in parallel: with an object store most of the time is waiting

_LATER = "restore it from a copy of the memory; if a later release wrote it, use that one"
_SPARE = "remove it: the commits before it say the same"
_SPARE_ROLLUP = "remove it: it only saves time"
_WRITTEN_ANEW = "nothing: no reader depends on it, and the next commit writes it anew"


@dataclass(frozen=True)
class Step:
    """One version: its commit, and the states before and after it, each None if it is unknown."""

    number: int
    commit: Commit | None
    before: State | None
    after: State | None

    @property
    def is_whole(self) -> bool:
        """Whether the whole state must be checked: a SetState replaced it, or the state before is unknown."""
        actions = self.commit.actions if self.commit is not None else ()
        return self.before is None or any(isinstance(action, SetState) for action in actions)


@dataclass
class Chain:
    """The versions from `first` to `newest`; `numbers` are all versions with a file, including those before a gap.

    `findings` are about version files that are missing or cannot be read: the files that these name are unknown.
    """

    first: int
    newest: int
    numbers: list[int]
    commits: dict[int, Commit] = field(default_factory=dict)
    checkpoints: dict[int, State] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @cached_property
    def newest_state(self) -> State | None:
        """The state of the newest version; None if it is unknown."""
        newest = None
        for step in self.steps():
            newest = step.after
        return newest

    def steps(self) -> Iterator[Step]:
        """Every version that has a file, oldest first."""
        state: State | None = State()
        for number in self.numbers:
            before = state if state is not None and state.version == number - 1 else None
            commit = self.commits.get(number)
            after = _folded(before, commit) if before is not None and commit is not None else None
            yield Step(number, commit, before, after or self.checkpoints.get(number))
            state = after or self.checkpoints.get(number)


def read_chain(log: VersionLog) -> Chain:
    """Read every version file that can be read. Raises MemoryMissing or DamagedFile if there is none at all."""
    names = log.storage.list(VERSIONS)
    there = sorted(number for number in map(commit_number, names) if number is not None)
    if not there:
        log.retained()  # raises the error
    lowest = newest = there[-1]
    known = set(there)
    while lowest - 1 in known:
        lowest -= 1
    points = sorted(number for number in map(checkpoint_number, names) if number is not None)
    starts = [number for number in points if number >= lowest]
    first = lowest if lowest == 1 or not starts else starts[0]
    has_gap = there[0] < lowest
    chain = Chain(first, newest, there if has_gap else [number for number in there if number >= first])
    chain.findings += _gaps(there, bool(starts))
    with ThreadPoolExecutor(READERS) as pool:
        for number, read in zip(chain.numbers, pool.map(functools.partial(_read, log), chain.numbers), strict=True):
            if isinstance(read, Commit):
                chain.commits[number] = read
            else:
                chain.findings.append(read)
    for number in points:
        if number < chain.numbers[0]:
            continue
        advice = RESTORE if number == first != 1 else _SPARE
        try:
            state = log.read_checkpoint(number)
        except (DamagedFile, FormatError, NotPermitted) as error:
            chain.findings.append(_unreadable(checkpoint_path(number), error, advice))
            continue
        if state.version == number:
            chain.checkpoints[number] = state
        else:
            what = f"is the state at version {state.version}"
            chain.findings.append(damage(checkpoint_path(number), what, advice))
    return chain


def _read(log: VersionLog, number: int) -> Commit | Finding:
    try:
        [commit] = log.commits([number])
    except (DamagedFile, FormatError, NotPermitted) as error:
        return _unreadable(commit_path(number), error, RESTORE)
    return commit


def check_steps(chain: Chain) -> Iterator[Finding]:
    """Findings about versions that can be read: wrong counts, wrong checkpoints, actions that conflict."""
    erased = chain.newest_state is None or bool(chain.newest_state.erasures)
    for step in chain.steps():
        commit, path = step.commit, commit_path(step.number)
        if commit is None:
            continue
        if not commit.nonce:
            yield damage(path, "carries no nonce")
        if step.before is not None:
            if step.after is None:
                yield damage(path, "has actions that cannot follow the version before it")
                continue
            if commit.rows_before != step.before.num_live:
                yield damage(path, f"says {commit.rows_before:,} rows before it where {step.before.num_live:,} were")
            yield from _conflicts(step.before, commit, erased=erased)
        if step.after is not None and commit.rows_after != step.after.num_live:
            yield damage(path, f"says {commit.rows_after:,} rows after it where {step.after.num_live:,} are")
        if step.number in chain.checkpoints and step.after != chain.checkpoints[step.number]:
            yield damage(checkpoint_path(step.number), "is not what the commits before it add up to", _SPARE)


def _conflicts(before: State, commit: Commit, *, erased: bool) -> Iterator[Finding]:
    """Findings for actions that conflict with a state. In redacted versions SetIndex is excused.

    An erasure may have removed the index that the action replaced.
    """
    for action in commit.actions:
        conflict = before.conflict(action, before)
        if conflict and not (erased and isinstance(action, SetIndex)):
            yield damage(commit_path(commit.version), f"should not have been committed: {conflict.said}")


def check_rollup(log: VersionLog, chain: Chain) -> Iterator[Finding]:
    """Findings about a roll-up that is missing, old, not whole, or other than the commits. One request."""
    try:
        run = log.read_rollup()
    except MissingFile:  # an older release wrote none; an erasure or an expiry removes it for a while
        if chain.newest - chain.first > MOST_BEHIND:
            yield Finding("note", ROLLUP, "is not there, so that the memory opens slowly", _WRITTEN_ANEW)
        return
    except (DamagedFile, FormatError, NotPermitted) as error:
        yield _unreadable(ROLLUP, error, _SPARE_ROLLUP)
        return
    differs = any(chain.commits.get(commit.version, commit) != commit for commit in run.commits)
    if not chain.findings:  # it is of versions that were dropped before a slow writer wrote it
        differs |= run.version < chain.first
    if run.begun is not None:
        differs |= any(step.after != run.begun for step in chain.steps() if step.number == run.begun.version)
    if differs:
        yield damage(ROLLUP, "is not what the commits in it say", _SPARE_ROLLUP)
    elif run.version < chain.newest - MOST_BEHIND:
        what = f"leads to version {run.version}, and {chain.newest} is the newest there is"
        yield Finding("note", ROLLUP, what, _WRITTEN_ANEW)


def check_hint(log: VersionLog, chain: Chain) -> Iterator[Finding]:
    """Findings about the hint that points to the newest version."""
    if not log.storage.exists(HINT):
        return
    try:
        hinted = int(log.storage.read(HINT))
    except NotPermitted as error:
        yield not_looked_at(error)
        return
    except (DamagedFile, ValueError):
        yield Finding("note", HINT, "is no number", "nothing: no reader depends on it, and it is written anew")
        return
    if hinted > chain.newest:
        what = f"points to version {hinted}, and {chain.newest} is the newest there is"
        yield Finding("note", HINT, what, "look whether a copy of the memory has later versions")


def _gaps(there: list[int], has_start: bool) -> Iterator[Finding]:
    """Findings for gaps in the version numbers `there` (ascending)."""
    for below, above in itertools.pairwise(there):
        if above > below + 1:
            others = f", and so is every version up to {above - 1}" if above > below + 2 else ""
            yield damage(commit_path(below + 1), f"is missing{others}", RESTORE)
    contiguous = there[-1] - there[0] == len(there) - 1
    if contiguous and there[0] != 1 and not has_start:
        what = f"is missing, and so is a checkpoint of version {there[0]}, which could stand for it"
        yield damage(commit_path(there[0] - 1), what, RESTORE)


def _unreadable(path: str, error: Exception, advice: str) -> Finding:
    if isinstance(error, NotPermitted):
        return not_looked_at(error)
    if isinstance(error, FormatError):
        what = f"is in format {error.found} and this release reads format {error.reads}"
        return damage(path, what, _LATER)
    what = "is missing" if isinstance(error, MissingFile) else "is not as it was written"
    return damage(path, what, advice)


def _folded(before: State, commit: Commit) -> State | None:
    state = before
    try:
        for action in commit.actions:
            state = state.after(action)
    except (ValueError, IndexError):  # an action names something that does not exist
        return None
    return state.model_copy(update={"version": commit.version})

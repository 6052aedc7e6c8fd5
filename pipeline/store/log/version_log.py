"""The log of commits: one immutable JSON file each, published only if its number is free.

A reader applies commits to a State, starting at a checkpoint. A writer that finds its number taken applies the other
commit and tries the next number. If its actions conflict with the other commit, it writes nothing and raises an error.

The last commits also lie in one file, the roll-up (`rollups`), from which a memory is opened.

The retained versions are a range of numbers without a gap, up to the newest. It starts at 1, or at a checkpoint if
older versions were dropped. Without a roll-up, `latest` is a hint where to start looking; nothing depends on it.
"""

import contextlib
import datetime
import getpass
import hashlib
import itertools
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import (
    CommitConflict,
    DamagedFile,
    FirstAddUnfinished,
    FormatError,
    MemoryMissing,
    MissingFile,
    NotPermitted,
    VisualMemoryError,
)
from pipeline.store.layout import (
    HINT,
    INDEX,
    ROLLUP,
    TOMBSTONES_FOLDER,
    UNFINISHED_COPY,
    VERSIONS,
    checkpoint_path,
    commit_path,
)
from pipeline.store.log.documents import (
    FORMATS_READ,
    Checkpoint,
    Commit,
    Rollup,
    not_whole,
    read_document,
    sealed_checkpoint,
    sealed_commit,
    sealed_rollup,
)
from pipeline.store.log.listing import Listing
from pipeline.store.log.rollups import (
    CHECKPOINT_EVERY,
    MOST_ROLLED_BYTES,
    ROLLUP_EVERY,
    STATE_FACTOR,
    Tail,
)
from pipeline.store.log.state import Action, AddSegment, BreakLeases, SetIdentity, SetState, State, file_refs
from pipeline.store.log.steady import steady
from pipeline.store.segments.first_add import unfinished_first_add
from pipeline.store.storage.interface import AlreadyExists, Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.values import MAX_VERSION

GROUP = 1_000  # versions that may be dropped by one request; a constant of the format, as every process must know it
MAX_ATTEMPTS = 1_000  # each lost race means that another writer got its commit in
MAX_LISTINGS = 10  # of a folder that other processes change
FRESH_SECONDS = 5.0  # a commit on a state seen as lately does not look for a newer one first
SOON_SECONDS = 1.0  # in which no version is committed, followed by others and dropped
READ_AHEAD = 32  # commits read in parallel: over a network this takes as long as reading one

# A commit's file begins with its format, its version and its nonce of 16 digits.
HEAD_BYTES = 512
_FORMAT = re.compile(rb'\A\{\s*"format": ?([0-9]{1,9})')
_NONCE = re.compile(rb'"nonce": ?"([0-9a-f]{1,64})"')

Result = TypeVar("Result")
Prepare = Callable[[int, State], Sequence[Action]]


@dataclass(frozen=True)
class Retained:
    """What other processes may change under a reader of all versions: the first retained one, and the erasures."""

    first: int
    erasures: tuple[str, ...]


class VersionLog:
    """The versions of one memory."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._known: State | None = None  # the newest state seen, where the next look starts
        self._known_nonce: str | None = None  # of its commit, to detect another commit in its place
        self._seen_at = 0.0  # by time.monotonic, when it was known to be the newest
        self._tail = Tail()  # the commits that led to it
        self._has_rolled_up = False

    def newest(self) -> State | None:
        """The newest state, or None if no version was committed yet. Raises DamagedFile or FormatError."""
        try:
            return self.latest()
        except MemoryMissing:
            return None

    def latest(self) -> State:
        """The newest state. Raises MemoryMissing, DamagedFile or FormatError.

        If another memory, such as an older copy, has replaced the one seen before, it is read from the start.
        """
        state, nonce, nonce_if_there = self._known, self._known_nonce, self._nonce_if_there
        if state is None:
            state, nonce = self._rolled_up() or (None, None)
            if nonce is not None:
                nonce_if_there = self._nonce_if_whole  # the commit itself was not read, and may be damaged
            if state is None:
                state, nonce = self._hinted() or (None, None)
        if state is not None:
            newer, newest_nonce = self._followed(state)
            # Versions are dropped in order (see `in_droppable_groups`). While the first one is there, none after it was
            # dropped. Once it is gone, the later versions cannot be found from it.
            found = None if self._has_later(newer.version) else nonce_if_there(state.version)
            if found is not None and found == (nonce or found):
                self._known, self._known_nonce = newer, newest_nonce or found
                self._seen_at = time.monotonic()
                return newer
            self._known = self._known_nonce = None
        self._known, self._known_nonce = steady(self.listing, self._newest_of)
        self._seen_at = time.monotonic()
        return self._known

    def nonce_of(self, version: int) -> str:
        """The nonce of a version's commit, which differs from that of any other commit. Raises DamagedFile."""
        if self._known is not None and self._known.version == version and self._known_nonce is not None:
            return self._known_nonce
        nonce = self._nonce_if_there(version)
        return nonce if nonce is not None else self._read(version).nonce

    def at(self, version: int | None) -> State:
        """The state at a version (None: the newest). Raises MemoryMissing, DamagedFile or FormatError."""
        if version is None:
            return self.latest()
        wanted = version

        def read(kept: range) -> State:
            if wanted in kept:
                return self._folded_to(wanted)
            raise MemoryMissing(
                f"the memory at {self.storage.uri} has no version {wanted}: it goes from {kept[0]} to {kept[-1]}"
            )

        return steady(self.retained, read)

    def over_retained(self, read: Callable[["Retained"], Result]) -> Result:
        """The result of `read` over all retained versions; repeated if versions were dropped or redacted meanwhile."""
        return steady(lambda: Retained(self.retained()[0], self.latest().erasures), read)

    def retained(self) -> range:
        """The numbers of the retained versions. Raises MemoryMissing or DamagedFile."""
        return self._kept_of(self.listing())

    def listing(self) -> Listing:
        """What lies in versions/ now. Raises MemoryMissing or DamagedFile if the retained versions cannot be told."""
        for attempt in range(MAX_LISTINGS):
            listing = Listing.of(self.storage.list(VERSIONS))
            if not listing.newest:
                raise self._nothing_here()
            lowest = listing.lowest
            if lowest == 1:
                return listing
            has_start = any(number >= lowest for number in listing.checkpoints)
            # A listing is not a snapshot. It may lack a commit and yet show later ones, or lack the checkpoint that was
            # written before older versions were dropped. So ask for the commit, or list the folder again.
            if self.storage.exists(commit_path(lowest - 1)) or not (lowest in listing.checkpoints or attempt):
                continue
            if has_start:
                return listing
            break
        self._refuse_unfinished_copy()
        raise DamagedFile(
            f"{commit_path(lowest - 1)} is missing from the memory at {self.storage.uri}: "
            "restore it from a copy of the memory"
        )

    @staticmethod
    def _kept_of(listing: Listing) -> range:
        """The retained versions: all that are listed from the lowest on, or from the first checkpoint after it."""
        lowest = listing.lowest
        first = 1 if lowest == 1 else next(number for number in listing.checkpoints if number >= lowest)
        return range(first, listing.newest + 1)

    def commits(self, numbers: Sequence[int]) -> Iterator[Commit]:
        """The commits of some versions, in the given order. Up to READ_AHEAD commits are read in parallel."""
        if len(numbers) < READ_AHEAD:
            yield from map(self._read, numbers)
            return
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            for start in range(0, len(numbers), READ_AHEAD):
                yield from pool.map(self._read, numbers[start : start + READ_AHEAD])

    def states(self) -> Iterator[tuple[Commit, State]]:
        """Every retained version, oldest first, with its state."""
        kept = self.retained()
        state = self._folded_to(kept[0])
        yield self._read(kept[0]), state
        for commit in self.commits(kept[1:]):
            state = self._folded(state, commit)
            yield commit, state

    def commit(
        self,
        base: State,
        command: str,
        prepare: Prepare,
        lease: Lease | None = None,
        kept_files: Callable[[], AbstractSet[str]] = frozenset,
    ) -> State:
        """Publish actions prepared on `base` and return the state they lead to.

        `prepare` gets the version number to try and the state before it; it is called again after each lost race.
        `lease` holds the files that the actions name. Those of an attempt that was lost are removed, except
        `kept_files`. Raises CommitConflict if an action conflicts with other commits,
        or if the lease was broken.
        """
        nonce = secrets.token_hex(8)
        state = self._caught_up(base, lease)
        actions: tuple[Action, ...] = ()
        for _ in range(MAX_ATTEMPTS):
            number = state.version + 1
            lost = actions
            try:
                actions = tuple(prepare(number, state))
            except BaseException:
                self._discard(lost, (), lease, kept_files)
                raise
            self._discard(lost, actions, lease, kept_files)
            for action in actions:
                if conflict := state.conflict(action, base):
                    self._discard(actions, (), lease, kept_files)
                    raise CommitConflict(
                        f"{conflict.said} meanwhile, and nothing was changed: run the command again", conflict.reason
                    )
            after = self._after(state, number, actions)
            commit = Commit(
                version=number,
                nonce=nonce,
                committed_at=datetime.datetime.now(datetime.UTC),
                author=f"{getpass.getuser()}@{socket.gethostname()}",
                command=command,
                rows_before=state.num_live,
                rows_after=after.num_live,
                actions=actions,
            )
            try:
                self.storage.create(commit_path(number), sealed_commit(commit))
            except AlreadyExists:
                theirs = self._read_if_there(number)
                if theirs is not None and theirs.nonce != nonce:
                    _refuse_broken(lease, theirs)
                    state = self._followed_by(state, theirs)
                    continue
            if self._was_dropped(number):
                # Either the name was free because older versions were dropped: then this commit has no effect. Or
                # others built on it before all these versions were dropped. The commit file can be removed. The files
                # that it names must stay; at worst they are garbage.
                self.storage.delete([commit_path(number)])
                raise CommitConflict(
                    "another process dropped versions just while this one was committed, so that it cannot be told "
                    "whether it counts: look at the memory, and run the command again if it has not changed",
                    "versions dropped",
                )
            return self._committed(after, commit)
        raise CommitConflict(
            f"{MAX_ATTEMPTS} other writers were faster: run the command again when fewer are at work",
            "too many writers",
        )

    def rewrite(self, commit: Commit) -> None:
        """Replace the commit of this number. Only an erasure and `copy` do that."""
        self.storage.replace(commit_path(commit.version), sealed_commit(commit))

    def rewrite_checkpoint(self, state: State) -> None:
        """Write the checkpoint of a version, and replace the old one if there is one."""
        self.storage.replace(checkpoint_path(state.version), sealed_checkpoint(state))

    def remove_rollup(self) -> None:
        """Remove the roll-up, before versions are changed or dropped whose commits it may hold."""
        self.storage.delete([ROLLUP])

    def renew_rollup(self) -> None:
        """Write a roll-up of the newest version from its checkpoint and commits as they are now."""
        with contextlib.suppress(VisualMemoryError, OSError):  # nothing depends on it
            log = VersionLog(self.storage)
            log._known, log._known_nonce = steady(log.listing, log._newest_of)
            log._roll_up(log._known, always=True)
            self._tail = log._tail

    def checkpoints(self) -> list[int]:
        """The versions that have a checkpoint, ascending."""
        return list(Listing.of(self.storage.list(VERSIONS)).checkpoints)

    def read_rollup(self) -> Rollup:
        """The last commits in one file. Raises DamagedFile, MissingFile or FormatError."""
        return read_document(self.storage, ROLLUP, Rollup)

    def read_checkpoint(self, number: int) -> State:
        """The state in a checkpoint. Raises DamagedFile."""
        return read_document(self.storage, checkpoint_path(number), Checkpoint).state

    def _begun_at(self, number: int) -> State:
        """The state in checkpoint `number`, or an empty state for 0. Raises DamagedFile."""
        state = self.read_checkpoint(number) if number else State()
        if state.version != number:
            raise not_whole(self.storage, checkpoint_path(number))
        return state

    def _discard(
        self,
        lost: Sequence[Action],
        kept: Sequence[Action],
        lease: Lease | None,
        kept_files: Callable[[], AbstractSet[str]],
    ) -> None:
        """Remove files that were written for actions that will not be committed.

        Files of a segment stay: the same command can continue from them. Files of an erasure stay too: it will name
        them in older versions, and it removes them itself. So do the files of `kept_files`.
        """
        named = {file.path for action in kept for file in file_refs(action)}
        for action in lost:
            erases = isinstance(action, SetState) and action.why == "erase"
            if lease is not None and not erases and not isinstance(action, AddSegment | SetIdentity):
                paths = {file.path for file in file_refs(action) if lease.nonce in file.path}
                self.storage.delete(sorted(paths - named - kept_files()))

    def _caught_up(self, base: State, lease: Lease | None) -> State:
        """The newest state. Raises CommitConflict if the lease was broken meanwhile."""
        state = base
        if base is self._known and time.monotonic() - self._seen_at < FRESH_SECONDS:
            return state  # a commit of another writer since then takes the number, and is followed then
        if base.version:
            while (theirs := self._read_if_there(state.version + 1)) is not None:
                _refuse_broken(lease, theirs)
                state = self._followed_by(state, theirs)
            # Otherwise commits on the way may not be retained.
            if not self._has_later(state.version) and self.storage.exists(commit_path(base.version)):
                return state
        self._known = self._known_nonce = None
        state = self.newest() or State()
        if lease is not None and lease.nonce in state.broken:
            raise _broken(lease)
        return state

    def _has_later(self, number: int) -> bool:
        """Whether the last version of the group after `number` is there, so that the version after it was dropped.

        Asked when that version is missing. One request, none if the version after `number` is the last of its group.
        """
        last = last_of_group(number + 1)
        return last != number + 1 and self.storage.exists(commit_path(last))

    def _was_dropped(self, number: int) -> bool:
        """Whether a version is not retained. Versions are dropped in order, so the one before it is dropped first."""
        if number > 1 and not self._has_later(number - 1) and self.storage.exists(commit_path(number - 1)):
            return False
        return number not in self.retained()  # it may be the first retained version

    def _committed(self, state: State, commit: Commit) -> State:
        self._known, self._known_nonce = state, commit.nonce
        self._seen_at = time.monotonic()
        self._tail = self._tail.after(commit)
        if state.version % CHECKPOINT_EVERY == 0:
            with contextlib.suppress(AlreadyExists):  # an expiry or an erasure has written it already
                checkpoint = sealed_checkpoint(state)
                self.storage.create(checkpoint_path(state.version), checkpoint)
            self._tail = Tail(state.version)
            self.storage.replace(HINT, str(state.version).encode())
        if state.version % ROLLUP_EVERY == 0 or not self._has_rolled_up:
            self._roll_up(state, always=state.version % ROLLUP_EVERY == 0)
            self._has_rolled_up = True
        return state

    def _roll_up(self, state: State, *, always: bool) -> None:
        """Replace the roll-up by one of the newest version, if the commits since a checkpoint are known.

        Two requests, three after the first time; one more on a disk or after SOON_SECONDS. Fails for no reason: the
        version is committed, and nothing depends on a roll-up. Only `always` writes a large roll-up, unless the whole
        state takes as little.
        """
        tail = self._tail
        if tail.start is None or tail.version != state.version:
            return
        with contextlib.suppress(VisualMemoryError, OSError):
            if self._has_rolled_up and tail.begun is None:  # the process may have begun long ago
                begins = checkpoint_path(tail.start) if tail.needs_checkpoint else commit_path(tail.start + 1)
                if not self.storage.exists(begins):  # older versions were dropped
                    self.renew_rollup()
                    return
            run = sealed_rollup(tail.commits, tail.start + 1, tail.begun)
            if len(run) > MOST_ROLLED_BYTES:
                whole = sealed_rollup((), state.version + 1, state)
                if len(whole) <= STATE_FACTOR * len(run):
                    self._tail, run = Tail(state.version, (), state), whole
                elif not always:
                    return
            self.storage.replace(ROLLUP, run)
            # What was written before an erasure or an expiry was committed may hold what is gone since.
            is_true = False
            try:
                if self.storage.exists(commit_path(state.version + 1)):
                    is_true = self.latest().erasures == state.erasures and self.storage.exists(
                        commit_path(state.version)
                    )
                else:
                    is_remote = "://" in self.storage.uri  # elsewhere a request costs nothing, and commits take no time
                    is_soon = is_remote and time.monotonic() - self._seen_at < SOON_SECONDS
                    is_true = is_soon or self.storage.exists(commit_path(state.version))
            finally:
                if not is_true:
                    self.remove_rollup()

    def _rolled_up(self) -> tuple[State, str | None] | None:
        """The state that the roll-up leads to, and the nonce of its last commit if it has one; None without its use.

        One request, and one for a checkpoint.
        """
        try:
            run = self.read_rollup()
            begun = run.begun
            if begun is None:
                needs_checkpoint = Tail(run.first - 1, run.commits).needs_checkpoint
                begun = self._begun_at(run.first - 1) if needs_checkpoint else State(version=run.first - 1)
        except (DamagedFile, FormatError, NotPermitted):  # nothing depends on a roll-up
            return None
        return self._led_to(begun, run.commits, is_given=run.begun is not None)

    def _hinted(self) -> tuple[State, str | None] | None:
        """The state that the hint points to, and the nonce of its commit if it is known; None if there is no use of it.

        A request each for the hint, a checkpoint and the commits after it.
        """
        try:
            number = int(self.storage.read(HINT))
            if not 0 < number <= MAX_VERSION:
                return None
            start = number - number % CHECKPOINT_EVERY
            return self._led_to(self._begun_at(start), self.commits(range(start + 1, number + 1)))
        except (DamagedFile, NotPermitted, ValueError):  # nothing depends on a hint
            return None

    def _led_to(self, state: State, commits: Iterable[Commit], *, is_given: bool = False) -> tuple[State, str | None]:
        """The state that commits lead to, and the nonce of the last. They begin the next roll-up.

        They follow a checkpoint, or a state that a roll-up gave.
        """
        nonce = None
        self._tail = Tail(state.version, (), state if is_given else None)
        for commit in commits:
            state, nonce = self._followed_by(state, commit), commit.nonce
        return state, nonce

    def _followed(self, state: State) -> tuple[State, str | None]:
        """The newest state after `state`, and the nonce of its commit; the nonce is None if no commit follows."""
        nonce = None
        while (commit := self._read_if_there(state.version + 1)) is not None:
            state, nonce = self._followed_by(state, commit), commit.nonce
        return state, nonce

    def _followed_by(self, state: State, commit: Commit) -> State:
        """The state after the next commit, which the next roll-up will have."""
        self._tail = self._tail.after(commit)
        return self._folded(state, commit)

    def _nonce_if_there(self, number: int) -> str | None:
        """The nonce of a commit, read from the head of its file; None if there is no such file, or another format."""
        try:
            head = self.storage.read_range(commit_path(number), 0, HEAD_BYTES)
        except DamagedFile:
            return None
        if (written := _FORMAT.match(head)) and int(written[1]) not in FORMATS_READ:
            return None
        found = _NONCE.search(head)
        return found[1].decode() if found else hashlib.sha256(head).hexdigest()

    def _nonce_if_whole(self, number: int) -> str | None:
        """The nonce of a commit, whose whole file is read; None if there is no such file. Raises DamagedFile."""
        commit = self._read_if_there(number)
        return commit.nonce if commit is not None else None

    def _newest_of(self, listing: Listing) -> tuple[State, str | None]:
        """The state of the newest listed version, and the nonce of its commit."""
        newest = listing.newest
        start = max((number for number in listing.checkpoints if number <= newest), default=0)
        state, nonce = self._led_to(self._begun_at(start), self.commits(range(start + 1, newest + 1)))
        return state, nonce or self.nonce_of(newest)

    def _folded_to(self, version: int) -> State:
        """The state at a retained version."""

        def fold(start: int) -> State:
            state = self._begun_at(start)
            for commit in self.commits(range(start + 1, version + 1)):
                state = self._folded(state, commit)
            return state

        return steady(lambda: self._nearest_checkpoint(version), fold)

    def _nearest_checkpoint(self, version: int) -> int:
        """The last version up to this one that has a checkpoint; 0 if none has."""
        return max((number for number in self.checkpoints() if number <= version), default=0)

    def _nothing_here(self) -> MemoryMissing | DamagedFile:
        """The error that explains why there is no version at all."""
        self._refuse_unfinished_copy()
        if self.storage.list(TOMBSTONES_FOLDER) + self.storage.list(INDEX):
            return DamagedFile(f"the memory at {self.storage.uri} has lost its versions/: restore them from a copy")
        if (unfinished := unfinished_first_add(self.storage)) is not None:
            return FirstAddUnfinished(unfinished)
        return MemoryMissing(f"there is no memory at {self.storage.uri}: make one with `add`")

    def _refuse_unfinished_copy(self) -> None:
        if self.storage.exists(UNFINISHED_COPY):
            raise DamagedFile(
                f"{self.storage.uri} holds a copy of a memory that was not finished: run the same `copy` again"
            )

    def _folded(self, state: State, commit: Commit) -> State:
        return self._after(state, commit.version, commit.actions)

    def _after(self, state: State, number: int, actions: Sequence[Action]) -> State:
        for action in actions:
            state = state.after(action)
        return state.model_copy(update={"version": number})

    def _read_if_there(self, number: int) -> Commit | None:
        """The commit in the single file of a version; None if there is none."""
        try:
            return self._read(number)
        except MissingFile:
            return None

    def _read(self, number: int) -> Commit:
        commit = read_document(self.storage, commit_path(number), Commit)
        if commit.version != number:
            raise not_whole(self.storage, commit_path(number))
        return commit


def in_droppable_groups(numbers: Sequence[int], newest: int) -> Iterator[list[int]]:
    """Split version numbers (ascending) into the groups in which their commits may be deleted, one group at a time.

    A store deletes a thousand objects in one request, in any order. So a process may find a version whose successor is
    gone already. It must not take that version for the newest one. It asks for the last version of the group, whose
    number is a multiple of GROUP: that one is deleted by itself, after the others of its group and before later ones.
    Versions after the last such number that exists are deleted one by one.
    """
    for last, group in itertools.groupby(numbers, last_of_group):
        members = list(group)
        others = [number for number in members if number != last]
        if last > newest:
            yield from ([number] for number in others)
        elif others:
            yield others
        if members[-1] == last:
            yield [last]


def last_of_group(number: int) -> int:
    """The last version of the group that a version belongs to."""
    return -(-number // GROUP) * GROUP


def _refuse_broken(lease: Lease | None, commit: Commit) -> None:
    for action in commit.actions:
        if lease is not None and isinstance(action, BreakLeases) and lease.nonce in action.leases:
            raise _broken(lease)


def _broken(lease: Lease) -> CommitConflict:
    return CommitConflict(
        f"this process was taken for dead and lost its lease {lease.nonce} on what it had written, so nothing was "
        "changed: run the command again",
        "lease lost",
    )

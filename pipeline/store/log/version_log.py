"""The log of commits: one immutable JSON file each, published only if its number is free.

A reader folds commits into a State, starting at a checkpoint. A writer that finds its number taken folds the newcomer
in and tries the next, unless what it prepared no longer fits: then nothing is written and it says so.

Every file ends with the hash of what it says, so that an altered one is told from a whole one.

The versions kept are a row of numbers without a gap, from 1 or from the checkpoint at which older ones were dropped,
to the newest. `latest` is a hint where to begin looking, and nothing depends on it.
"""

import datetime
import getpass
import hashlib
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, model_validator

from pipeline.errors import (
    CommitConflict,
    DamagedFile,
    FirstAddUnfinished,
    FormatError,
    MemoryMissing,
    NotPermitted,
)
from pipeline.store.layout import (
    HINT,
    INDEX,
    TOMBSTONES_FOLDER,
    UNFINISHED_COPY,
    VERSIONS,
    checkpoint_number,
    checkpoint_path,
    commit_number,
    commit_path,
)
from pipeline.store.log.state import Action, AddSegment, BreakLeases, SetIdentity, SetState, State, file_refs
from pipeline.store.log.steady import steady
from pipeline.store.segments.first_add import unfinished_first_add
from pipeline.store.storage.file_refs import check_places
from pipeline.store.storage.interface import AlreadyExists, Storage, missing_file
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.schemas import FORMAT
from pipeline.store.values import MAX_VERSION, Balance, Hexadecimal, VersionNumber

CHECKPOINT_EVERY = 100
HINT_EVERY = 16
MAX_ATTEMPTS = 1_000  # each lost race means that another writer got its commit in
MAX_LISTINGS = 10  # of a folder that others change meanwhile
READ_AHEAD = 32  # commits asked for at once, which over a network costs as much as asking for one

# A commit's file begins with its format, version and nonce, which is of 16 digits.
HEAD_BYTES = 512
_NONCE = re.compile(rb'"nonce": ?"([0-9a-f]{1,64})"')

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")
Prepare = Callable[[int, State], Sequence[Action]]


class Commit(BaseModel):
    """One version file. `nonce` tells a writer whose answer was lost that the file it meets is its own.

    It names files in the folders that hold what versions name, and nowhere else. `rows_before` and `rows_after` count
    live entries.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    version: VersionNumber
    nonce: Hexadecimal
    committed_at: AwareDatetime
    author: str
    command: str
    rows_before: Balance
    rows_after: Balance
    actions: tuple[Action, ...]

    @model_validator(mode="after")
    def _inside(self) -> "Commit":
        check_places(file_refs(self.actions))
        return self


class Checkpoint(BaseModel):
    """The whole state at a version, so that opening need not read every commit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    state: State

    @model_validator(mode="after")
    def _inside(self) -> "Checkpoint":
        check_places(file_refs(self.state))
        return self


class _Written(BaseModel):
    """What a version file says of its format, whatever else it says."""

    model_config = ConfigDict(extra="ignore")

    format: int


@dataclass(frozen=True)
class Retained:
    """What others may change under whoever reads all versions: the first that is kept, and the erasures so far."""

    first: int
    erasures: tuple[str, ...]


class VersionLog:
    """The versions of one memory."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._known: State | None = None  # the newest state seen, from which to look on
        self._known_nonce: str | None = None  # of its commit, by which another in its place is told

    def newest(self) -> State | None:
        """The newest state, or None where no version was committed yet. Raises DamagedFile or FormatError."""
        try:
            return self.latest()
        except MemoryMissing:
            return None

    def latest(self) -> State:
        """The newest state. Raises MemoryMissing, DamagedFile or FormatError.

        Another memory that lies in the place of the one seen before, such as an older copy, is read anew.
        """
        state, nonce = self._known, self._known_nonce
        if state is None:
            state, nonce = self._hinted(), None
        if state is not None:
            newer, newest_nonce = self._followed(state)
            # Versions are dropped in order. While the one begun from is there, none was dropped on the way; once it is
            # gone, what comes after cannot be found from here.
            found = self._nonce_if_there(state.version)
            if found is not None and found == (nonce or found):
                self._known, self._known_nonce = newer, newest_nonce or found
                return newer
            self._known = self._known_nonce = None
        self._known, self._known_nonce = steady(
            lambda: self.retained()[-1], lambda newest: (self._folded_to(newest), self._nonce_if_there(newest))
        )
        return self._known

    def nonce_of(self, version: int) -> str:
        """What tells the commit of a version from another of the same number. Raises DamagedFile."""
        if self._known is not None and self._known.version == version and self._known_nonce is not None:
            return self._known_nonce
        nonce = self._nonce_if_there(version)
        if nonce is None:
            raise missing_file(self.storage.uri, commit_path(version))
        return nonce

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
        """What `read` finds in all versions that are kept; anew where some were dropped or redacted meanwhile."""
        return steady(lambda: Retained(self.retained()[0], self.latest().erasures), read)

    def retained(self) -> range:
        """The numbers of the versions that can be read. Raises MemoryMissing or DamagedFile."""
        for attempt in range(MAX_LISTINGS):
            names = self.storage.list(VERSIONS)
            numbers = {number for number in map(commit_number, names) if number is not None}
            if not numbers:
                raise self._nothing_here()
            lowest = newest = max(numbers)
            while lowest - 1 in numbers:
                lowest -= 1
            if lowest == 1:
                return range(1, newest + 1)
            points = (number for number in map(checkpoint_number, names) if number is not None)
            starts = [number for number in points if number >= lowest]
            # A listing is no snapshot: it may lack a commit, or the checkpoint written before older ones were dropped,
            # and show what came after. What it lacks is asked for, or looked for in a listing begun since.
            if self.storage.exists(commit_path(lowest - 1)) or not (lowest in starts or attempt):
                continue
            if starts:
                return range(starts[0], newest + 1)
            break
        self._refuse_unfinished_copy()
        raise DamagedFile(
            f"{commit_path(lowest - 1)} is missing from the memory at {self.storage.uri}: "
            "restore it from a copy of the memory"
        )

    def commits(self, numbers: Sequence[int]) -> Iterator[Commit]:
        """The commits of some versions, in the order given, the next ones being read meanwhile."""
        if len(numbers) < READ_AHEAD:
            yield from map(self._read, numbers)
            return
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            for start in range(0, len(numbers), READ_AHEAD):
                yield from pool.map(self._read, numbers[start : start + READ_AHEAD])

    def states(self) -> Iterator[tuple[Commit, State]]:
        """Every version that can be read, oldest first, with its state."""
        kept = self.retained()
        state = self._folded_to(kept[0])
        yield self._read(kept[0]), state
        for commit in self.commits(kept[1:]):
            state = self._folded(state, commit)
            yield commit, state

    def commit(self, base: State, command: str, prepare: Prepare, lease: Lease | None = None) -> State:
        """Publish actions prepared on `base` and return the state they lead to.

        `prepare` is given the version number to be tried and the state it will follow; it is called again after each
        lost race. `lease` is the one that holds the files the actions name. Raises CommitConflict when an action no
        longer fits what others committed, or when the lease was broken.
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
                self._discard(lost, (), lease)
                raise
            self._discard(lost, actions, lease)
            for action in actions:
                if reason := state.conflict(action, base):
                    self._discard(actions, (), lease)
                    raise CommitConflict(f"{reason} meanwhile, and nothing was changed: run the command again")
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
                self.storage.create(commit_path(number), _sealed(commit))
            except AlreadyExists:
                theirs = self._read_if_there(number)
                if theirs is not None and theirs.nonce != nonce:
                    _refuse_broken(lease, theirs)
                    state = self._folded(state, theirs)
                    continue
            if self._was_dropped(number):
                # Either the name was free because older versions are, and this commit counts for nothing; or others
                # built on it before all that was dropped. It can go; what it names must stay, and is garbage at worst.
                self.storage.delete([commit_path(number)])
                raise CommitConflict(
                    "another process dropped versions just while this one was committed, so that it cannot be told "
                    "whether it counts: look at the memory, and run the command again if it has not changed"
                )
            return self._committed(after, nonce)
        raise CommitConflict(f"{MAX_ATTEMPTS} other writers were faster: run the command again when fewer are at work")

    def rewrite(self, commit: Commit) -> None:
        """Put another commit in the place of the one of this number: an erasure does, and what makes a copy."""
        self.storage.replace(commit_path(commit.version), _sealed(commit))

    def rewrite_checkpoint(self, state: State) -> None:
        """Write the checkpoint of a version, whatever was there."""
        self.storage.replace(checkpoint_path(state.version), _sealed(Checkpoint(state=state), indent=None))

    def checkpoints(self) -> list[int]:
        """The versions that have a checkpoint."""
        return [number for number in map(checkpoint_number, self.storage.list(VERSIONS)) if number is not None]

    def read_checkpoint(self, number: int) -> State:
        """The state in a checkpoint. Raises DamagedFile."""
        return self._parsed(checkpoint_path(number), Checkpoint).state

    def _begun_at(self, number: int) -> State:
        """The state to fold commits into from a checkpoint on, from the very first for 0. Raises DamagedFile."""
        state = self.read_checkpoint(number) if number else State()
        if state.version != number:
            raise self._damaged(checkpoint_path(number))
        return state

    def _discard(self, lost: Sequence[Action], kept: Sequence[Action], lease: Lease | None) -> None:
        """Remove what was written for actions that will not be committed; a segment stays, to go on from.

        What an erasure wrote stays too, for older versions are to name it: it sees to that itself.
        """
        named = {file.path for action in kept for file in file_refs(action)}
        for action in lost:
            erases = isinstance(action, SetState) and action.why == "erase"
            if lease is not None and not erases and not isinstance(action, AddSegment | SetIdentity):
                paths = {file.path for file in file_refs(action) if lease.nonce in file.path}
                self.storage.delete(sorted(paths - named))

    def _caught_up(self, base: State, lease: Lease | None) -> State:
        """The newest state, having seen that nobody broke the lease meanwhile."""
        state = base
        if base.version:
            while (theirs := self._read_if_there(state.version + 1)) is not None:
                _refuse_broken(lease, theirs)
                state = self._folded(state, theirs)
            if self.storage.exists(commit_path(base.version)):  # else some on the way may be none of those kept
                return state
        self._known = self._known_nonce = None
        state = self.newest() or State()
        if lease is not None and lease.nonce in state.broken:
            raise _broken(lease)
        return state

    def _was_dropped(self, number: int) -> bool:
        """Whether a number is not, or no more, one of those kept. They go in order, so its neighbour went first."""
        if number > 1 and self.storage.exists(commit_path(number - 1)):
            return False
        return number not in self.retained()  # it may be the first that is kept

    def _committed(self, state: State, nonce: str) -> State:
        self._known, self._known_nonce = state, nonce
        if state.version % CHECKPOINT_EVERY == 0 and not self.storage.exists(checkpoint_path(state.version)):
            self.rewrite_checkpoint(state)
        if state.version % HINT_EVERY == 0:
            self.storage.replace(HINT, str(state.version).encode())
        return state

    def _hinted(self) -> State | None:
        """The state the hint points to, or None where it does not help."""
        try:
            number = int(self.storage.read(HINT))
            if not 0 < number <= MAX_VERSION or not self.storage.exists(commit_path(number)):
                return None
            checkpoint = number - number % CHECKPOINT_EVERY
            if checkpoint and not self.storage.exists(checkpoint_path(checkpoint)):
                return None
            state = self._begun_at(checkpoint)
            for commit in self.commits(range(state.version + 1, number + 1)):
                state = self._folded(state, commit)
        except (DamagedFile, NotPermitted, ValueError):  # nothing depends on a hint
            return None
        return state

    def _followed(self, state: State) -> tuple[State, str | None]:
        """The newest state that can be reached version by version, and the nonce of its commit if there is one."""
        nonce = None
        while (commit := self._read_if_there(state.version + 1)) is not None:
            state, nonce = self._folded(state, commit), commit.nonce
        return state, nonce

    def _nonce_if_there(self, number: int) -> str | None:
        """The nonce of a commit, read from the head of its file; None where there is no such file."""
        try:
            head = self.storage.read_range(commit_path(number), 0, HEAD_BYTES)
        except DamagedFile:
            return None
        found = _NONCE.search(head)
        return found[1].decode() if found else hashlib.sha256(head).hexdigest()

    def _folded_to(self, version: int) -> State:
        """The state at a version that is known to be kept."""

        def fold(start: int) -> State:
            state = self._begun_at(start)
            for commit in self.commits(range(start + 1, version + 1)):
                state = self._folded(state, commit)
            return state

        return steady(lambda: self._nearest_checkpoint(version), fold)

    def _nearest_checkpoint(self, version: int) -> int:
        """The last version up to this one that has a checkpoint; 0 where none has."""
        return max((number for number in self.checkpoints() if number <= version), default=0)

    def _nothing_here(self) -> MemoryMissing | DamagedFile:
        """Why there is no version at all."""
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
        return steady(
            lambda: self.storage.exists(commit_path(number)), lambda there: self._read(number) if there else None
        )

    def _read(self, number: int) -> Commit:
        commit = self._parsed(commit_path(number), Commit)
        if commit.version != number:
            raise self._damaged(commit_path(number))
        return commit

    def _parsed(self, path: str, model: type[Model]) -> Model:
        data = self.storage.read(path)
        try:
            written = _Written.model_validate_json(data).format
        except ValueError as error:
            raise self._damaged(path) from error
        if written != FORMAT:
            raise FormatError(
                f"the memory at {self.storage.uri} is in format {written} and this release reads format {FORMAT}: "
                "use the release of visual-memory that wrote it"
            )
        try:
            return model.model_validate_json(_unsealed(data))
        except ValueError as error:
            raise self._damaged(path) from error

    def _damaged(self, path: str) -> DamagedFile:
        return DamagedFile(
            f"{path} in the memory at {self.storage.uri} is not a whole version file: "
            "restore it from a copy of the memory"
        )


def _sealed(document: BaseModel, indent: int | None = 1) -> bytes:
    """A version file: JSON whose last field is the sha256 of all that comes before, so that no change goes unseen."""
    body = document.model_dump_json(indent=indent).encode().removesuffix(b"}").rstrip()
    return body + _seal(body)


def _unsealed(data: bytes) -> bytes:
    """The document in a version file. Raises ValueError when it is not as it was written."""
    body = data[: -len(_seal(b""))]
    if _seal(body) != data[len(body) :]:
        raise ValueError("the seal does not fit")
    return body + b"\n}"


def _seal(body: bytes) -> bytes:
    return b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}'


def _refuse_broken(lease: Lease | None, commit: Commit) -> None:
    for action in commit.actions:
        if lease is not None and isinstance(action, BreakLeases) and lease.nonce in action.leases:
            raise _broken(lease)


def _broken(lease: Lease) -> CommitConflict:
    return CommitConflict(
        f"this process was taken for dead and lost its lease {lease.nonce} on what it had written, so nothing was "
        "changed: run the command again"
    )

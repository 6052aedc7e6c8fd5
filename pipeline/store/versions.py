"""The log of commits: one immutable JSON file each, published only if its number is free.

A reader folds commits into a State, starting at a checkpoint. A writer that finds its number taken folds the newcomer
in and tries the next, unless what it prepared no longer fits: then nothing is written and it says so.

The versions kept are a row of numbers without a gap, from 1 or from the checkpoint at which older ones were dropped,
to the newest. `latest` is a hint where to begin looking, and nothing depends on it.
"""

import datetime
import getpass
import json
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import CommitConflict, DamagedFile, FormatError, MemoryMissing
from pipeline.store.leases import Lease
from pipeline.store.schemas import FORMAT
from pipeline.store.state import Action, AddSegment, BreakLeases, SetIdentity, State, file_refs
from pipeline.store.storage import AlreadyExists, Storage

FOLDER = "versions"
HINT = f"{FOLDER}/latest"
CHECKPOINT_EVERY = 100
HINT_EVERY = 16
MAX_ATTEMPTS = 1_000  # each lost race means that another writer got its commit in

_COMMIT_NAME = re.compile(r"\d{20}\.json")
_CHECKPOINT_NAME = re.compile(r"\d{20}\.checkpoint\.json")

Model = TypeVar("Model", bound=BaseModel)
Prepare = Callable[[int, State], Sequence[Action]]


class Commit(BaseModel):
    """One version file. `nonce` tells a writer whose answer was lost that the file it meets is its own.

    `rows_before` and `rows_after` count live entries.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    version: int
    nonce: str
    committed_at: datetime.datetime
    author: str
    command: str
    rows_before: int
    rows_after: int
    actions: tuple[Action, ...]


class Checkpoint(BaseModel):
    """The whole state at a version, so that opening need not read every commit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    state: State


class VersionLog:
    """The versions of one memory."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._known: State | None = None  # the newest state seen, from which to look on

    def newest(self) -> State | None:
        """The newest state, or None where no version was committed yet. Raises DamagedFile or FormatError."""
        try:
            return self.latest()
        except MemoryMissing:
            return None

    def latest(self) -> State:
        """The newest state. Raises MemoryMissing, DamagedFile or FormatError."""
        state = self._known or self._hinted()
        if state is not None:
            newer = self._followed(state)
            # A version that is gone was dropped with all before it: what comes after cannot be found from here.
            if newer.version > state.version or self.storage.exists(commit_path(newer.version)):
                self._known = newer
                return newer
        self._known = self._folded_to(self.kept()[-1])
        return self._known

    def at(self, version: int | None) -> State:
        """The state at a version (None: the newest). Raises MemoryMissing, DamagedFile or FormatError."""
        if version is None:
            return self.latest()
        kept = self.kept()
        if version not in kept:
            raise MemoryMissing(
                f"the memory at {self.storage.uri} has no version {version}: it goes from {kept[0]} to {kept[-1]}"
            )
        return self._folded_to(version)

    def kept(self) -> range:
        """The numbers of the versions that can be read. Raises MemoryMissing or DamagedFile."""
        names = self.storage.list(FOLDER)
        numbers = {int(name[:20]) for name in names if _COMMIT_NAME.fullmatch(name)}
        if not numbers:
            if self.storage.list("tombstones") + self.storage.list("index"):
                raise DamagedFile(f"the memory at {self.storage.uri} has lost its versions/: restore them from a copy")
            raise MemoryMissing(f"there is no memory at {self.storage.uri}: make one with `add`")
        lowest = newest = max(numbers)
        while lowest - 1 in numbers:
            lowest -= 1
        starts = [int(name[:20]) for name in names if _CHECKPOINT_NAME.fullmatch(name) and int(name[:20]) >= lowest]
        if lowest != 1 and not starts:
            raise DamagedFile(
                f"{commit_path(lowest - 1)} is missing from the memory at {self.storage.uri}: "
                "restore it from a copy of the memory"
            )
        first = 1 if lowest == 1 else starts[0]
        return range(first, newest + 1)

    def commits(self, numbers: Sequence[int]) -> Iterator[Commit]:
        """The commits of some versions, in the order given."""
        for number in numbers:
            yield self._read(number)

    def states(self) -> Iterator[tuple[Commit, State]]:
        """Every version that can be read, oldest first, with its state."""
        kept = self.kept()
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
            lost, actions = actions, tuple(prepare(number, state))
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
                self.storage.create(commit_path(number), commit.model_dump_json(indent=1).encode())
            except AlreadyExists:
                theirs = self._read(number)
                if theirs.nonce != nonce:
                    _refuse_broken(lease, theirs)
                    state = self._folded(state, theirs)
                    continue
            if self._was_dropped(
                number
            ):  # the name was free because older versions are: this commit counts for nothing
                self.storage.delete([commit_path(number)])
                self._known = None
                state = self.newest() or State()
                continue
            return self._committed(after)
        raise CommitConflict(f"{MAX_ATTEMPTS} other writers were faster: run the command again when fewer are at work")

    def rewrite(self, commit: Commit) -> None:
        """Put another commit in the place of the one of this number: an erasure does, and nothing else may."""
        self.storage.replace(commit_path(commit.version), commit.model_dump_json(indent=1).encode())

    def rewrite_checkpoint(self, state: State) -> None:
        """Write the checkpoint of a version, whatever was there."""
        self.storage.replace(checkpoint_path(state.version), Checkpoint(state=state).model_dump_json().encode())

    def checkpoints(self) -> list[int]:
        """The versions that have a checkpoint."""
        return [int(name[:20]) for name in self.storage.list(FOLDER) if _CHECKPOINT_NAME.fullmatch(name)]

    def read_checkpoint(self, number: int) -> State:
        """The state in a checkpoint. Raises DamagedFile."""
        return self._parsed(checkpoint_path(number), Checkpoint).state

    def _discard(self, lost: Sequence[Action], kept: Sequence[Action], lease: Lease | None) -> None:
        """Remove what was written for actions that will not be committed; a segment stays, to go on from."""
        named = {file.path for action in kept for file in file_refs(action)}
        for action in lost:
            if lease is not None and not isinstance(action, AddSegment | SetIdentity):
                paths = {file.path for file in file_refs(action) if lease.nonce in file.path}
                self.storage.delete(sorted(paths - named))

    def _caught_up(self, base: State, lease: Lease | None) -> State:
        """The newest state, having seen that nobody broke the lease meanwhile."""
        state = base
        if base.version:
            while (theirs := self._read_if_there(state.version + 1)) is not None:
                _refuse_broken(lease, theirs)
                state = self._folded(state, theirs)
            if self.storage.exists(commit_path(state.version)):
                return state
        self._known = None
        state = self.newest() or State()
        if lease is not None and lease.nonce in state.broken:
            raise _broken(lease)
        return state

    def _was_dropped(self, number: int) -> bool:
        """Whether a number that was free lies among those dropped. They go in order, so its neighbour went first."""
        if number == 1:
            return any(kept > 1 for kept in self.checkpoints())
        return not self.storage.exists(commit_path(number - 1))

    def _committed(self, state: State) -> State:
        self._known = state
        if state.version % CHECKPOINT_EVERY == 0 and not self.storage.exists(checkpoint_path(state.version)):
            self.rewrite_checkpoint(state)
        if state.version % HINT_EVERY == 0:
            self.storage.replace(HINT, str(state.version).encode())
        return state

    def _hinted(self) -> State | None:
        """The state the hint points to, or None where it does not help."""
        try:
            number = int(self.storage.read(HINT))
            if not self.storage.exists(commit_path(number)):
                return None
            checkpoint = number - number % CHECKPOINT_EVERY
            if checkpoint and not self.storage.exists(checkpoint_path(checkpoint)):
                return None
            state = self.read_checkpoint(checkpoint) if checkpoint else State()
            for commit in self.commits(range(state.version + 1, number + 1)):
                state = self._folded(state, commit)
        except (DamagedFile, ValueError):
            return None
        return state

    def _followed(self, state: State) -> State:
        """The newest state that can be reached version by version."""
        while (commit := self._read_if_there(state.version + 1)) is not None:
            state = self._folded(state, commit)
        return state

    def _folded_to(self, version: int) -> State:
        """The state at a version that is known to be kept."""
        checkpoints = [number for number in self.checkpoints() if number <= version]
        state = self.read_checkpoint(checkpoints[-1]) if checkpoints else State()
        for commit in self.commits(range(state.version + 1, version + 1)):
            state = self._folded(state, commit)
        return state

    def _folded(self, state: State, commit: Commit) -> State:
        return self._after(state, commit.version, commit.actions)

    def _after(self, state: State, number: int, actions: Sequence[Action]) -> State:
        for action in actions:
            state = state.after(action)
        return state.model_copy(update={"version": number})

    def _read_if_there(self, number: int) -> Commit | None:
        if not self.storage.exists(commit_path(number)):
            return None
        try:
            return self._read(number)
        except DamagedFile:
            if self.storage.exists(commit_path(number)):
                raise
            return None  # dropped in between

    def _read(self, number: int) -> Commit:
        commit = self._parsed(commit_path(number), Commit)
        if commit.version != number:
            raise self._damaged(commit_path(number))
        return commit

    def _parsed(self, path: str, model: type[Model]) -> Model:
        data = self.storage.read(path)
        try:
            written = json.loads(data)["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(path) from error
        if written != FORMAT:
            raise FormatError(
                f"the memory at {self.storage.uri} is in format {written} and this release reads format {FORMAT}: "
                "use the release of visual-memory that wrote it"
            )
        try:
            return model.model_validate_json(data)
        except ValidationError as error:
            raise self._damaged(path) from error

    def _damaged(self, path: str) -> DamagedFile:
        return DamagedFile(
            f"{path} in the memory at {self.storage.uri} is not a whole version file: "
            "restore it from a copy of the memory"
        )


def commit_path(number: int) -> str:
    """Where the commit of a version lies."""
    return f"{FOLDER}/{number:020d}.json"


def checkpoint_path(number: int) -> str:
    """Where the whole state at a version lies, for those that have it."""
    return f"{FOLDER}/{number:020d}.checkpoint.json"


def _refuse_broken(lease: Lease | None, commit: Commit) -> None:
    for action in commit.actions:
        if lease is not None and isinstance(action, BreakLeases) and lease.nonce in action.leases:
            raise _broken(lease)


def _broken(lease: Lease) -> CommitConflict:
    return CommitConflict(
        f"this process was taken for dead and lost its lease {lease.nonce} on what it had written, so nothing was "
        "changed: run the command again"
    )

"""The log of commits: one immutable JSON file each, published only if its number is free.

A reader folds commits into a State, starting at the newest checkpoint. A writer that finds its number taken folds the
newcomer in and tries the next, unless what it prepared no longer fits: then nothing is written and it says so.
"""

import datetime
import json
import re
import secrets
from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import CommitConflict, DamagedFile, FormatError, MemoryMissing
from pipeline.store.schemas import FORMAT
from pipeline.store.state import Action, State
from pipeline.store.storage import AlreadyExists, Storage

FOLDER = "versions"
CHECKPOINT_EVERY = 100
MAX_ATTEMPTS = 1_000  # each lost race means that another writer got its commit in

_COMMIT_NAME = re.compile(r"\d{20}\.json")

Model = TypeVar("Model", bound=BaseModel)


class Commit(BaseModel):
    """One version file. `nonce` tells a writer whose answer was lost that the file it meets is its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    version: int
    nonce: str
    committed_at: datetime.datetime
    command: str
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

    def newest(self) -> State | None:
        """The newest state, or None where no version was committed yet. Raises DamagedFile or FormatError."""
        try:
            return self.at(None)
        except MemoryMissing:
            return None

    def latest(self) -> State:
        """The newest state. Raises MemoryMissing, DamagedFile or FormatError."""
        return self.at(None)

    def at(self, version: int | None) -> State:
        """The state at a version (None: the newest). Raises MemoryMissing, DamagedFile or FormatError."""
        numbers = self._numbers()
        if not numbers and self.storage.list("tombstones") + self.storage.list("index"):
            raise DamagedFile(f"the memory at {self.storage.uri} has lost its versions/: restore them from a copy")
        if not numbers:
            raise MemoryMissing(f"there is no memory at {self.storage.uri}: make one with `add`")
        wanted = numbers[-1] if version is None else version
        if wanted not in numbers:
            raise MemoryMissing(
                f"the memory at {self.storage.uri} has no version {wanted}: it goes from {numbers[0]} to {numbers[-1]}"
            )
        state = self._newest_checkpoint(wanted)
        for number in range(state.version + 1, wanted + 1):
            state = self._folded(state, self._read(number))
        return state

    def commit(self, base: State, command: str, prepare: Callable[[int], Sequence[Action]]) -> State:
        """Publish actions on top of `base` and return the state they lead to.

        `prepare` is given the version number to be tried, because overlays carry it in their names; it is called
        again after each lost race. Raises CommitConflict when an action no longer fits what others committed.
        """
        nonce = secrets.token_hex(8)
        for _ in range(MAX_ATTEMPTS):
            number = base.version + 1
            actions = tuple(prepare(number))
            for action in actions:
                if reason := base.conflict(action):
                    raise CommitConflict(f"{reason} meanwhile, and nothing was changed: run the command again")
            commit = Commit(
                version=number,
                nonce=nonce,
                committed_at=datetime.datetime.now(datetime.UTC),
                command=command,
                actions=actions,
            )
            try:
                self.storage.create(_commit_path(number), commit.model_dump_json(indent=1).encode())
            except AlreadyExists:
                theirs = self._read(number)
                if theirs.nonce == nonce:
                    return self._committed(base, theirs)
                base = self._folded(base, theirs)
            else:
                return self._committed(base, commit)
        raise CommitConflict(f"{MAX_ATTEMPTS} other writers were faster: run the command again when fewer are at work")

    def _committed(self, base: State, commit: Commit) -> State:
        state = self._folded(base, commit)
        if state.version % CHECKPOINT_EVERY == 0 and not self.storage.exists(_checkpoint_path(state.version)):
            with self.storage.publishing(_checkpoint_path(state.version)) as local:
                local.write_text(Checkpoint(state=state).model_dump_json())
        return state

    def _folded(self, state: State, commit: Commit) -> State:
        for action in commit.actions:
            state = state.after(action)
        return state.model_copy(update={"version": commit.version})

    def _numbers(self) -> list[int]:
        names = self.storage.list(FOLDER)
        return [int(name[:20]) for name in names if _COMMIT_NAME.fullmatch(name)]

    def _newest_checkpoint(self, at_most: int) -> State:
        for name in reversed(self.storage.list(FOLDER)):
            number, _, rest = name.partition(".")
            if rest == "checkpoint.json" and int(number) <= at_most:
                return self._parsed(f"{FOLDER}/{name}", Checkpoint).state
        return State()

    def _read(self, number: int) -> Commit:
        commit = self._parsed(_commit_path(number), Commit)
        if commit.version != number:
            raise self._damaged(_commit_path(number))
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


def _commit_path(number: int) -> str:
    return f"{FOLDER}/{number:020d}.json"


def _checkpoint_path(number: int) -> str:
    return f"{FOLDER}/{number:020d}.checkpoint.json"

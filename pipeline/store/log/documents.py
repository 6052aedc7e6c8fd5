"""The files of versions/: commits, checkpoints and roll-ups, as sealed JSON (sealed.py)."""

from collections.abc import Sequence
from typing import TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, model_validator

from pipeline.errors import DamagedFile, FormatError
from pipeline.store.log.sealed import Written, sealed, unsealed
from pipeline.store.log.state import Action, SetState, State, file_refs
from pipeline.store.storage.file_refs import check_places
from pipeline.store.storage.interface import Storage
from pipeline.store.values import Balance, Hexadecimal, VersionNumber

FORMAT = 2  # of version files: 2 has counts, roll-ups, and overlay files that replace some of the earlier
FORMATS_READ = (1, 2)

Document = TypeVar("Document", bound=BaseModel)


class Commit(BaseModel):
    """One version file. By `nonce` a writer recognises its own file if the store's answer was lost.

    A commit may only name files in the folders for such files (`layout.NAMED`). `rows_before` and `rows_after` count
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

    @property
    def sets_state(self) -> bool:
        """Whether it replaces the whole state, so that no earlier commit matters to the state after it."""
        return any(isinstance(action, SetState) for action in self.actions)


class Checkpoint(BaseModel):
    """The whole state at a version, so that a reader need not read every commit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    state: State

    @model_validator(mode="after")
    def _inside(self) -> "Checkpoint":
        check_places(file_refs(self.state))
        return self


class Rollup(BaseModel):
    """Consecutive commits in one file, from version `first` on, which only saves requests.

    The commits follow `begun`, the whole state of the version before `first`. Without it they follow the checkpoint of
    that version, or begin with one that replaces the whole state. Without commits and `begun`, it says that this
    checkpoint is there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    first: VersionNumber
    commits: tuple[Commit, ...]
    begun: State | None = None

    @model_validator(mode="after")
    def _in_a_row(self) -> "Rollup":
        if self.begun is not None and self.begun.version != self.first - 1:
            raise ValueError(f"its state is not that of version {self.first - 1}")
        if [commit.version for commit in self.commits] != [*range(self.first, self.first + len(self.commits))]:
            raise ValueError(f"its commits are not those from {self.first} on")
        if not self.version:
            raise ValueError("it holds no version")
        return self

    @property
    def version(self) -> int:
        """The version that it leads to."""
        return self.first + len(self.commits) - 1


def read_document(storage: Storage, path: str, model: type[Document]) -> Document:
    """Read a file of versions/. Raises DamagedFile, MissingFile or FormatError."""
    data = storage.read(path)
    try:
        found = Written.model_validate_json(data)
    except ValueError as error:
        raise not_whole(storage, path) from error
    written = found.format
    if written not in FORMATS_READ:
        raise FormatError(
            f"the memory at {storage.uri} is in format {written} and this release reads format {FORMAT}: "
            "use the release of visual-memory that wrote it",
            written,
            FORMAT,
        )
    try:
        return model.model_validate_json(unsealed(data, found))
    except ValueError as error:
        raise not_whole(storage, path) from error


def not_whole(storage: Storage, path: str) -> DamagedFile:
    """The error for a version file that is not as it was written."""
    return DamagedFile(
        f"{path} in the memory at {storage.uri} is not a whole version file: restore it from a copy of the memory"
    )


def sealed_commit(commit: Commit) -> bytes:
    """A commit as a version file, which can be read with the naked eye if it is short."""
    return sealed(commit.model_dump_json(indent=1).encode(), commit.format, commit.nonce)


def sealed_checkpoint(state: State) -> bytes:
    """A state as a version file."""
    return sealed(Checkpoint(state=state).model_dump_json().encode(), FORMAT)


def sealed_rollup(commits: Sequence[Commit], first: int, begun: State | None = None) -> bytes:
    """A roll-up of these commits as a version file, one line each."""
    run = b",\n".join(commit.model_dump_json().encode() for commit in commits)
    state = b',\n"begun":' + begun.model_dump_json().encode() if begun is not None else b""
    return sealed(f'{{"format":{FORMAT},"first":{first},"commits":[\n'.encode() + run + b"]" + state + b"}", FORMAT)

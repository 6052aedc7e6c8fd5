"""The plan of an erasure, and what a state or a commit looks like once it is carried out.

A plan is written before the erasing commit and removed when nothing is left to do, so that a killed erasure is
finished by whoever comes next. While it lies there it names what is to be erased; afterwards nothing does.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from pipeline.errors import CommitConflict
from pipeline.store.files import FileRef, RowsFile
from pipeline.store.ids import split_id
from pipeline.store.state import (
    Action,
    AddSegment,
    AddSingles,
    FoldSingles,
    Forget,
    Index,
    LabelSet,
    Relabel,
    Segment,
    SetIndex,
    SetLabelSet,
    SetState,
    Shard,
    State,
)
from pipeline.store.storage import Storage
from pipeline.store.versions import Commit

FOLDER = "erasures"
REDACTED = "…"

File = TypeVar("File", FileRef, RowsFile)


def refuse_unfinished(storage: Storage) -> None:
    """Raises CommitConflict while an erasure is under way, or lies there killed: older versions may still name it."""
    if storage.list(FOLDER):
        raise CommitConflict(
            f"an erasure of the memory at {storage.uri} was begun and not finished, and nothing was changed: "
            "run `verify --clean`, which finishes it"
        )


class Rewritten(BaseModel):
    """A file that held what is erased: the one in its place (None: nothing is left), and the erased ids it held."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: RowsFile | FileRef | None
    ids: tuple[int, ...]


class ErasurePlan(BaseModel):
    """What is erased, and what takes its place.

    `uris` are those that nothing else in the memory has. `files` and `shards` are found by the path of the file, and of
    the shard's ids; a shard that maps to None has nothing left. `stale` are shards whose index is given up: a version
    that searched through one of them searches exactly instead.
    """

    model_config = ConfigDict(extra="forbid")

    nonce: str
    ids: frozenset[int]
    uris: frozenset[str]
    files: dict[str, Rewritten] = {}
    shards: dict[str, Shard | None] = {}
    stale: frozenset[str] = frozenset()

    @property
    def path(self) -> str:
        return f"{FOLDER}/{self.nonce}.json"

    def state(self, state: State) -> State:
        """A state without what is erased."""
        lost = self._lost(state.entries_files()) + [s.id for s in state.pending if s.id in self.ids]
        return state.model_copy(
            update={
                "segments": tuple(self._segment(segment, lost) for segment in state.segments),
                "packs": self._kept(state.packs),
                "pending": tuple(single for single in state.pending if single.id not in self.ids),
                "tombstones": self._kept(state.tombstones),
                "labels": self._kept(state.labels),
                "label_sets": tuple(self._label_set(label_set) for label_set in state.label_sets),
                "index": self._index(state.index),
            }
        )

    def commit(self, commit: Commit, before: State) -> tuple[Commit, State]:
        """A commit without what is erased, on a state without it; and the state after it."""
        actions = [redacted for action in commit.actions if (redacted := self._action(action)) is not None]
        after = before
        for action in actions:
            after = after.after(action)
        after = after.model_copy(update={"version": commit.version})
        changes = {
            "actions": tuple(actions),
            "command": self.command(commit.command),
            "rows_before": before.num_live,
            "rows_after": after.num_live,
        }
        return commit.model_copy(update=changes), after

    def command(self, command: str) -> str:
        """A command without the ids and uris that are erased."""
        endings = {uri.rpartition("/")[2] for uri in self.uris}
        for word in command.split():
            path = word.strip("'\"").removeprefix("./")
            if path.rpartition("/")[2] in endings and any(f"/{uri}".endswith(f"/{path}") for uri in self.uris):
                command = command.replace(word, REDACTED)
        return re.sub(r"\d{9,}", lambda found: REDACTED if int(found[0]) in self.ids else found[0], command)

    def source(self, source: str) -> str:
        """A segment's source, unless it is an erased image itself."""
        return REDACTED if source in self.uris else source

    def _action(self, action: Action) -> Action | None:  # noqa: PLR0911  # one return an action
        """None for an action of which nothing is left."""
        match action:
            case AddSegment():
                lost = self._lost(action.segment.entries)
                return action.model_copy(update={"segment": self._segment(action.segment, lost)})
            case AddSingles():
                kept = tuple(single for single in action.entries if single.id not in self.ids)
                return action.model_copy(update={"entries": kept}) if kept else None
            case FoldSingles():
                return action.model_copy(update={"files": self._kept(action.files)})
            case Forget():
                kept_files = self._kept([action.tombstones])
                return action.model_copy(update={"tombstones": kept_files[0]}) if kept_files else None
            case Relabel():
                kept_files = self._kept([action.labels])
                return action.model_copy(update={"labels": kept_files[0]}) if kept_files else None
            case SetLabelSet():
                return action.model_copy(update={"label_set": self._label_set(action.label_set)})
            case SetIndex():
                index = self._index(action.index)
                return action.model_copy(update={"index": index}) if index else None
            case SetState():
                return action.model_copy(update={"state": self.state(action.state)})
        return action

    def _lost(self, files: Iterable[FileRef]) -> list[int]:
        return [entry_id for file in files if file.path in self.files for entry_id in self.files[file.path].ids]

    def _kept(self, files: Sequence[File]) -> tuple[File, ...]:
        kept: list[File] = []
        for file in files:
            now = self.files[file.path].by if file.path in self.files else file
            if now is not None:
                kept.append(now)  # type: ignore[arg-type]  # a file is rewritten as what it was
        return tuple(kept)

    def _segment(self, segment: Segment, lost: Sequence[int]) -> Segment:
        """A segment without what is erased; `lost` are the erased ids among the entries that go with it."""
        entries = segment.num_entries - sum(split_id(entry_id)[0] == segment.number for entry_id in lost)
        rejected = segment.num_rejected - len(self._lost(segment.rejected))
        plan = self._kept([segment.plan]) if segment.plan else ()
        return segment.model_copy(
            update={
                "source": self.source(segment.source),
                "planned": entries + rejected,
                "num_entries": entries,
                "num_rejected": rejected,
                "plan": plan[0] if plan else None,
                "entries": self._kept(segment.entries),
                "rejected": self._kept(segment.rejected),
                "thumbnails": self._kept(segment.thumbnails),
            }
        )

    def _label_set(self, label_set: LabelSet) -> LabelSet:
        kept = self._kept([label_set.map]) if label_set.map else ()
        return label_set.model_copy(update={"map": kept[0] if kept else None})

    def _index(self, index: Index | None) -> Index | None:
        if index is None or any(shard.ids.path in self.stale for shard in index.shards):
            return None
        shards = (self.shards.get(shard.ids.path, shard) for shard in index.shards)
        return index.model_copy(update={"shards": tuple(shard for shard in shards if shard is not None)})

"""The plan of an erasure, and how it redacts a state or a commit.

The plan is written before the erasing commit and removed when the erasure is complete. If the erasure is killed,
another process can finish it from the plan. Only the plan names what is erased; after its removal no file does.
"""

import functools
import posixpath
import re
import shlex
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from pipeline.errors import CommitConflict
from pipeline.store.layout import ERASURES, erasure_path
from pipeline.store.log.documents import Commit
from pipeline.store.log.records import Index, LabelSet, Segment, Shard
from pipeline.store.log.state import (
    Action,
    AddSegment,
    AddSingles,
    FoldSingles,
    Forget,
    Relabel,
    SetIndex,
    SetLabelSet,
    SetState,
    State,
    file_refs,
)
from pipeline.store.storage.file_refs import DigestsFile, FileRef, RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.ids import split_id
from pipeline.store.values import EntryId, Hexadecimal, PathInside

REDACTED = "…"

_ID = re.compile(r"(?<!\d)\d[\d_]{8,40}")  # int() accepts underscores between digits
_WORD = re.compile(r"""(?:[^\s'"\\]|'[^']*'|"(?:\\.|[^"\\])*"|\\.|['"\\])+""")  # a shell word, with its quotes
_FROM_HERE = re.compile(r"(?:~[^/]*/)?(?:\.\./)*")  # the prefix of a relative path

File = TypeVar("File", FileRef, RowsFile, DigestsFile)


def refuse_unfinished(storage: Storage) -> None:
    """Raises CommitConflict if an erasure is running or was killed: older versions may still name what it erases."""
    if storage.list(ERASURES):
        raise CommitConflict(
            f"an erasure of the memory at {storage.uri} was begun and not finished, and nothing was changed: "
            "run `verify --clean`, which finishes it",
            "erasure unfinished",
        )


class Rewritten(BaseModel):
    """The replacement of a file that contained erased entries (None: no rows are left), and the erased ids in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: RowsFile | DigestsFile | FileRef | None
    ids: tuple[EntryId, ...]


class ErasurePlan(BaseModel):
    """The entries to erase, and the files that replace the old ones.

    `uris` are the uris that only erased entries have. The keys of `files` are the paths of the old files. The keys of
    `shards` are the paths of the shards' ids files; None means that no row of the shard is left. `stale` lists shards
    whose index is dropped: a version that searched through one of them searches exactly instead.
    """

    model_config = ConfigDict(extra="forbid")

    nonce: Hexadecimal
    ids: frozenset[EntryId]
    uris: frozenset[str]
    files: dict[PathInside, Rewritten] = {}
    shards: dict[PathInside, Shard | None] = {}
    stale: frozenset[PathInside] = frozenset()

    @property
    def path(self) -> str:
        return erasure_path(self.nonce)

    def new_files(self) -> list[FileRef]:
        """The replacement files."""
        rewritten = [each.by for each in self.files.values() if each.by is not None]
        return [*rewritten, *(file for shard in self.shards.values() for file in file_refs(shard))]

    def state(self, state: State) -> State:
        """The state without the erased entries."""
        lost = self._lost(state.entries_files()) + [s.id for s in state.pending if s.id in self.ids]
        return state.model_copy(
            update={
                "segments": tuple(self._segment(segment, lost) for segment in state.segments),
                "packs": self._left(state.packs),
                "pending": tuple(single for single in state.pending if single.id not in self.ids),
                "tombstones": self._left(state.tombstones),
                "labels": self._left(state.labels),
                # Counts of a version before the erasure count erased entries, by labels that may be of these alone.
                "counts": state.counts if self.nonce in state.erasures else None,
                "label_sets": tuple(self._label_set(label_set) for label_set in state.label_sets),
                "index": self._index(state.index),
            }
        )

    def commit(self, commit: Commit, before: State) -> tuple[Commit, State]:
        """The redacted commit, and the redacted state after it; `before` is the redacted state before it."""
        actions: list[Action] = []
        after = before
        uncounted = {} if self.nonce in before.erasures else {"counts": None}
        for action in commit.actions:
            redacted = self._action(action, uncounted)
            if redacted is None and isinstance(action, Relabel):
                redacted = _label_set_made(action, after)
            if redacted is None:
                continue
            was, after = after, after.after(redacted)
            if isinstance(redacted, Forget) and redacted != action:
                redacted = redacted.model_copy(update={"forgotten": was.num_live - after.num_live})
            actions.append(redacted)
        after = after.model_copy(update={"version": commit.version})
        changes = {
            "actions": tuple(actions),
            "command": self.command(commit.command),
            "rows_before": before.num_live,
            "rows_after": after.num_live,
        }
        return commit.model_copy(update=changes), after

    def command(self, command: str) -> str:
        """The command without erased ids and uris, and without relative paths that lead to an erased uri."""
        endings = _by_ending(self.uris)

        def redacted(found: re.Match[str]) -> str:
            return REDACTED if _names_any(found[0], endings) else found[0]

        command = _WORD.sub(redacted, command)
        for uri in _with_spaces(self.uris):  # in case they were typed without quotes
            command = command.replace(uri, REDACTED)
        return _ID.sub(lambda found: REDACTED if int(found[0].replace("_", "")) in self.ids else found[0], command)

    def source(self, source: str) -> str:
        """A segment's source, redacted if it is an erased image itself."""
        return REDACTED if source in self.uris else source

    def _action(  # noqa: C901, PLR0911  # one case an action
        self, action: Action, uncounted: Mapping[str, None]
    ) -> Action | None:
        """The redacted action, or None if nothing of it is left. `uncounted` are the changes that remove counts."""
        match action:
            case AddSegment():
                lost = self._lost(action.segment.entries)
                return action.model_copy(update={"segment": self._segment(action.segment, lost), **uncounted})
            case AddSingles():
                kept = tuple(single for single in action.entries if single.id not in self.ids)
                return action.model_copy(update={"entries": kept})  # may be empty: `next_row` still counts
            case FoldSingles():
                folded = {name: self._left(getattr(action, name)) for name in ("files", "thumbnails", "offsets")}
                return action.model_copy(update={**folded, **uncounted})
            case Forget():
                kept_files = self._left([action.tombstones])
                if not kept_files:
                    return None
                replaces = self._replaced(action.replaces)
                return action.model_copy(update={"tombstones": kept_files[0], "replaces": replaces, **uncounted})
            case Relabel():
                kept_files = self._left([action.labels])
                if not kept_files:
                    return None
                lost_rows = 0 if action.folds or action.replaces else len(self._lost([action.labels]))
                relabelled = min(action.relabelled - lost_rows, kept_files[0].rows)
                changes = {"labels": kept_files[0], "relabelled": relabelled, **uncounted}
                return action.model_copy(update={**changes, "replaces": self._replaced(action.replaces)})
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

    def _left(self, files: Sequence[File]) -> tuple[File, ...]:
        kept: list[File] = []
        for file in files:
            now = self.files[file.path].by if file.path in self.files else file
            if now is not None:
                kept.append(now)  # type: ignore[arg-type]  # a replacement has the type of the old file
        return tuple(kept)

    def _replaced(self, paths: Sequence[str]) -> tuple[str, ...]:
        """The paths that replaced overlay files have now; files without rows that are left are gone."""
        now = (self.files[path].by if path in self.files else path for path in paths)
        return tuple(by if isinstance(by, str) else by.path for by in now if by is not None)

    def _segment(self, segment: Segment, lost: Sequence[int]) -> Segment:
        """The segment without erased entries; `lost` are the erased ids among the entries of the state or action."""
        entries = segment.num_entries - sum(split_id(entry_id)[0] == segment.number for entry_id in lost)
        rejected = segment.num_rejected - len(self._lost(segment.rejected))
        plan = self._left([segment.plan]) if segment.plan else ()
        return segment.model_copy(
            update={
                "source": self.source(segment.source),
                "planned": entries + rejected,
                "num_entries": entries,
                "num_rejected": rejected,
                "plan": plan[0] if plan else None,
                "entries": self._left(segment.entries),
                "rejected": self._left(segment.rejected),
                "thumbnails": self._left(segment.thumbnails),
                "offsets": self._left(segment.offsets),
                "uris": self._left(segment.uris),
                "sha256s": self._left(segment.sha256s),
            }
        )

    def _label_set(self, label_set: LabelSet) -> LabelSet:
        kept = self._left([label_set.map]) if label_set.map else ()
        return label_set.model_copy(update={"map": kept[0] if kept else None})

    def _index(self, index: Index | None) -> Index | None:
        """The redacted index, or None if it is dropped or has no shard left."""
        if index is None or any(shard.ids.path in self.stale for shard in index.shards):
            return None
        found = (self._shard(shard) for shard in index.shards)
        shards = tuple(shard for shard in found if shard is not None)
        return index.model_copy(update={"shards": shards}) if shards or not index.shards else None

    def _shard(self, shard: Shard) -> Shard | None:
        """The redacted shard. Its ranges are cut to begin and end with remaining ids.

        Versions may differ in the ranges of a shard, so they are computed from the given shard, not from the plan.
        """
        now = self.shards.get(shard.ids.path, shard)
        spans = [self._within(*span) for span in shard.covers]
        covers = tuple((first, last) for first, last in spans if first <= last)
        return now if now is None or covers == now.covers else now.model_copy(update={"covers": covers})

    def _within(self, first: int, last: int) -> tuple[int, int]:
        while first <= last and first in self.ids:
            first += 1
        while first <= last and last in self.ids:
            last -= 1
        return first, last


def _label_set_made(action: Relabel, before: State) -> SetLabelSet | None:
    """The rest of a Relabel whose labels are all erased: its label set, if the action created one; else None."""
    known = {label_set.name for label_set in before.label_sets}
    if action.label_set is None or action.label_set in known:
        return None
    return SetLabelSet(label_set=LabelSet(name=action.label_set))


def _names_any(word: str, endings: Mapping[str, frozenset[str]]) -> bool:
    """Whether a word of a command, or the value of an option in it, is one of the uris or a path to one."""
    try:
        [said] = shlex.split(word)
    except ValueError:  # unbalanced quotes, or several words
        said = word.strip("'\"")
    return any(_leads_to(text.removeprefix("file://"), endings) for text in (said, said.partition("=")[2]) if text)


def _leads_to(text: str, endings: Mapping[str, frozenset[str]]) -> bool:
    same_ending = endings.get(text.rpartition("/")[2], frozenset())
    if not same_ending or text in same_ending:
        return bool(same_ending)
    path = _FROM_HERE.sub("", posixpath.normpath(text), count=1)
    return any(uri == path if path.startswith("/") else f"/{uri}".endswith(f"/{path}") for uri in same_ending)


@functools.lru_cache(maxsize=4)
def _by_ending(uris: frozenset[str]) -> Mapping[str, frozenset[str]]:
    """The uris, as they are and percent-decoded, by the part after their last slash."""
    endings: dict[str, set[str]] = {}
    for uri in uris:
        for text in (uri, urllib.parse.unquote(uri, errors="surrogateescape")):
            endings.setdefault(text.rpartition("/")[2], set()).add(text)
    return {ending: frozenset(texts) for ending, texts in endings.items()}


@functools.lru_cache(maxsize=4)
def _with_spaces(uris: frozenset[str]) -> Sequence[str]:
    return [text for texts in _by_ending(uris).values() for text in texts if len(text.split()) > 1]

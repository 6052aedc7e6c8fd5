"""Compacting: many small files become few, and every id stays as it is.

Single adds move out of their commits, small entries files that follow each other are packed into one, and the overlays
become one file each. Older versions keep the files they name until they are dropped (`expire`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store import segments
from pipeline.store.files import FileRef, RowsFile
from pipeline.store.ids import split_id
from pipeline.store.labels import newest_rows, read_label_rows, write_labels
from pipeline.store.leases import Lease
from pipeline.store.schemas import read_table, write_rows
from pipeline.store.singles import fold
from pipeline.store.state import SetState, Shard, State
from pipeline.store.storage import Storage
from pipeline.store.tombstones import read_tombstones, write_tombstones
from pipeline.store.versions import VersionLog

SMALL_ROWS = 8_192  # a file below this is worth packing
PACK_ROWS = 65_536


@dataclass(frozen=True)
class CompactReport:
    """Files of entries and overlays that the memory is read from, before and after."""

    state: State
    files_before: int
    files_after: int

    def to_json(self) -> dict:
        """The report as a JSON object."""
        return {
            "version": self.state.version,
            "files_before": self.files_before,
            "files_after": self.files_after,
            "entries": self.state.num_live,
        }


def compact(log: VersionLog, command: str = "compact", on_progress: OnProgress = ignore_progress) -> CompactReport:
    """Pack small files of the newest version. Commits nothing where there is nothing to pack. Raises CommitConflict."""
    base = log.latest()
    with Lease(log.storage, "compact") as lease:
        compactor = _Compactor(log.storage, lease, on_progress)
        if not compactor.has_work(base):
            return CompactReport(base, _num_files(base), _num_files(base))

        def prepare(_: int, now: State) -> list[SetState]:
            return [SetState(why="compact", state=compactor.compacted(now))]

        state = log.commit(base, command, prepare, lease)
        return CompactReport(state, _num_files(base), _num_files(state))


@dataclass
class _Compactor:
    storage: Storage
    lease: Lease
    on_progress: OnProgress
    packed: dict[tuple[str, ...], RowsFile] = field(default_factory=dict)

    def has_work(self, state: State) -> bool:
        overlays = len(state.tombstones) > 1 or len(state.labels) > 1
        return bool(state.pending or overlays or self._groups(state))

    def compacted(self, state: State) -> State:
        """The state with its files packed, the new files written."""
        if state.pending:
            state = state.after(fold(self.storage, self.lease, state))
        groups = self._groups(state)
        for done, group in enumerate(groups):
            self.on_progress(Progress("packing", done, len(groups)))
            state = self._with_pack(state, group)
        return state.model_copy(
            update={"tombstones": self._one_of_tombstones(state), "labels": self._one_of_labels(state)}
        )

    def _groups(self, state: State) -> list[list[RowsFile]]:
        """Runs of small files that may become one: searched through the same shard, and no id may come between."""
        barriers = self._numbers_to_come(state)
        groups: list[list[RowsFile]] = [[]]
        for file in state.entries_files():
            group = groups[-1]
            if group and not (
                sum(f.rows for f in group) + file.rows <= PACK_ROWS
                and _shard_of(state, group[-1]) is _shard_of(state, file)
                and not _between(barriers, group[-1], file)
                and file.rows < SMALL_ROWS
            ):
                groups.append([])
            if file.rows < SMALL_ROWS:
                groups[-1].append(file)
        return [group for group in groups if len(group) > 1]

    def _numbers_to_come(self, state: State) -> np.ndarray:
        """Segments that may get entries yet: single adds go to one, others are being added."""
        used = {*(segment.number for segment in state.segments), *state.retired}
        coming = {
            number
            for number in segments.reserved(self.storage)
            if number not in used and not segments.is_given_up(self.storage, number)
        }
        if state.singles is not None:
            coming.add(state.singles.segment)
        return np.array(sorted(coming), np.int64)

    def _with_pack(self, state: State, group: Sequence[RowsFile]) -> State:
        paths = tuple(file.path for file in group)
        numbers = {split_id(file.first_id)[0] for file in group} | {split_id(file.last_id)[0] for file in group}
        folder = f"{segments.segment_folder(numbers.copy().pop())}entries" if len(numbers) == 1 else "packs"
        if paths not in self.packed:
            table = pa.concat_tables([read_table(self.storage, file) for file in group])
            path = f"{folder}/{self.lease.nonce}-{len(self.packed):06d}.parquet"
            self.packed[paths] = write_rows(self.storage, path, table)
        pack = self.packed[paths]
        own = folder != "packs"
        return state.model_copy(
            update={
                "segments": tuple(
                    segment.model_copy(update={"entries": _replaced(segment.entries, paths, [pack] if own else [])})
                    for segment in state.segments
                ),
                "packs": _replaced(state.packs, paths, [] if own else [pack], always=not own),
            }
        )

    def _one_of_tombstones(self, state: State) -> tuple[FileRef, ...]:
        if len(state.tombstones) < 2:
            return state.tombstones
        ids_N = read_tombstones(self.storage, state.tombstones)
        return (write_tombstones(self.storage, self.lease, state.version, ids_N),)

    def _one_of_labels(self, state: State) -> tuple[FileRef, ...]:
        if len(state.labels) < 2:
            return state.labels
        rows = newest_rows(read_label_rows(self.storage, state.labels))
        return (write_labels(self.storage, self.lease, state.version, rows),)


def _replaced(
    files: tuple[RowsFile, ...], gone: tuple[str, ...], new: list[RowsFile], *, always: bool = False
) -> tuple[RowsFile, ...]:
    """Files with some of them taken out, and the new one put in where any was (or always)."""
    kept = [file for file in files if file.path not in gone]
    if len(kept) == len(files) and not always:
        return files
    return tuple(sorted([*kept, *new], key=lambda file: file.first_id))


def _shard_of(state: State, file: RowsFile) -> Shard | None:
    for shard in state.index.shards if state.index else ():
        if any(first <= file.first_id <= last for first, last in shard.covers):
            return shard
    return None


def _between(numbers: np.ndarray, before: RowsFile, after: RowsFile) -> bool:
    """Whether a segment that may get entries yet lies between two files, the first one's included."""
    first, last = split_id(before.last_id)[0], split_id(after.first_id)[0]
    return first != last and bool(((numbers >= first) & (numbers < last)).any())


def _num_files(state: State) -> int:
    return len(state.entries_files()) + len(state.tombstones) + len(state.labels)

"""Plans an index build: which entries become which shards, and the key, measured on a sample if none is given."""

from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np

from pipeline.errors import IndexBuildError, UsageError
from pipeline.index.build.key_choice import SAMPLE_ROWS, Table, choose
from pipeline.progress import OnProgress, ignore_progress
from pipeline.store.log.records import Index, Refine
from pipeline.store.log.state import State
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.interface import Storage, released
from pipeline.store.tables.ids import is_in
from pipeline.store.tables.schemas import embedding_matrix, read_table
from pipeline.store.tables.tombstones import read_tombstones

DEFAULT_SHARD_ROWS = 1 << 20
MERGED_UP_TO = 4  # times the new rows: shards stay few, and a row is gathered again only a few times
FILES_SAMPLED = 64  # entries files that a dry run reads


@dataclass(frozen=True)
class IndexOptions:
    """The options that a user may set for an index.

    If `key` is None, a key is chosen by measuring. If `refine` is None, it is that of the index to extend, or float16.
    """

    key: str | None = None
    max_memory_bytes: int = 16 << 30
    max_latency_ms: float = 10.0
    target_recall: float = 0.95
    shard_rows: int | None = None
    rebuild: bool = False
    refine: Refine | None = None

    def __post_init__(self) -> None:
        if self.refine not in (None, *get_args(Refine)):
            raise UsageError(f"`refine` {self.refine} is unknown: give {' or '.join(get_args(Refine))}")
        if self.max_memory_bytes < 1:
            raise UsageError(f"`max_memory_bytes` {self.max_memory_bytes} is no room for an index: give more than 0")
        if not self.max_latency_ms > 0:
            raise UsageError(f"`max_latency_ms` {self.max_latency_ms} is not a time: give more than 0")
        if not 0 < self.target_recall <= 1:
            raise UsageError(f"`target_recall` {self.target_recall} is not a share: give more than 0 and at most 1")
        if self.shard_rows is not None and self.shard_rows < 1:
            raise UsageError(f"`shard_rows` {self.shard_rows} is not a number of rows: give 1 or more")


@dataclass(frozen=True)
class IndexPlan:
    """What `build` would do: the key (None: not chosen yet), and the entries files of each new shard.

    `refine` says whether candidates are scored again from the vectors. `merged` is how many of the last existing shards
    are rebuilt together with the fresh entries. `table` has the candidates, if they were measured beforehand.
    Recall is measured with `questions_QD` (float16 [Q, D]), which are no rows of the memory, or with stored rows.
    """

    key: str | None
    refine: Refine
    rows: int
    shards: tuple[tuple[RowsFile, ...], ...]
    grows: bool
    merged: int = 0
    table: Table | None = None
    questions_QD: np.ndarray | None = field(default=None, compare=False)


def plan_index(state: State, options: IndexOptions, *, merging: bool = False) -> IndexPlan:
    """Cut shards at the borders of entries files: as many rows as allowed, at least one file each.

    With `merging`, the last shards are merged with the fresh entries while they are small compared with these. Single
    adds that no file holds yet stay fresh.
    """
    merged = 0
    limit = options.shard_rows or DEFAULT_SHARD_ROWS
    current = state.index
    grows = current is not None and not options.rebuild
    if current is not None and grows:
        if options.key not in (None, current.key):
            raise IndexBuildError(
                f"the index has the key {current.key} and new shards must share it: "
                f"add `rebuild` to build {options.key}"
            )
        if options.refine not in (None, current.refine):
            raise IndexBuildError(
                f"the index is refined with {current.refine} and new shards must be as it is: "
                f"add `rebuild` to build one with `refine` {options.refine}"
            )
        files = state.fresh_files()
        if merging and files:
            files, merged = _with_last_shards(state, current, files, limit)
    else:
        files = state.entries_files()
    shards: list[list[RowsFile]] = []
    for file in files:
        if not shards or sum(f.rows for f in shards[-1]) + file.rows > limit:
            shards.append([])
        shards[-1].append(file)
    key = current.key if current is not None and grows else options.key
    refine = current.refine if current is not None and grows else options.refine or "float16"
    rows = sum(file.rows for file in files)
    return IndexPlan(key, refine, rows, tuple(tuple(shard) for shard in shards), grows, merged)


def _with_last_shards(state: State, index: Index, files: list[RowsFile], limit: int) -> tuple[list[RowsFile], int]:
    """The fresh files with those of the last shards to merge with them, and the number of these shards."""
    merged, rows = 0, sum(file.rows for file in files)
    for shard in reversed(index.shards):
        if shard.rows > MERGED_UP_TO * rows or shard.rows + rows > limit:
            break
        merged, rows = merged + 1, rows + shard.rows
    left = index.model_copy(update={"shards": index.shards[: len(index.shards) - merged]})
    return state.model_copy(update={"index": left}).fresh_files(), merged


def choose_key(
    storage: Storage, state: State, plan: IndexPlan, options: IndexOptions, on_progress: OnProgress = ignore_progress
) -> IndexPlan:
    """The plan with its candidates measured on a sample of the entries, and the key chosen. Writes nothing.

    Raises IndexBuildError if no candidate meets the options.
    """
    if plan.key is not None or not plan.rows:
        return plan
    files = [file for shard in plan.shards for file in shard]
    random = np.random.default_rng(0)
    some = [files[place] for place in np.sort(random.permutation(len(files))[:FILES_SAMPLED])]
    forgotten = read_tombstones(storage, state.tombstones)
    wanted = SAMPLE_ROWS / sum(file.rows for file in some)
    pieces = []
    for file in some:
        with released(storage, file.path):
            table = read_table(storage, file, ["id", "embedding"])
        alive = np.flatnonzero(~is_in(table.column("id").to_numpy(), forgotten))
        taken = random.permutation(alive)[: int(np.ceil(wanted * len(alive)))]
        pieces.append(embedding_matrix(table.column("embedding"))[np.sort(taken)])
    sample_ND = np.concatenate(pieces)
    if not len(sample_ND):
        raise IndexBuildError("every entry to be indexed is forgotten: add images first")
    table = measured_candidates(random.permutation(sample_ND), state.num_live, options, plan.refine, on_progress)
    return replace(plan, key=table.chosen.key, table=table)


def measured_candidates(
    sample_ND: np.ndarray, num_rows: int, options: IndexOptions, refine: Refine, on_progress: OnProgress
) -> Table:
    """The candidates for so many rows, measured on a sample of them in random order."""
    return choose(
        sample_ND,
        num_rows,
        target_recall=options.target_recall,
        max_memory_bytes=options.max_memory_bytes,
        max_latency_ms=options.max_latency_ms,
        refine=refine == "float16",
        on_progress=on_progress,
    )

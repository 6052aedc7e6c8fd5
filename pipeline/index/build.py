"""Choose a key, train once, populate shards one by one, tune, measure, and commit the index as part of a version.

A first build, or `rebuild`, makes a new generation over everything; otherwise shards for the fresh entries are added
from the trained index there is. Nothing is committed unless every shard reaches the recall asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from pipeline.errors import CommitConflict, IndexBuildError, UsageError
from pipeline.index import parameters, tuning
from pipeline.index.candidates import propose_key, training_rows
from pipeline.index.shards import SideFiles, mapped_vectors, read_faiss, write_faiss, write_side_files
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.files import FileRef, RowsFile
from pipeline.store.ids import split_id
from pipeline.store.leases import Lease
from pipeline.store.state import Index, SetIndex, Shard, State
from pipeline.store.storage import Storage
from pipeline.store.tombstones import read_tombstones
from pipeline.store.versions import VersionLog

ADD_ROWS = 65_536  # vectors converted to float32 at a time
DEFAULT_SHARD_ROWS = 1 << 20
MERGED_UP_TO = 4  # times the rows that are new: so shards are few, and a row is gathered anew a few times
EXACT = "Flat"


@dataclass(frozen=True)
class IndexOptions:
    """What a user may ask of an index; `key` None lets autofaiss choose."""

    key: str | None = None
    max_memory_bytes: int = 16 << 30
    max_latency_ms: float = 10.0
    target_recall: float = 0.95
    shard_rows: int | None = None
    rebuild: bool = False

    def __post_init__(self) -> None:
        if self.max_memory_bytes < 1:
            raise UsageError(f"--max-memory {self.max_memory_bytes} is no room for an index: give a size such as 16G")
        if not self.max_latency_ms > 0:
            raise UsageError(f"--max-latency-ms {self.max_latency_ms} is not a time: give more than 0")
        if not 0 < self.target_recall <= 1:
            raise UsageError(f"--target-recall {self.target_recall} is not a share: give more than 0 and at most 1")
        if self.shard_rows is not None and self.shard_rows < 1:
            raise UsageError(f"--shard-rows {self.shard_rows} is not a number of rows: give 1 or more")


@dataclass(frozen=True)
class IndexPlan:
    """What `build` would do: the key, and the entries files of each shard to be made.

    `merged` is how many of the last shards there are will be made anew together with what is fresh.
    """

    key: str
    rows: int
    shards: tuple[tuple[RowsFile, ...], ...]
    grows: bool
    merged: int = 0


def plan_index(state: State, options: IndexOptions, *, merging: bool = False) -> IndexPlan:
    """Decide the key and cut shards at the borders of parts: as many rows as allowed, at least one part each.

    With `merging` the last shards, while they are small beside what is new, become one with it. Single adds that no
    file holds yet stay fresh.
    """
    merged = 0
    limit = options.shard_rows or DEFAULT_SHARD_ROWS
    current = state.index
    grows = current is not None and not options.rebuild
    if current is not None and grows:
        if options.key not in (None, current.key):
            raise IndexBuildError(
                f"the index has the key {current.key} and new shards must share it: "
                f"add --rebuild to build {options.key}"
            )
        files, key = state.fresh_files(), current.key
        if merging and files:
            files, merged = _with_last_shards(state, current, files, limit)
    else:
        files = state.entries_files()
        dimension = state.identity.dimension if state.identity else 0
        key = options.key or propose_key(max(state.num_live, 1), dimension, options.max_memory_bytes)
    shards: list[list[RowsFile]] = []
    for file in files:
        if not shards or sum(f.rows for f in shards[-1]) + file.rows > limit:
            shards.append([])
        shards[-1].append(file)
    return IndexPlan(key, sum(file.rows for file in files), tuple(tuple(shard) for shard in shards), grows, merged)


def _with_last_shards(state: State, index: Index, files: list[RowsFile], limit: int) -> tuple[list[RowsFile], int]:
    """Fresh files with those of the last shards that are to become one with them, and how many shards these are."""
    merged, rows = 0, sum(file.rows for file in files)
    for shard in reversed(index.shards):
        if shard.rows > MERGED_UP_TO * rows or shard.rows + rows > limit:
            break
        merged, rows = merged + 1, rows + shard.rows
    left = index.model_copy(update={"shards": index.shards[: len(index.shards) - merged]})
    return state.model_copy(update={"index": left}).fresh_files(), merged


def build_index(
    log: VersionLog,
    state: State,
    plan: IndexPlan,
    options: IndexOptions,
    command: str,
    on_progress: OnProgress = ignore_progress,
) -> State:
    """Build what the plan says and commit it. Raises IndexBuildError, DamagedFile or CommitConflict."""
    if state.identity is None or not plan.shards:
        raise IndexBuildError(f"the memory at {log.storage.uri} has no entries to index: add images first")
    with Lease(log.storage, "index") as lease:
        return _built(log, state, _Builder(log.storage, state, plan, options, on_progress, lease), command, lease)


def _built(log: VersionLog, state: State, builder: "_Builder", command: str, lease: Lease) -> State:
    try:
        index = builder.build()
    except BaseException:  # an interrupt too leaves nothing behind; a kill leaves files that no version names
        log.storage.remove_folder(builder.folder)
        raise
    replaces = state.index
    action = SetIndex(
        index=index,
        replaces=replaces.generation if replaces else None,
        replaces_shards=len(replaces.shards) if replaces else 0,
    )
    try:
        return log.commit(state, command, lambda _number, _state: [action], lease)
    except CommitConflict:  # and only then: after any other failure the version may have been published
        log.storage.remove_folder(builder.folder)
        raise


class _Builder:
    def __init__(
        self,
        storage: Storage,
        state: State,
        plan: IndexPlan,
        options: IndexOptions,
        on_progress: OnProgress,
        lease: Lease,
    ) -> None:
        assert state.identity is not None  # noqa: S101  # checked by build_index
        self._storage = storage
        self._plan = plan
        self._options = options
        self._progress = on_progress
        self._dimension = state.identity.dimension
        self._forgotten = read_tombstones(storage, state.tombstones)
        self._old = state.index if plan.grows else None
        self._kept = self._old.shards[: len(self._old.shards) - plan.merged] if self._old else ()
        taken = [int(name.split("-")[0]) for name in storage.list("index")]
        self._generation = self._old.generation if self._old else max(taken, default=0) + 1
        self._first = max((shard.number for shard in self._kept), default=-1) + 1
        # The lease's nonce keeps two writers that build at once out of each other's files.
        self.folder = f"index/{self._generation:06d}-{lease.nonce}"

    def build(self) -> Index:
        empty = None if self._plan.key == EXACT else self._empty()  # a key that cannot be is said before any work
        sides: list[SideFiles] = []
        total = self._plan.rows
        for number, files in enumerate(self._plan.shards, start=self._first):
            self._progress(Progress("gathering", sum(side.rows for side in sides), total))
            sides.append(write_side_files(self._storage, f"{self.folder}/shards/{number}", files, self._forgotten))
        total = sum(side.rows for side in sides)
        if empty is None:
            self._held(sum(side.vectors.num_bytes for side in sides))
            return self._index("", None, [self._shard(number, None, 1.0, sides) for number in range(len(sides))])
        if not total:
            raise IndexBuildError("every entry to be indexed is forgotten: add images first")
        trained, trained_file = self._trained(empty, sides)
        values: dict[str, int] | None = parameters.parsed(self._old.parameters) if self._old else None
        shards: list[Shard] = []
        done = 0
        for number, side in enumerate(sides):
            if not side.rows:  # all forgotten: nothing to search, but its parts are no fresh entries any more
                shards.append(self._shard(number, None, 1.0, sides))
                continue
            populated = self._populated(faiss.clone_index(trained), side, done, total)
            index_file = write_faiss(self._storage, f"{self._shard_folder(number)}/index.faiss", populated)
            self._held(sum(shard.index.num_bytes for shard in shards if shard.index) + index_file.num_bytes)
            done += side.rows
            self._progress(Progress("tuning", number, len(sides)))
            if values is None:
                values = tuning.tuned_parameters(populated, self._plan.key, self._options.max_latency_ms)
            values, recall = self._measured(populated, values, side)
            shards.append(self._shard(number, index_file, recall, sides))
        return self._index(parameters.written(values or {}), trained_file, shards)

    def _held(self, num_bytes: int) -> None:
        """Refuse an index that outgrows the memory allowed."""
        if num_bytes > self._options.max_memory_bytes:
            raise IndexBuildError(
                f"the index {self._plan.key} takes {num_bytes:,} bytes or more and {self._options.max_memory_bytes:,} "
                "are allowed: allow more with --max-memory, or give a smaller --key"
            )

    def _empty(self) -> faiss.Index:
        if not (self._old and self._old.trained):
            training_rows(self._plan.key, self._plan.rows, self._dimension, self._options.max_memory_bytes)
        try:
            index = faiss.index_factory(self._dimension, self._plan.key, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise IndexBuildError(
                f"FAISS does not know the key {self._plan.key} for {self._dimension} dimensions: "
                "give one of its index_factory strings, such as IVF256,Flat, or none to have one chosen"
            ) from error
        parameters.code_vectors_themselves(index)
        if not parameters.searchable(index):
            raise IndexBuildError(
                f"the key {self._plan.key} is of a kind whose forgotten rows cannot be masked: "
                "give Flat, a key with IVF or HNSW (OPQ, PCA and RR may come before), or none to have one chosen"
            )
        return index

    def _trained(self, index: faiss.Index, sides: Sequence[SideFiles]) -> tuple[faiss.Index, FileRef]:
        """The empty trained index: the generation's own, or this one trained on a random sample over all shards."""
        if self._old and self._old.trained:
            return read_faiss(self._storage, self._old.trained, mapped=False), self._old.trained
        total = sum(side.rows for side in sides)
        rows = training_rows(self._plan.key, total, self._dimension, self._options.max_memory_bytes)
        self._progress(Progress("training", 0, rows))
        _quiet_clustering(index)
        index.train(self._sample(sides, rows, total))
        self._progress(Progress("training", rows, rows))
        return index, write_faiss(self._storage, f"{self.folder}/trained.faiss", index)

    def _sample(self, sides: Sequence[SideFiles], rows: int, total: int) -> np.ndarray:
        chosen = np.sort(np.random.default_rng(self._generation).choice(total, rows, replace=False))
        sample_ND = np.empty((rows, self._dimension), np.float32)
        filled = start = 0
        for side in sides:
            inside = chosen[(chosen >= start) & (chosen < start + side.rows)] - start
            vectors = mapped_vectors(self._storage, side.vectors, self._dimension)
            sample_ND[filled : filled + len(inside)] = vectors[inside]
            filled, start = filled + len(inside), start + side.rows
        return sample_ND

    def _populated(self, index: faiss.Index, side: SideFiles, done: int, total: int) -> faiss.Index:
        vectors_ND = mapped_vectors(self._storage, side.vectors, self._dimension)
        for start in range(0, side.rows, ADD_ROWS):
            index.add(np.ascontiguousarray(vectors_ND[start : start + ADD_ROWS], np.float32))
            self._progress(Progress("populating", done + min(start + ADD_ROWS, side.rows), total))
        return index

    def _measured(self, index: faiss.Index, values: dict[str, int], side: SideFiles) -> tuple[dict[str, int], float]:
        """Recall@10 of a shard, and parameters widened until it reaches the target."""
        vectors_ND = mapped_vectors(self._storage, side.vectors, self._dimension)
        queries = tuning.query_sample(side.rows, seed=self._generation)
        while True:
            recall = tuning.recall(index, values, vectors_ND, queries, tuning.NEIGHBORS_MEASURED)
            if recall >= self._options.target_recall:
                return values, recall
            wider = parameters.widened(index, values)
            if wider is None:
                raise IndexBuildError(
                    f"the index {self._plan.key} reaches recall@10 {recall:.3f} at most, below the target "
                    f"{self._options.target_recall}, and was not published: allow more --max-memory, lower "
                    "--target-recall, or give --key Flat for exact search"
                )
            values = wider

    def _shard(self, number: int, index: FileRef | None, recall: float, sides: Sequence[SideFiles]) -> Shard:
        side = sides[number]
        return Shard(
            number=number + self._first,
            rows=side.rows,
            covers=tuple(_spans(self._plan.shards[number])),
            index=index,
            ids=side.ids,
            labels=side.labels,
            vectors=side.vectors,
            entries=side.entries,
            recall_at_10=recall,
        )

    def _shard_folder(self, number: int) -> str:
        return f"{self.folder}/shards/{number + self._first}"

    def _index(self, values: str, trained: FileRef | None, shards: Sequence[Shard]) -> Index:
        return Index(
            generation=self._generation,
            key=self._plan.key,
            parameters=values,
            trained=trained,
            shards=(*self._kept, *shards),
        )


def _spans(files: Sequence[RowsFile]) -> Iterator[tuple[int, int]]:
    """The id ranges of some files, neighbouring ones of a segment joined."""
    current: tuple[int, int] | None = None
    for file in files:
        if current and split_id(file.first_id)[0] == split_id(current[0])[0]:
            current = (current[0], file.last_id)
            continue
        if current:
            yield current
        current = (file.first_id, file.last_id)
    if current:
        yield current


def _quiet_clustering(index: faiss.Index) -> None:
    """Let k-means train on few rows without a warning on stderr: the number of rows was checked, recall is measured."""
    inner = faiss.try_extract_index_ivf(index)
    if inner is not None:
        inner.cp.min_points_per_centroid = 1
        inner.cp.spherical = True  # the vectors have unit length and are compared by inner product

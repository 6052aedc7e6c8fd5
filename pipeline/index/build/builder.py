"""Choose a key, train once, populate shards in parallel, tune, measure, and commit the index as part of a version.

A first build, or `rebuild`, makes a new generation over all entries. Otherwise shards for the fresh entries are added
from the existing trained index. Nothing is committed unless every shard reaches the target recall. An interrupted build
continues where it stopped, if the entries and the options are the same.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.errors import CommitConflict, IndexBuildError
from pipeline.index.build.gpu import gpu
from pipeline.index.build.key_candidates import FLAT, empty_index, least_rows, num_centroids, num_lists, training_rows
from pipeline.index.build.key_choice import CHOSEN, SAMPLE_ROWS, Table, read_table_of
from pipeline.index.build.plan import IndexOptions, IndexPlan, measured_candidates
from pipeline.index.build.shard_steps import Gathered, Measured, Populated, ShardWork, files_of, read_mark
from pipeline.index.build.train import centroid_distance, train_index, train_on
from pipeline.index.search import parameters
from pipeline.index.search.shard_files import SideFiles, mapped_vectors, write_faiss, write_vectors
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.steps import RunSteps, run_steps_here
from pipeline.store.layout import (
    BUILD_BEGUN,
    INDEX,
    QUESTIONS_FILE,
    SAMPLE_FILE,
    VECTORS_FILE,
    build_folder,
    candidates_path,
    generation_folder,
    generation_number,
    generation_of,
    trained_path,
)
from pipeline.store.log.records import Index, Shard
from pipeline.store.log.state import SetIndex, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.file_refs import FileRef, RowsFile, describe
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.ids import split_id
from pipeline.store.values import Generation, Nonce

MEASURED_SHARDS = 10  # searched together to tune a generation; each is loaded, and all of its vectors are read

Step = TypeVar("Step")


def build_index(
    log: VersionLog,
    state: State,
    plan: IndexPlan,
    options: IndexOptions,
    command: str,
    on_progress: OnProgress = ignore_progress,
    run_steps: RunSteps = run_steps_here,
    *,
    resumable: bool = True,
) -> State:
    """Build what the plan says and commit it. Raises IndexBuildError, DamagedFile or CommitConflict.

    Unless `resumable`, an interrupted build removes everything that it made.
    """
    if state.identity is None or not plan.shards:
        raise IndexBuildError(f"the memory at {log.storage.uri} has no entries to index: add images first")
    with Lease(log.storage, "index") as lease:
        builder = _Builder(log.storage, state, plan, options, on_progress, lease, run_steps)
        return _built(log, state, builder, command, lease, resumable)


def _built(log: VersionLog, state: State, builder: "_Builder", command: str, lease: Lease, resumable: bool) -> State:
    try:
        index = builder.build()
    except IndexBuildError:
        builder.give_up()
        raise
    except BaseException:  # also an interrupt; a kill leaves files that no version names
        if not resumable:
            builder.give_up()
        raise
    replaces = state.index
    action = SetIndex(
        index=index,
        replaces=replaces.generation if replaces else None,
        replaces_shards=len(replaces.shards) if replaces else 0,
    )
    try:
        after = log.commit(state, command, lambda _number, _state: [action], lease)
    except CommitConflict:  # only here: after any other failure the version may have been published
        builder.give_up()
        raise
    builder.tidy()
    return after


class _Begun(BaseModel):
    """The first mark of a build: the generation that it makes, and the nonce of its lease."""

    model_config = ConfigDict(frozen=True)

    generation: Generation
    work: Nonce  # nonce of the lease under which the build began


class _Trained(BaseModel):
    """The mark of a trained index and of the chosen key."""

    model_config = ConfigDict(frozen=True)

    key: str
    index: FileRef | None
    centroid_distance: float | None
    candidates: FileRef | None


class _Asked(BaseModel):
    """The mark of the questions to measure recall with."""

    model_config = ConfigDict(frozen=True)

    questions: FileRef


class _TooCoarse(Exception):
    """A shard misses the target with all parameters."""

    def __init__(self, key: str, found: Measured, side: SideFiles) -> None:
        super().__init__(key)
        self.found = found
        self.side = side


class _Builder:
    def __init__(
        self,
        storage: Storage,
        state: State,
        plan: IndexPlan,
        options: IndexOptions,
        on_progress: OnProgress,
        lease: Lease,
        run_steps: RunSteps,
    ) -> None:
        assert state.identity is not None  # noqa: S101  # checked by build_index
        self._storage = storage
        self._plan = plan
        self._options = options
        self._progress = on_progress
        self._run = run_steps
        self._num_live = state.num_live
        self._table = plan.table
        self._old = state.index if plan.grows else None
        self._kept = self._old.shards[: len(self._old.shards) - plan.merged] if self._old else ()
        self._questions_QD = plan.questions_QD
        fingerprint = _fingerprint(state, plan, options)
        self._marks = build_folder(fingerprint)
        lease.hold(self._marks)
        begun = read_mark(storage, f"{self._marks}{BUILD_BEGUN}", _Begun)
        if begun is None:
            generation = self._old.generation if self._old else _next_generation(storage)
            begun = _Begun(generation=generation, work=lease.nonce)
            storage.replace(f"{self._marks}{BUILD_BEGUN}", begun.model_dump_json().encode())
        self._generation = begun.generation
        # The lease's nonce separates the files of two writers that build at the same time.
        self._folder = generation_folder(self._generation, lease.nonce)
        self._work = ShardWork(
            storage=storage,
            marks=self._marks,
            folder=self._folder,
            dimension=state.identity.dimension,
            first=max((shard.number for shard in self._kept), default=-1) + 1,
            shards=plan.shards,
            tombstones=state.tombstones,
            rows=plan.rows,
            sample_rows=0,
            key=plan.key or "",
            target_recall=options.target_recall,
            max_latency_ms=options.max_latency_ms,
            refine=plan.refine,
            all_rows=plan.rows + sum(shard.rows for shard in self._kept),
        )
        earlier = {generation_of(file.path) for file in self._marked()}
        lease.hold(*sorted(earlier - {self._folder}))

    def build(self) -> Index:
        key = self._plan.key
        numbers = range(len(self._plan.shards))
        if not (self._old and self._old.trained) and key != FLAT:
            self._work = replace(self._work, sample_rows=self._sample_rows(key))
        if self._questions_QD is not None:
            asked = self._work.once("questions", _Asked, self._write_questions)
            self._work = replace(self._work, questions=asked.questions)
        gathered = dict(self._counted("gathering", self._run(self._work.gathering(numbers))))
        rows = sum(found.side.rows for found in gathered.values())
        if not rows and key != FLAT:
            raise IndexBuildError("every entry to be indexed is forgotten: add images first")
        while True:
            made = self._trained([gathered[number] for number in numbers])
            self._work = replace(self._work, key=made.key)
            if made.index is None:
                self._check_held(sum(found.side.vectors.num_bytes for found in gathered.values()), made.key)
                return self._index("", made, [self._shard(n, gathered[n], None, None) for n in numbers])
            try:
                return self._filled(gathered, made, made.index)
            except _TooCoarse as short:
                self._choose_finer(made, short)

    def _filled(self, gathered: dict[int, Gathered], made: _Trained, trained: FileRef) -> Index:
        """The index with all shards. Raises _TooCoarse.

        Up to MEASURED_SHARDS of the new shards are measured together. If they are not the whole generation, they count
        as a sample of it.
        """
        filled = [(number, found) for number, found in sorted(gathered.items()) if found.side.rows]
        populated: dict[int, Populated] = {}
        self._progress(Progress("populating", 0, self._plan.rows))
        for number, found in self._run(self._work.populating(trained, filled)):
            populated[number] = found
            done = sum(file.rows for place in populated for file in self._plan.shards[place])
            self._progress(Progress("populating", done, self._plan.rows))
        held = trained.num_bytes + sum(found.index.num_bytes for found in populated.values())
        self._check_held(held, made.key)
        measured: Measured | None = None
        if filled:
            self._progress(Progress("tuning", 0, 1))
            places = np.unique(np.linspace(0, len(filled) - 1, min(len(filled), MEASURED_SHARDS)).round().astype(int))
            some = [(filled[place][0], filled[place][1], populated[filled[place][0]]) for place in places]
            known = self._known(made.key) if self._old else None
            [(first, measured)] = self._run(self._work.measuring(trained, known, some))
            self._progress(Progress("tuning", 1, 1))
            if not measured.reached:
                raise _TooCoarse(made.key, measured, gathered[first].side)
        shards = [self._shard(n, found, populated.get(n), measured) for n, found in sorted(gathered.items())]
        return self._index(measured.parameters if measured else "", made, shards)

    def _choose_finer(self, made: _Trained, short: "_TooCoarse") -> None:
        """Choose the next candidate in place of one that reached the target on the sample but not on a shard.

        Raises IndexBuildError if the key was given, or if no other candidate reaches the target.
        """
        table = self._table
        if table is None and made.candidates is not None and not self._old:  # chosen before the build was interrupted
            table = read_table_of(self._storage, made.candidates)
        if self._plan.key is not None or table is None:
            raise IndexBuildError(self._too_low(made.key, short.found, short.side))
        self._table = table.without(made.key, short.found.quality)
        if not any(candidate.verdict == CHOSEN for candidate in self._table.candidates):
            raise IndexBuildError(self._too_low(made.key, short.found, short.side))
        self._progress(Progress("choosing", 1, 1))
        for name in self._storage.list(self._marks):
            if name.startswith(("trained", "populated")):
                mark = read_mark(self._storage, f"{self._marks}{name}", _kind_of(name))
                made_of = [file.path for file in files_of(mark)] if mark else []
                self._storage.delete([*made_of, f"{self._marks}{name}"])

    def _sample_rows(self, key: str | None) -> int:
        """Rows for the training sample. If the key is not chosen yet: as many as the most demanding key may need."""
        if key is not None:
            empty_index(key, self._work.dimension)  # an invalid key is reported before any work
            rows = training_rows(key, self._plan.rows, self._work.dimension, self._options.max_memory_bytes)
            return min(max(rows, 1), self._plan.rows)
        likely = f"IVF{num_lists(self._plan.rows)},Flat"
        rows = self._plan.rows
        if rows >= least_rows(likely):
            rows = training_rows(likely, rows, self._work.dimension, self._options.max_memory_bytes)
        return min(max(rows, SAMPLE_ROWS), self._plan.rows)

    def _trained(self, gathered: Sequence[Gathered]) -> _Trained:
        """The key and the empty trained index: that of the generation, or one trained on the sample of all shards."""
        if self._old:
            distance = self._old.centroid_distance
            return _Trained(
                key=self._old.key, index=self._old.trained, centroid_distance=distance, candidates=self._old.candidates
            )
        return self._work.once("trained", _Trained, lambda: self._train(gathered))

    def _train(self, gathered: Sequence[Gathered]) -> _Trained:
        key, candidates = self._plan.key, None
        if key == FLAT:
            return _Trained(key=FLAT, index=None, centroid_distance=None, candidates=None)
        sample_ND = np.concatenate(
            [mapped_vectors(self._storage, found.sample, self._work.dimension) for found in gathered if found.sample]
        )
        if key is None:
            self._table = table = self._table or self._measured_table(sample_ND)
            key = table.chosen.key
            candidates = self._write_table(table)
            if key == FLAT:
                return _Trained(key=FLAT, index=None, centroid_distance=None, candidates=candidates)
            rows = training_rows(key, self._plan.rows, self._work.dimension, self._options.max_memory_bytes)
            sample_ND = np.random.default_rng(0).permutation(sample_ND)[:rows]
        self._progress(Progress("training", 0, len(sample_ND)))
        index = train_index(key, train_on(key, sample_ND), device=gpu())
        self._progress(Progress("training", len(sample_ND), len(sample_ND)))
        published = write_faiss(self._storage, trained_path(self._folder), index)
        distance = centroid_distance(index, sample_ND)
        return _Trained(key=key, index=published, centroid_distance=distance, candidates=candidates)

    def _measured_table(self, sample_ND: np.ndarray) -> Table:
        rows = np.random.default_rng(0).permutation(len(sample_ND))[:SAMPLE_ROWS]
        return measured_candidates(sample_ND[rows], self._num_live, self._options, self._plan.refine, self._progress)

    def _write_questions(self) -> _Asked:
        assert self._questions_QD is not None  # noqa: S101  # only called if there are some
        rows = np.arange(len(self._questions_QD))
        path = f"{self._folder}{QUESTIONS_FILE}"
        return _Asked(questions=write_vectors(self._storage, path, self._questions_QD, rows))

    def _write_table(self, table: Table) -> FileRef:
        path = candidates_path(self._folder)
        with self._storage.publishing(path) as local:
            local.write_text(table.model_dump_json(indent=1))
            return describe(path, local)

    def _too_low(self, key: str, found: Measured, side: SideFiles) -> str:
        """The message that a shard misses the target, and which setting would reach it, as far as can be measured."""
        target = self._options.target_recall
        recall = found.quality.recall_at_10
        reached = f"the index {key} reaches recall@10 {recall:.3f} at most, below the target {target:g}"
        lower = f"`target_recall` {np.floor(recall * 1e3) / 1e3:g}"
        if found.recall_if_refined is not None and found.recall_if_refined >= target:
            return (
                f"{reached}, and was not published: `refine` float16 reaches {found.recall_if_refined:.3f} with "
                f"{2 * self._work.dimension:,} bytes a vector on disk, or give {lower}"
            )
        vectors_ND = mapped_vectors(self._storage, side.vectors, self._work.dimension)
        rows = np.random.default_rng(0).permutation(len(vectors_ND))[:SAMPLE_ROWS]
        table = self._measured_table(vectors_ND[np.sort(rows)])
        able = [c for c in table.candidates if c.reaches(target) and c.key not in (key, FLAT)]
        if not able:
            return f"{reached}, and was not published: give `key` Flat for exact search, or {lower}"
        finer = min(able, key=lambda candidate: candidate.cost)
        return (
            f"{reached}, and was not published: `key` {finer.key} reaches {target:g} on a sample, with about "
            f"{finer.bytes_in_memory:,} bytes in memory, or give {lower}"
        )

    def _check_held(self, num_bytes: int, key: str) -> None:
        """Raise IndexBuildError if the index takes more memory than allowed."""
        num_bytes += sum(shard.bytes_in_memory for shard in self._kept)
        if num_bytes > self._options.max_memory_bytes:
            raise IndexBuildError(
                f"the index {key} takes {num_bytes:,} bytes and {self._options.max_memory_bytes:,} "
                "are allowed: allow more with `max_memory_bytes`, or give a smaller `key`"
            )

    def _shard(self, number: int, gathered: Gathered, populated: Populated | None, measured: Measured | None) -> Shard:
        """A shard. It has no index if it is searched exactly, or if all its rows are forgotten."""
        side = gathered.side
        return Shard(
            number=number + self._work.first,
            rows=side.rows,
            covers=tuple(_spans(self._plan.shards[number])),
            index=populated.index if populated else None,
            ids=side.ids,
            labels=side.labels,
            vectors=side.vectors if self._keeps_vectors(populated) else None,
            entries=side.entries,
            recall_at_10=measured.quality.recall_at_10 if measured and populated else 1.0,
            quality=measured.quality if measured and populated else None,
            centroid_distance=populated.centroid_distance if populated else None,
        )

    def _keeps_vectors(self, populated: Populated | None) -> bool:
        return populated is None or self._plan.refine == "float16"

    def _known(self, key: str) -> str:
        """The search parameters of the index that grows, with `rerank` for all its shards together."""
        assert self._old is not None  # noqa: S101
        return parameters.to_text(parameters.values_of(self._old, has_lists=bool(num_centroids(key))))

    def _index(self, values: str, made: _Trained, shards: Sequence[Shard]) -> Index:
        return Index(
            generation=self._generation,
            key=made.key,
            refine=self._plan.refine,
            parameters=values or (self._known(made.key) if self._old else ""),
            rerank_for="index" if num_centroids(made.key) else "shard",
            trained=made.index,
            shards=(*self._kept, *shards),
            candidates=made.candidates,
            centroid_distance=made.centroid_distance,
        )

    def _counted(self, stage: str, steps: Iterable[tuple[int, Step]]) -> Iterator[tuple[int, Step]]:
        done = 0
        self._progress(Progress(stage, 0, self._plan.rows))
        for number, found in steps:
            done += sum(file.rows for file in self._plan.shards[number])
            yield number, found
            if stage != "gathering" or done < self._plan.rows:  # gathering ends soon: no last line for it
                self._progress(Progress(stage, done, self._plan.rows))

    def _marked(self) -> list[FileRef]:
        found: list[FileRef] = []
        for name in self._storage.list(self._marks):
            mark = read_mark(self._storage, f"{self._marks}{name}", _kind_of(name))
            found += files_of(mark) if mark else []
        return found

    def give_up(self) -> None:
        """Remove everything that this build has made."""
        for file in self._marked():
            if not (self._old and file == self._old.trained):
                self._storage.delete([file.path])
        self._storage.remove_folder(self._folder)
        self._storage.remove_folder(self._marks)

    def tidy(self) -> None:
        """Remove the files that only the build needed."""
        keeps_vectors = self._plan.refine == "float16" or self._work.key == FLAT
        needless = [f"/{name}" for name in (SAMPLE_FILE, QUESTIONS_FILE, *(() if keeps_vectors else (VECTORS_FILE,)))]
        self._storage.delete([file.path for file in self._marked() if file.path.endswith(tuple(needless))])
        self._storage.remove_folder(self._marks)


def _kind_of(name: str) -> type[BaseModel]:
    """The model of a mark with this name."""
    kinds: dict[str, type[BaseModel]] = {
        "gathered": Gathered,
        "populated": Populated,
        "trained": _Trained,
        "questions": _Asked,
    }
    return kinds.get(name.rpartition(".")[0].partition("-")[0], _Begun)


def _next_generation(storage: Storage) -> int:
    return max((generation_number(name) or 0 for name in storage.list(INDEX)), default=0) + 1


def _fingerprint(state: State, plan: IndexPlan, options: IndexOptions) -> str:
    """A hash of everything that must be equal for a build to continue an interrupted one."""
    said = {
        "options": asdict(options),
        "shards": [[file.sha256 for file in shard] for shard in plan.shards],
        "tombstones": [file.sha256 for file in state.tombstones],
        "replaces": [state.index.generation, len(state.index.shards)] if state.index else None,
        "key": plan.key,
        "grows": plan.grows,
        "erasures": list(state.erasures),
    }
    if plan.questions_QD is not None:
        said["questions"] = hashlib.sha256(np.ascontiguousarray(plan.questions_QD).data).hexdigest()
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _spans(files: Sequence[RowsFile]) -> Iterator[tuple[int, int]]:
    """The id ranges of some files. Neighbouring ranges of a segment are joined."""
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

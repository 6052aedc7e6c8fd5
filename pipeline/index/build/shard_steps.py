"""The work on one shard, in steps that can run in any process: gather its rows, populate it, measure it.

A step writes a mark after its files are published. The mark names what the step made. An interrupted build starts
again from the existing marks. The first mark of a step counts. The files of a second attempt are garbage.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import faiss
import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.errors import DamagedFile
from pipeline.index.build import tune
from pipeline.index.build.distinct import vector_keys
from pipeline.index.build.gpu import gpu
from pipeline.index.build.joint_recall import JointRecall, Member
from pipeline.index.build.populate import ADD_ROWS, populate
from pipeline.index.build.train import centroid_distance
from pipeline.index.search import parameters
from pipeline.index.search.quantizer import Quantizer
from pipeline.index.search.shard_files import (
    SideFiles,
    mapped_vectors,
    read_faiss,
    write_faiss,
    write_side_files,
    write_vectors,
)
from pipeline.index.search.stack import Seat, Stack
from pipeline.steps import PROCESS_BYTES, Step
from pipeline.store.layout import FAISS_FILE, INDEX, SAMPLE_FILE, shard_folder, step_path
from pipeline.store.log.records import Quality, Refine
from pipeline.store.storage.file_refs import FileRef, RowsFile, check_places
from pipeline.store.storage.interface import AlreadyExists, Storage, released
from pipeline.store.tables.tombstones import read_tombstones

# An index tuned to miss .05 on stored rows missed .070 on images held out, which are further from their neighbours.
STORED_ROWS_MISS = 1.4
WIDENED = 1.25  # times as far, if all queries together need more than the tuning queries did
WIDENINGS = 4  # at most, before other parameters are tried
ENTRY_BYTES = 300  # a generous estimate for the ids, labels, uris and datasets of a row during gathering

Mark = TypeVar("Mark", bound=BaseModel)


class Gathered(BaseModel):
    """The rows of a shard in its side files, and its part of the training sample (None for the key Flat)."""

    model_config = ConfigDict(frozen=True)

    side: SideFiles
    sample: FileRef | None


class Populated(BaseModel):
    """A populated index, and how far its vectors are from their centroids."""

    model_config = ConfigDict(frozen=True)

    index: FileRef
    centroid_distance: float | None


class Measured(BaseModel):
    """The parameters with which a shard was measured, and its quality. `reached`: recall@10 reaches the target.

    `recall_if_refined` is recall@10 with candidates scored again. It is measured only if candidates are not scored
    again and the target is missed.
    """

    model_config = ConfigDict(frozen=True)

    parameters: str
    tuned_by: str
    quality: Quality
    reached: bool
    recall_if_refined: float | None = None


@dataclass(frozen=True)
class ShardWork:
    """The data that every step on any shard of a build needs. It is sent to other processes.

    `all_rows` are the rows of the generation once this build is done. `questions` are vectors that are no rows of it,
    to measure recall with; may be None.
    Marks are stored in `marks`, files of this attempt in `folder`. `rows` (as planned) and `sample_rows` are totals
    over all shards.
    """

    storage: Storage
    marks: str
    folder: str
    dimension: int
    first: int
    shards: tuple[tuple[RowsFile, ...], ...]
    tombstones: tuple[FileRef, ...]
    rows: int
    sample_rows: int
    key: str
    target_recall: float
    max_latency_ms: float
    refine: Refine = "float16"
    all_rows: int = 0
    questions: FileRef | None = None

    def gathering(self, numbers: Sequence[int]) -> Iterator[Step]:
        """The steps that gather shards."""
        return (Step(number, partial(self.gather, number), self.memory_bytes(number)) for number in numbers)

    def populating(self, trained: FileRef, shards: Sequence[tuple[int, Gathered]]) -> Iterator[Step]:
        """The steps that populate gathered shards. Codes are no larger than the vectors in float32."""
        for number, gathered in shards:
            rows = sum(file.rows for file in self.shards[number])
            needed = self.memory_bytes(number, trained.num_bytes + rows * 2 * self.dimension)
            yield Step(number, partial(self.populate, number, gathered.side, trained), needed, on_gpu=True)

    def measuring(
        self, trained: FileRef, known: str | None, shards: Sequence[tuple[int, Gathered, Populated]]
    ) -> Iterator[Step]:
        """The one step that measures populated shards together, with known parameters or with those it finds."""
        needed = self.memory_bytes(shards[0][0], sum(filled.index.num_bytes for _, _, filled in shards))
        files = [(number, gathered.side, filled.index) for number, gathered, filled in shards]
        yield Step(shards[0][0], partial(self.measure, files, trained, known), needed)

    def gather(self, number: int) -> Gathered:
        """Write the side files of a shard and its part of the sample. Reads the entries files one after the other."""

        def make() -> Gathered:
            forgotten = read_tombstones(self.storage, self.tombstones)
            side = write_side_files(self.storage, self.shard_folder(number), self.shards[number], forgotten)
            chosen = self._sampled(number, side.rows)
            if not len(chosen):
                return Gathered(side=side, sample=None)
            vectors_ND = mapped_vectors(self.storage, side.vectors, self.dimension)
            path = f"{self.shard_folder(number)}{SAMPLE_FILE}"
            return Gathered(side=side, sample=write_vectors(self.storage, path, vectors_ND, chosen))

        return self.once(f"gathered-{number}", Gathered, make)

    def populate(self, number: int, side: SideFiles, trained: FileRef) -> Populated:
        """Add the rows of a shard to the trained index and publish it."""

        def make() -> Populated:
            index = read_faiss(self.storage, trained, mapped=False)
            vectors_ND = mapped_vectors(self.storage, side.vectors, self.dimension)
            distance = centroid_distance(index, vectors_ND)
            filled = populate(index, vectors_ND, gpu())
            path = f"{self.shard_folder(number)}{FAISS_FILE}"
            published = write_faiss(self.storage, path, filled, with_centroids=False)
            return Populated(index=published, centroid_distance=distance)

        return self.once(f"populated-{number}", Populated, make)

    def measure(
        self, shards: Sequence[tuple[int, SideFiles, FileRef]], trained: FileRef, known: str | None
    ) -> Measured:
        """Recall and latency with the `known` parameters, slightly wider ones, or tuned ones if these fail.

        Recall is that of a search of all these shards over all their rows. The parameters aim higher than the target if
        the queries are stored rows. Reads every vector of the shards, and their indexes into memory. As this is the
        last step on these shards, the local copies of both are released.
        """
        paths = [path for _, side, index in shards for path in (index.path, side.vectors.path)]
        with released(self.storage, *paths):
            return self._tuned(shards, trained, known)

    def _tuned(self, shards: Sequence[tuple[int, SideFiles, FileRef]], trained: FileRef, known: str | None) -> Measured:
        empty = read_faiss(self.storage, trained, mapped=False)
        quantizer = Quantizer(empty) if faiss.try_extract_index_ivf(empty) is not None else None
        members = [self._member(number, side, index, quantizer) for number, side, index in shards]
        questions_QD = None
        if self.questions is not None:
            questions_QD = mapped_vectors(self.storage, self.questions, self.dimension)
        judge = JointRecall(members, questions_QD, self.all_rows)
        first = members[0].index
        if known is not None:
            recall, values = self._widened(first, judge, parameters.parse(known), self.target_recall)
            if recall >= self.target_recall:
                return self._measured(first, judge, values, recall, "measured")
        for aim in dict.fromkeys((self._aim, self.target_recall)):
            found = tune.tune_index(
                first,
                self.key,
                judge,
                aim,
                self.max_latency_ms,
                refined=self._refined,
                by_tuner=len(members) == 1 or "_HNSW" in self.key,
            )
            most = parameters.widest(first) | ({"rerank": tune.RERANKS[-1]} if self._refined else {})
            tuned = found.values if found else most
            for rerank in [n for n in judge.reranks if n >= tuned["rerank"]] if "rerank" in tuned else [None]:
                asked = tuned if rerank is None else tuned | {"rerank": rerank}
                recall, values = self._widened(first, judge, asked, aim)
                if recall >= aim:
                    by = found.by if found and values == found.values else "measured"
                    return self._measured(first, judge, values, recall, by)
        recall = judge.recall(first, most, tune.NEIGHBORS_TUNED, refined=self._refined)
        return self._measured(first, judge, most, recall, "measured")

    @property
    def _aim(self) -> float:
        """The recall to tune for: the target on questions that are no rows, a higher one on stored rows."""
        return self.target_recall if self.questions is not None else 1 - (1 - self.target_recall) / STORED_ROWS_MISS

    def _member(self, number: int, side: SideFiles, file: FileRef, quantizer: Quantizer | None) -> Member:
        # The tuner sets parameters on the index that it tries, so the index is loaded.
        index = read_faiss(self.storage, file, mapped=False)
        given = quantizer is not None and quantizer.give_to(index)
        has_lists = faiss.try_extract_index_ivf(index) is not None
        seat = Seat(Stack(index, quantizer if given else None, [side.rows])) if has_lists else None
        vectors_ND = mapped_vectors(self.storage, side.vectors, self.dimension)
        held_out = np.ones(side.rows, bool)
        held_out[self._sampled(number, side.rows)] = False
        return Member(index, seat, vectors_ND, vector_keys(vectors_ND), held_out)

    def _widened(
        self, index: faiss.Index, judge: tune.RecallEvaluator, values: dict[str, int], aim: float
    ) -> tuple[float, dict[str, int]]:
        """recall@10 of all queries, and its parameters. They are widened a few times if it is below the aim."""
        for _ in range(WIDENINGS):
            recall = judge.recall(index, values, tune.NEIGHBORS_TUNED, refined=self._refined)
            wider = parameters.widen(index, values, WIDENED)
            if recall >= aim or wider is None:
                break
            values = wider
        else:
            recall = judge.recall(index, values, tune.NEIGHBORS_TUNED, refined=self._refined)
        return recall, values

    def _measured(
        self, index: faiss.Index, judge: tune.RecallEvaluator, values: dict[str, int], recall: float, by: str
    ) -> Measured:
        reached, refined = recall >= self.target_recall, None
        if not reached and not self._refined:
            most = values | {"rerank": tune.RERANKS[-1]}
            refined = judge.recall(index, most, tune.NEIGHBORS_TUNED, refined=True)
        return Measured(
            parameters=parameters.to_text(values),
            tuned_by=by,
            quality=judge.quality(index, values, refined=self._refined, recall_at_10=recall),
            reached=reached,
            recall_if_refined=refined,
        )

    @property
    def _refined(self) -> bool:
        return self.refine == "float16"

    def memory_bytes(self, number: int, index_bytes: int = 0) -> int:
        """The most bytes that a step on a shard needs: for gathering rows, or for an index and vectors in float32."""
        rows = sum(file.rows for file in self.shards[number])
        largest = max((file.rows for file in self.shards[number]), default=0)
        gathering = rows * ENTRY_BYTES + 4 * largest * 2 * self.dimension
        adding = 2 * index_bytes + 3 * ADD_ROWS * 4 * self.dimension
        return PROCESS_BYTES + max(gathering, adding)

    def shard_folder(self, number: int) -> str:
        return shard_folder(self.folder, number + self.first)

    def once(self, name: str, model: type[Mark], make: Callable[[], Mark]) -> Mark:
        """The content of the mark of this name. If no mark with all its files exists, make the content and write it."""
        path = step_path(self.marks, name)
        known = read_mark(self.storage, path, model)
        if known is not None:
            return known
        made = make()
        try:
            self.storage.create(path, made.model_dump_json().encode())
        except AlreadyExists:  # another attempt was first, or the answer to this write was lost
            known = read_mark(self.storage, path, model)
            if known is not None:
                return known
            self.storage.replace(path, made.model_dump_json().encode())  # the files of that mark are gone
        return made

    def _sampled(self, number: int, rows: int) -> np.ndarray:
        """Rows of a shard in the training sample, ascending, in proportion to its size. Every call returns the same."""
        share = min(rows, -(-self.sample_rows * rows // max(self.rows, 1)))
        random = np.random.default_rng(number)
        chosen: np.ndarray = np.sort(random.choice(rows, share, replace=False))
        return chosen


def read_mark(storage: Storage, path: str, model: type[Mark]) -> Mark | None:
    """A mark, or None unless all its files exist and are files of an index."""
    try:
        mark = model.model_validate_json(storage.read(path))
        check_places(files_of(mark), {INDEX})
        return mark if all(storage.exists(file.path) for file in files_of(mark)) else None
    except (DamagedFile, ValueError):
        return None


def files_of(mark: BaseModel) -> Sequence[FileRef]:
    """The files that a mark names."""
    found: list[FileRef] = []
    for _, value in mark:
        if isinstance(value, FileRef):
            found.append(value)
        elif isinstance(value, BaseModel):
            found += files_of(value)
    return found

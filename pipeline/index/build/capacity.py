"""Estimates the time, memory, disk and nodes of an index over more rows than exist, from rates measured here.

The rates are measured on vectors of the memory itself, on this machine: the speed of reading entries, of k-means and
assignment for a number of lists, of making codes, of judging them by exact search, and of each part of a search
(search_rates.py). The estimate is arithmetic: reading, coding and judging grow with the rows; training and assignment
grow with rows times lists; a search grows with the shards of a node.

A node holds whole shards, and every query goes to every group of shards. So more groups make a query cheaper for each
node, and replicas of all of them answer more queries.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import faiss
import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.errors import IndexBuildError, UsageError
from pipeline.index.build import tune
from pipeline.index.build.distinct import vector_keys
from pipeline.index.build.key_candidates import (
    FLAT,
    centroid_bytes,
    expected_bytes,
    num_centroids,
    training_rows,
    with_lists,
)
from pipeline.index.build.key_choice import Candidate, choose
from pipeline.index.build.plan import DEFAULT_SHARD_ROWS
from pipeline.index.build.populate import ADD_ROWS
from pipeline.index.build.search_rates import SearchRates, measure_search
from pipeline.index.build.shard_steps import ENTRY_BYTES
from pipeline.index.build.train import ITERATIONS, train_index
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.steps import PROCESS_BYTES
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.schemas import embedding_matrix, read_table

CALIBRATED_ON = 65_536  # rows at most, from entries files spread over the memory
FEWEST_ROWS = 4_096
LISTS = (64, 512)  # numbers of lists to time training and assignment with; the time is linear in the lists
POINTS_PER_CENTROID = 256  # the most that FAISS trains on
FILLED = 0.8  # fraction of a node's memory for indexes; the rest is for the process, vectors being read, and pages
ASIDE_BYTES = 13  # in memory for each row besides the index: its id, the code of its label, whether it is live
REPEATS = 3  # of each timing; the least counts
MERGE_SECONDS, MERGE_SECONDS_A_GROUP = 0.27e-3, 0.04e-3  # of an ingress for a query with k = 50, 1 to 64 groups

Result = TypeVar("Result")


class Rates(BaseModel):
    """Seconds and bytes for an index of the kind `key`, measured on `rows` rows of `dimension`."""

    model_config = ConfigDict(frozen=True)

    key: str
    dimension: int
    rows: int
    read_row: float
    side_bytes_a_row: float
    train: float
    train_row_list: float
    add_row: float
    add_row_list: float
    judge_row: float
    tune: float
    choose: float
    threads: int = 1
    search: SearchRates | None = None


class CapacityPlan(BaseModel):
    """Estimated needs of an index of `rows` rows. Sizes are in bytes, times in seconds on a machine like this one.

    `groups` nodes hold all shards, `shards_a_node` each. One such set of nodes answers `queries_per_second_a_node`
    queries a second in batches, because each query goes to all of them, and a query alone in `seconds_alone`. An
    ingress, one process, needs `merge_seconds` of a core for a query besides. `bytes_in_memory` counts the indexes of
    one set of nodes, the centroids once a node; `bytes_aside` counts ids, label codes and masks. Of the stages of
    `build_seconds`, those in `spread_stages` are divided by the machines that work on them.
    """

    model_config = ConfigDict(frozen=True)

    rows: int
    key: str
    shards: int
    groups: int
    replicas: int
    bytes_in_memory: int
    bytes_on_disk: int
    build_seconds: dict[str, float]
    build_peak_bytes: int
    queries_per_second_a_node: float
    rates: Rates
    shards_a_node: int
    seconds_alone: float
    merge_seconds: float
    bytes_aside: int
    spread_stages: tuple[str, ...] = ("gathering", "populating", "tuning")

    @property
    def nodes(self) -> int:
        """Nodes to serve it: one for each group of shards, times the replicas that the query rate needs."""
        return self.groups * self.replicas

    def to_json(self) -> dict:
        """The plan as a JSON object."""
        return self.model_dump(mode="json") | {
            "nodes": self.nodes,
            "total_build_seconds": round(sum(self.build_seconds.values()), 1),
        }


@dataclass(frozen=True, kw_only=True)
class CapacityGoal:
    """The size and the performance that an index should have. Raises UsageError for an impossible goal.

    `memory_per_node` is in bytes. `max_latency_ms` is the most milliseconds that a single query may take in a shard.
    """

    rows: int
    memory_per_node: int
    target_recall: float
    queries_per_second: float
    max_latency_ms: float
    shard_rows: int = DEFAULT_SHARD_ROWS

    def __post_init__(self) -> None:
        _check(self.rows, self.memory_per_node, self.queries_per_second)


def plan_capacity(
    storage: Storage,
    files: Sequence[RowsFile],
    dimension: int,
    goal: CapacityGoal,
    on_progress: OnProgress = ignore_progress,
) -> CapacityPlan:
    """Measure rates on the vectors of some entries files, and compute the plan. Writes nothing.

    Raises UsageError for impossible goals. Raises IndexBuildError if there are too few rows to measure, or if no index
    meets the goal.
    """
    rows = goal.rows
    on_progress(Progress("reading", 0, 1))
    vectors_ND, read_row, side_bytes = _read(storage, files)
    if len(vectors_ND) < FEWEST_ROWS:
        raise IndexBuildError(
            f"there are {len(vectors_ND):,} entries to measure rates on and {FEWEST_ROWS:,} are needed: add more images"
        )
    began = time.perf_counter()
    table = choose(
        vectors_ND,
        rows,
        target_recall=goal.target_recall,
        max_memory_bytes=max(goal.memory_per_node, expected_bytes(FLAT, rows, dimension)),
        max_latency_ms=goal.max_latency_ms,
        on_progress=on_progress,
    )
    chose = time.perf_counter() - began
    rates = _measured(table.chosen.key, vectors_ND, read_row, side_bytes, on_progress)
    on_progress(Progress("timing a search", 0, 1))
    search = measure_search(table.chosen.key, vectors_ND, rows, goal.target_recall)
    rates = rates.model_copy(update={"choose": chose, "search": search, "threads": faiss.omp_get_max_threads()})
    return computed(rates, table.chosen, rows, goal.memory_per_node, goal.queries_per_second, goal.shard_rows)


def computed(
    rates: Rates,
    chosen: Candidate,
    rows: int,
    memory_per_node: int,
    queries_per_second: float,
    shard_rows: int = DEFAULT_SHARD_ROWS,
) -> CapacityPlan:
    """The plan, computed from rates."""
    lists = num_centroids(chosen.key)
    shards = math.ceil(rows / shard_rows)
    held = math.ceil(rows / shards)
    centroids = centroid_bytes(chosen.key, rates.dimension)
    shard_in_memory = expected_bytes(chosen.key, held, rates.dimension) - centroids
    room = FILLED * memory_per_node - centroids
    most = max(int(room // (shard_in_memory + ASIDE_BYTES * held)), 1)  # a node holds whole shards
    groups = math.ceil(shards / most)
    shards_here = math.ceil(shards / groups)
    in_memory = shards * shard_in_memory + groups * centroids
    together, alone = _search_seconds(rates, chosen, rows, shards, shards_here)
    seconds = {"gathering": rows * rates.read_row}
    if chosen.key != FLAT:
        trained_on = training_rows(chosen.key, rows, rates.dimension, memory_per_node)
        judged = min(rows, shard_rows) * shards
        seconds |= {
            "choosing": rates.choose,
            "training": rates.train + rates.train_row_list * trained_on * lists,
            "populating": rows * (rates.add_row + rates.add_row_list * lists),
            "tuning": rates.tune + judged * rates.judge_row,
        }
    shard_bytes = expected_bytes(chosen.key, held, rates.dimension)
    training_bytes = 0 if chosen.key == FLAT else 3 * trained_on * 2 * rates.dimension
    chunk = ADD_ROWS * 4 * rates.dimension
    vectors = held * 2 * rates.dimension  # mapped, and read as a whole while a shard is populated and judged
    peak = PROCESS_BYTES + max(held * ENTRY_BYTES, training_bytes, vectors + shard_bytes + 2 * chunk)
    index_bytes = 0 if chosen.key == FLAT else in_memory - (groups - 1) * centroids
    return CapacityPlan(
        rows=rows,
        key=chosen.key,
        shards=shards,
        groups=groups,
        replicas=max(math.ceil(queries_per_second * together), 1),
        bytes_in_memory=in_memory,
        bytes_on_disk=int(rows * rates.side_bytes_a_row) + index_bytes,
        build_seconds={stage: round(took, 2) for stage, took in seconds.items()},
        build_peak_bytes=int(peak),
        queries_per_second_a_node=1 / together,
        rates=rates,
        shards_a_node=shards_here,
        seconds_alone=alone,
        merge_seconds=MERGE_SECONDS + groups * MERGE_SECONDS_A_GROUP,
        bytes_aside=rows * ASIDE_BYTES,
    )


def _search_seconds(rates: Rates, chosen: Candidate, rows: int, shards: int, shards_here: int) -> tuple[float, float]:
    """Seconds of a node for a query: of many in a batch, and of one alone."""
    if rates.search is not None:
        together = rates.search.seconds(rows, shards, shards_here) / rates.threads  # queries of a batch share the cores
        return together, rates.search.seconds(rows, shards, shards_here, alone=True)
    quality = chosen.quality
    assert quality is not None  # noqa: S101  # a chosen candidate was measured
    if chosen.key == FLAT:  # measured for all rows
        return quality.seconds_in_batch * shards_here / shards, quality.seconds_alone * shards_here / shards
    return quality.seconds_in_batch * shards_here, quality.seconds_alone * shards_here  # a graph, once a shard


def _check(rows: int, memory_per_node: int, queries_per_second: float) -> None:
    if rows < 1:
        raise UsageError(f"`rows` {rows} is not a number of entries: give 1 or more")
    if memory_per_node < 1:
        raise UsageError(f"`memory_per_node` {memory_per_node} is no room: give a size such as 64G")
    if not queries_per_second > 0:
        raise UsageError(f"`queries_per_second` {queries_per_second} is not a rate: give more than 0")


def _read(storage: Storage, files: Sequence[RowsFile]) -> tuple[np.ndarray, float, float]:
    """Vectors of entries files spread over the memory, in random order; seconds and bytes a row for gathering."""
    random = np.random.default_rng(0)
    pieces, rows, text = list[np.ndarray](), 0, 0
    began = time.perf_counter()
    for place in random.permutation(len(files)):
        table = read_table(storage, files[place], ["id", "uri", "label", "dataset", "embedding"])
        pieces.append(np.array(embedding_matrix(table.column("embedding"))))
        text += table.column("uri").nbytes + table.column("dataset").nbytes
        rows += table.num_rows
        if rows >= CALIBRATED_ON:
            break
    seconds = time.perf_counter() - began
    vectors_ND = np.concatenate(pieces) if pieces else np.empty((0, 1), np.float16)
    dimension = vectors_ND.shape[1]
    side_bytes = 2 * dimension + 8 + 4 + text / max(rows, 1)
    return random.permutation(vectors_ND)[:CALIBRATED_ON], seconds / max(rows, 1), side_bytes


def _measured(key: str, vectors_ND: np.ndarray, read_row: float, side_bytes: float, on_progress: OnProgress) -> Rates:
    """Measure the times of the steps of a build, with few lists and with many."""
    rows, dimension = vectors_ND.shape
    floats_ND = np.ascontiguousarray(vectors_ND, np.float32)
    keys_N = vector_keys(vectors_ND)
    judge_seconds, judge = _least(
        lambda: tune.RecallEvaluator(vectors_ND, tune.query_sample(vector_keys(vectors_ND), seed=0), keys_N=keys_N)
    )
    judge_row = judge_seconds / rows
    zero = Rates(
        key=key, dimension=dimension, rows=rows, read_row=read_row, side_bytes_a_row=side_bytes,
        train=0, train_row_list=0, add_row=0, add_row_list=0, judge_row=judge_row, tune=0, choose=0,
    )  # fmt: skip
    if key == FLAT:
        return zero
    trains, adds, tunes = [], [], []
    lists = LISTS if num_centroids(key) else (0, 0)
    for step, number in enumerate(lists):
        on_progress(Progress("timing", step, len(lists)))
        timed, sample_ND = with_lists(key, number), floats_ND[: max(POINTS_PER_CENTROID * number // 4, FEWEST_ROWS)]
        began = time.perf_counter()
        index = train_index(timed, sample_ND)
        trains.append(time.perf_counter() - began)
        add_seconds, _ = _least(partial(_add, index, floats_ND))
        adds.append(add_seconds / rows)
        began = time.perf_counter()
        tune.cheapest_parameters(index, judge, 0.9, refined=True)
        tunes.append(time.perf_counter() - began)
    on_progress(Progress("timing", len(lists), len(lists)))
    few, many = lists
    if not num_centroids(key):
        return zero.model_copy(update={"train": trains[-1], "add_row": adds[-1], "tune": tunes[-1]})
    points = [max(POINTS_PER_CENTROID * number // 4, FEWEST_ROWS) * number for number in lists]
    add_row_list = max((adds[1] - adds[0]) / (many - few), 0.0)
    train_row_list = ITERATIONS * add_row_list  # each iteration of k-means assigns every row
    return zero.model_copy(
        update={
            "train": max(trains[0] - train_row_list * points[0], 0.0),
            "train_row_list": train_row_list,
            "add_row": max(adds[0] - add_row_list * few, 0.0),
            "add_row_list": add_row_list,
            "tune": tunes[-1],
        }
    )


def _add(index: faiss.Index, floats_ND: np.ndarray) -> None:
    index.reset()
    index.add(floats_ND)


def _least(work: Callable[[], Result]) -> tuple[float, Result]:
    """The least seconds of several runs of some work, and the result of the last one."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return min(seconds), result

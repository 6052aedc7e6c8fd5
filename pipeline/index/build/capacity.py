"""Estimates the time, memory, disk and nodes of an index over more rows than exist, from rates measured here.

The rates are measured on vectors of the memory itself, on this machine: the speed of reading entries, of k-means and
assignment for a number of lists, of making codes, and of judging them by exact search. The estimate is arithmetic:
reading, coding and judging grow with the rows; training and assignment grow with rows times lists.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.errors import IndexBuildError, UsageError
from pipeline.index.build import tune
from pipeline.index.build.distinct import vector_keys
from pipeline.index.build.key_candidates import FLAT, expected_bytes, num_centroids, training_rows, with_lists
from pipeline.index.build.key_choice import Candidate, choose
from pipeline.index.build.plan import DEFAULT_SHARD_ROWS
from pipeline.index.build.populate import ADD_ROWS
from pipeline.index.build.shard_steps import ENTRY_BYTES, PROCESS_BYTES
from pipeline.index.build.train import train_index
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.schemas import embedding_matrix, read_table

CALIBRATED_ON = 65_536  # rows at most, from entries files spread over the memory
FEWEST_ROWS = 4_096
LISTS = (64, 512)  # numbers of lists to time training and assignment with; the time is linear in the lists
POINTS_PER_CENTROID = 256  # the most that FAISS trains on
FILLED = 0.8  # fraction of a node's memory for indexes; the rest is for the process, vectors being read, and pages


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


class CapacityPlan(BaseModel):
    """Estimated needs of an index of `rows` rows. Sizes are in bytes, times in seconds on a machine like this one."""

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
    rates = rates.model_copy(update={"choose": chose})
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
    in_memory = shards * expected_bytes(chosen.key, math.ceil(rows / shards), rates.dimension)  # each has the centroids
    groups = max(math.ceil(in_memory / (FILLED * memory_per_node)), 1)
    assert chosen.quality is not None  # noqa: S101  # a chosen candidate was measured
    rate = groups / chosen.quality.seconds_in_batch
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
    held = min(rows, shard_rows)
    shard_bytes = expected_bytes(chosen.key, held, rates.dimension)
    training_bytes = 0 if chosen.key == FLAT else 3 * trained_on * 2 * rates.dimension
    chunk = ADD_ROWS * 4 * rates.dimension
    vectors = held * 2 * rates.dimension  # mapped, and read as a whole while a shard is populated and judged
    peak = PROCESS_BYTES + max(held * ENTRY_BYTES, training_bytes, vectors + shard_bytes + 2 * chunk)
    index_bytes = 0 if chosen.key == FLAT else in_memory
    return CapacityPlan(
        rows=rows,
        key=chosen.key,
        shards=shards,
        groups=groups,
        replicas=max(math.ceil(queries_per_second / rate), 1),
        bytes_in_memory=in_memory,
        bytes_on_disk=int(rows * rates.side_bytes_a_row) + index_bytes,
        build_seconds={stage: round(took, 2) for stage, took in seconds.items()},
        build_peak_bytes=int(peak),
        queries_per_second_a_node=rate,
        rates=rates,
    )


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
    began = time.perf_counter()
    judge = tune.RecallEvaluator(vectors_ND, tune.query_sample(vector_keys(vectors_ND), seed=0))
    judge_row = (time.perf_counter() - began) / rows
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
        began = time.perf_counter()
        index = train_index(with_lists(key, number), floats_ND[: max(POINTS_PER_CENTROID * number // 4, FEWEST_ROWS)])
        trains.append(time.perf_counter() - began)
        began = time.perf_counter()
        index.add(floats_ND)
        adds.append((time.perf_counter() - began) / rows)
        began = time.perf_counter()
        tune.cheapest_parameters(index, judge, 0.9, refined=True)
        tunes.append(time.perf_counter() - began)
    on_progress(Progress("timing", len(lists), len(lists)))
    few, many = lists
    if not num_centroids(key):
        return zero.model_copy(update={"train": trains[-1], "add_row": adds[-1], "tune": tunes[-1]})
    points = [max(POINTS_PER_CENTROID * number // 4, FEWEST_ROWS) * number for number in lists]
    train_row_list = max((trains[1] - trains[0]) / (points[1] - points[0]), 0.0)
    add_row_list = max((adds[1] - adds[0]) / (many - few), 0.0)
    return zero.model_copy(
        update={
            "train": max(trains[0] - train_row_list * points[0], 0.0),
            "train_row_list": train_row_list,
            "add_row": max(adds[0] - add_row_list * few, 0.0),
            "add_row_list": add_row_list,
            "tune": tunes[-1],
        }
    )

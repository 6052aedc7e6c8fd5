"""The time of a search, from its parts: measured one by one on a few vectors, added up for any number of shards.

A process finds the lists nearest to a query once, by comparing it with every centroid. It then scans the rows of these
lists: of all its shards at once if their lists can be merged, or of one shard after the other. The best candidates of
all are scored again from their vectors. So the parts of the time are

    a query in a process = query + coarse + shards x shard + stacks x lists probed x (list + its rows x row) + rescored

where all shards are one stack, or each is one. A list of a shard is short where there are many shards: at a billion
rows, 65,536 lists over 954 shards have 16 rows each. Then the fixed cost of a list matters most, so short and long
lists are timed.

Each time is that of one core, the least of several, because other programs can only make it longer.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import faiss
import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipeline.index.build import tune
from pipeline.index.build.distinct import vector_keys
from pipeline.index.build.key_candidates import ROW_NUMBER, num_centroids, num_lists, with_lists
from pipeline.index.build.train import train_index, train_on
from pipeline.index.search import parameters
from pipeline.index.search.ann import RERANK, ListFinder
from pipeline.index.search.blocks import Block
from pipeline.index.search.exact import similarities
from pipeline.index.search.live_entries import LiveEntries
from pipeline.index.search.merging import can_be_merged
from pipeline.index.search.quantizer import Quantizer
from pipeline.index.search.stack import Seat, Stack

REPEATS = 9
BATCH = 250  # queries at once
ALONE = 20  # queries, one by one
SHORT_LIST = 16  # rows
LARGER_THAN_CACHES = 64 << 20
FURTHER_ADDS = 4
FEW_PROBED, MANY_PROBED = 4, 32
GRAPH_TIMED_ON = 16_384  # centroids: a graph over them is built in a second
SEVERAL_SHARDS = 8  # searched together to time the overhead of one
FEWEST_RESCORED = 10  # candidates, in the timing of what a shard adds


class SearchTimes(BaseModel):
    """Seconds of one core for the parts of a search, a query."""

    model_config = ConfigDict(frozen=True)

    query: float
    coarse: float
    list: float
    row: float
    candidate: float
    shard: float

    def seconds(
        self, shards: int, rows_a_list: float, num_probed: int, rescored: int, *, is_merged: bool = False
    ) -> float:
        """Seconds a query in a process with some shards, of which each has `rows_a_list` rows in a list.

        `rescored` candidates of all shards are scored again.
        """
        lists = 1 if is_merged else shards
        scanning = num_probed * (lists * self.list + shards * max(rows_a_list, 1.0) * self.row)
        return self.query + self.coarse + shards * self.shard + scanning + rescored * self.candidate


class SearchRates(BaseModel):
    """The search of an inverted file with `lists` lists over all shards: its parameters and its times.

    `num_probed` lists are searched for a query, and a process scores `rescored` candidates again. `is_merged`: the
    shards of a process have their lists together.
    """

    model_config = ConfigDict(frozen=True)

    lists: int
    num_probed: int
    rescored: int
    in_batch: SearchTimes
    alone: SearchTimes
    is_merged: bool = False

    def seconds(self, rows: int, shards: int, shards_here: int, *, alone: bool = False) -> float:
        """Seconds of a core for a query in a process that holds `shards_here` of the `shards` shards of `rows` rows."""
        times = self.alone if alone else self.in_batch
        rows_a_list = rows / shards / self.lists
        return times.seconds(shards_here, rows_a_list, self.num_probed, self.rescored, is_merged=self.is_merged)


def measure_search(key: str, vectors_ND: np.ndarray, rows: int, target_recall: float) -> SearchRates | None:
    """Measure the search of a key for `rows` rows on some of them (float16 [N, D]); None for a key without lists.

    The lists to probe are those that reach the recall on these vectors alone, in as many lists as suit them. The number
    hardly changes with the rows if lists grow with their root: on two synthetic sets, 16 to 14 and 32 to 16 lists were
    needed for recall .95 from 8,192 to 524,288 rows. Writes nothing.
    """
    lists = num_centroids(key)
    if not lists:
        return None
    few = min(num_lists(len(vectors_ND)), lists)
    floats_ND = np.ascontiguousarray(vectors_ND, np.float32)
    small = with_lists(key, few)
    long = train_index(small, train_on(small, vectors_ND), roughly=True)
    short = faiss.clone_index(long)
    long.add(floats_ND)
    short.add(floats_ND[: SHORT_LIST * few])
    keys_N = vector_keys(vectors_ND)
    judge = tune.RecallEvaluator(vectors_ND, tune.query_sample(keys_N, seed=0)[:BATCH], rows, keys_N)
    values = tune.cheapest_parameters(long, judge, target_recall, refined=True) or parameters.widest(long)
    probed = min(max(round(values.get("nprobe", 1) * lists / num_lists(rows)), 1), lists)
    rescored = tune.NEIGHBORS_TUNED if parameters.keeps_vectors(long) else values.get("rerank", RERANK)
    queries_QD = np.ascontiguousarray(floats_ND[-BATCH:])
    for _ in range(FURTHER_ADDS):  # lists larger than the caches of a core, as those of a real index are
        if long.ntotal * (int(faiss.extract_index_ivf(long).code_size) + ROW_NUMBER) < LARGER_THAN_CACHES:
            long.add(floats_ND)
    threads = faiss.omp_get_max_threads()
    centroids = _centroids(key, lists, floats_ND, int(faiss.extract_index_ivf(long).d))
    timed = _Timed(long, short, centroids, vectors_ND)
    faiss.omp_set_num_threads(1)  # threads that wait for one another make times vary
    try:
        in_batch, alone = (_times(timed, queries_QD, step, values, probed, rescored) for step in (len(queries_QD), 1))
    finally:
        faiss.omp_set_num_threads(threads)
    is_merged = can_be_merged(long, Quantizer(long))
    return SearchRates(
        lists=lists, num_probed=probed, rescored=rescored, in_batch=in_batch, alone=alone, is_merged=is_merged
    )


@dataclass(frozen=True)
class _Timed:
    """What is searched for the times: an index of long lists, one of short lists, a quantizer, vectors (float16)."""

    long: faiss.Index
    short: faiss.Index
    centroids: faiss.Index
    vectors_ND: np.ndarray


def _times(
    timed: _Timed,
    queries_QD: np.ndarray,
    step: int,
    values: dict[str, int],
    probed: int,
    rescored: int,
) -> SearchTimes:
    """The parts of a search of `step` queries at once."""
    long, short, centroids, vectors_ND = timed.long, timed.short, timed.centroids, timed.vectors_ND
    queries_QD = queries_QD if step > 1 else queries_QD[:ALONE]
    width = max(rescored, FEWEST_RESCORED)
    inverted = faiss.extract_index_ivf(long)
    num_lists = int(inverted.nlist)
    few, many = min(FEW_PROBED, num_lists), min(MANY_PROBED, num_lists)

    def scan(index: faiss.Index, lists: int) -> float:
        params = parameters.search_parameters(index, values | {"nprobe": lists}, None)
        return _least(lambda some_QD: index.search(some_QD, width, params=params), queries_QD, step)

    of_long, of_short = ((scan(index, many) - scan(index, few)) / max(many - few, 1) for index in (long, short))
    rows_long, rows_short = (faiss.extract_index_ivf(index).ntotal / num_lists for index in (long, short))
    row = max(of_long - of_short, 0.0) / max(rows_long - rows_short, 1.0)
    one_list = max(of_short - rows_short * row, 0.0)
    width_of_lists = min(probed, centroids.ntotal)
    coarse = _least(lambda some_QD: centroids.search(_as_wide(some_QD, centroids.d), width_of_lists), queries_QD, step)
    if not isinstance(faiss.downcast_index(centroids), faiss.IndexFlat):
        coarse *= math.log(max(inverted.nlist, 2)) / math.log(max(centroids.ntotal, 2))
    one, several = (
        _least(partial(_shards_of(short, vectors_ND, values, number).search, k=FEWEST_RESCORED), queries_QD, step)
        for number in (1, SEVERAL_SHARDS)
    )
    found_QK = np.random.default_rng(0).integers(0, len(vectors_ND), (len(queries_QD), width))
    candidate = _least(lambda some_QD: similarities(some_QD, vectors_ND, found_QK[: len(some_QD)]), queries_QD, step)
    shard = max(several - one, 0.0) / (SEVERAL_SHARDS - 1)
    return SearchTimes(
        query=max(one - shard, 0.0),
        coarse=coarse,
        list=one_list,
        row=row,
        candidate=candidate / width,
        shard=shard,
    )


def _shards_of(index: faiss.Index, vectors_ND: np.ndarray, values: dict[str, int], number: int) -> LiveEntries:
    """Some shards that all have one index, to be searched as those of a memory: one list, the fewest candidates."""
    rows = int(index.ntotal)
    values = values | {"nprobe": 1, "rerank": FEWEST_RESCORED}
    quantizer = Quantizer(index)
    if can_be_merged(index, quantizer):
        stack = Stack(index, quantizer, [rows] * number)
        seats = [Seat(stack, member) for member in range(number)]
    else:
        seats = [Seat(Stack(index, quantizer, [rows])) for _ in range(number)]
    finders = [ListFinder(seat, values, np.arange(rows), vectors_ND[:rows]) for seat in seats]
    nothing = pa.chunked_array([pa.nulls(rows, pa.string())])
    blocks = [
        Block(
            ids_N=np.arange(rows) + number * rows,
            codes_N=np.full(rows, -1, np.int32),
            vectors_ND=vectors_ND[:rows],
            live_N=np.ones(rows, bool),
            uris=nothing,
            datasets=nothing,
            make_finder=lambda rows_N, number=number: finders[number],  # noqa: ARG005  # all rows
        )
        for number in range(number)
    ]
    return LiveEntries(vectors_ND.shape[1], (), blocks, number)


def _least(search: Callable[[np.ndarray], object], queries_QD: np.ndarray, step: int) -> float:
    """Seconds a query, the least of several rounds over the queries, `step` at once. The first round warms up."""
    rounds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        for start in range(0, len(queries_QD), step):
            search(queries_QD[start : start + step])
        rounds.append(time.perf_counter() - began)
    return min(rounds[1:]) / len(queries_QD)


def _centroids(key: str, lists: int, floats_ND: np.ndarray, dimension: int) -> faiss.Index:
    """A quantizer as large as that of the key. The time of its search does not depend on where its centroids are."""
    if f"IVF{lists}_HNSW" in key:
        centroids = faiss.IndexHNSWFlat(dimension, 32, faiss.METRIC_INNER_PRODUCT)
        lists = min(lists, GRAPH_TIMED_ON)
    else:
        centroids = faiss.IndexFlatIP(dimension)
    centroids.add(_as_wide(np.resize(floats_ND, (lists, floats_ND.shape[1])), dimension))
    return centroids


def _as_wide(vectors_ND: np.ndarray, dimension: int) -> np.ndarray:
    """Vectors with so many dimensions, for a key that projects them first."""
    if vectors_ND.shape[1] != dimension:
        vectors_ND = np.resize(vectors_ND, (len(vectors_ND), dimension))
    return np.ascontiguousarray(vectors_ND)

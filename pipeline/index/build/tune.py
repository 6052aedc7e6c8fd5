"""Search parameters: the least work that reaches a recall, measured against exact search.

autofaiss's tuner finds the best recall within a time a query; it knows no recall to aim at. So the least work that
reaches the target is looked for first, by measuring, and the tuner is told the time that takes. Where it knows the kind
of index, what it finds is used if it reaches the target too: it balances several parameters at once.
"""

import logging
import math
import time
from dataclasses import dataclass

import faiss
import numpy as np
from autofaiss.external.optimize import get_optimal_hyperparameters

from pipeline.index.build.distinct import vector_keys
from pipeline.index.search import parameters
from pipeline.index.search.ann import RERANK, ApproximateFinder
from pipeline.index.search.blocks import Candidates
from pipeline.index.search.exact import ExactFinder, similarities
from pipeline.store.log.records import Quality

NEIGHBORS_TUNED = 10
RECALLED_AT_MOST = 100
MAX_QUERIES = 1_000
MOST_COPIES = 16  # of a vector that is asked about: it is looked for past them
TUNING_QUERIES = 250  # of them, with which parameters are looked for; all then say what these reach
TIMED_QUERIES = 100
TIMED_BATCHES = 3
RERANKS = (50, 100, 200, 400, 800)
TIE = 1e-6  # between similarities that are the same but for the order in which float32 products were added up
TUNER_MAY_TAKE = 1.25  # times what the least work takes, so that the noise of timing does not decide


@dataclass(frozen=True)
class Tuned:
    """Parameters, and who found them: "autofaiss" or "measured"."""

    values: dict[str, int]
    by: str


class RecallEvaluator:
    """Exact answers for some stored rows, by which any index over the same rows is judged.

    Each query looks for its nearest other rows, so that finding itself, or a copy of itself, earns nothing.
    `vectors_ND` is float16 [N, D]; `keys_N` are its `vector_keys`, where they are known.
    Where they are a sample of `rows` rows, parameters are looked for by as many neighbours, and as many candidates
    scored again, as a sample holds of those of the whole: else codes that are too coarse for the whole seem to do.
    """

    def __init__(
        self,
        vectors_ND: np.ndarray,
        query_rows: np.ndarray,
        rows: int | None = None,
        keys_N: np.ndarray | None = None,
    ) -> None:
        self.vectors_ND = vectors_ND
        self._keys_N = vector_keys(vectors_ND) if keys_N is None else keys_N
        share = len(vectors_ND) / (rows or len(vectors_ND))
        self._k_tuned = max(round(NEIGHBORS_TUNED * min(share, 1.0)), 1)
        self._rows_N = np.arange(len(vectors_ND))
        self._query_rows = query_rows
        self._queries_QD = np.ascontiguousarray(vectors_ND[query_rows], np.float32)
        self._most = min(RECALLED_AT_MOST, len(vectors_ND) - 1)
        self._copies = min(int(_numbers(self._keys_N, query_rows).max(initial=1)), MOST_COPIES)  # the query with them
        exact = ExactFinder(vectors_ND, self._rows_N)
        self._exact_QK = self._others(exact.find(self._queries_QD, self._most + self._copies), self._most)

    def recall(
        self, index: faiss.Index, values: dict[str, int], k: int, *, refined: bool, queries: int = MAX_QUERIES
    ) -> float:
        """recall@k with these parameters, of the first so many queries; with candidates scored again if `refined`."""
        k = min(k, self._most)
        if not k:
            return 1.0
        return self._recall(self._finder(index, values, refined), k, min(queries, len(self._query_rows)))

    def _recall(self, finder: ApproximateFinder, k: int, queries: int) -> float:
        found_QK = self._others(finder.find(self._queries_QD[:queries], k + self._copies), k)
        return self._share(found_QK)

    def _share(self, found_QK: np.ndarray) -> float:
        """recall@K of these similarities, descending, of the first queries."""
        queries, k = found_QK.shape
        exact_QK = self._exact_QK[:queries, :k]
        last_Q1 = exact_QK[:, -1:]
        # A row whose similarity equals the k-th exact one is as right as the one exact search happened to take, but it
        # makes up for none that is nearer: of ten copies all ten are found where one is.
        nearer_Q = (exact_QK > last_Q1 + TIE).sum(axis=1)
        found_nearer_Q = np.minimum((found_QK > last_Q1 + TIE).sum(axis=1), nearer_Q)
        found_equal_Q = np.minimum((found_QK >= last_Q1 - TIE).sum(axis=1) - found_nearer_Q, k - nearer_Q)
        return float((found_nearer_Q + found_equal_Q).mean() / k)

    def reaches(self, index: faiss.Index, values: dict[str, int], target: float, *, refined: bool) -> bool:
        """Whether the tuning queries have the target recall@10 with these parameters."""
        k = self._k_tuned
        if self.recall(index, values, NEIGHBORS_TUNED, refined=refined, queries=TUNING_QUERIES) < target:
            return False
        if k == NEIGHBORS_TUNED:
            return True
        thinned = values | {"rerank": values.get("rerank", RERANK) * k // NEIGHBORS_TUNED + self._copies}
        vectors_ND = self.vectors_ND if refined else None
        finder = ApproximateFinder(index, thinned, self._rows_N, vectors_ND, margin=0)
        return self._recall(finder, k, min(TUNING_QUERIES, len(self._query_rows))) >= target

    def seconds_in_batch(self, index: faiss.Index, values: dict[str, int], *, refined: bool) -> float:
        """Seconds of a query among many at once."""
        finder = self._finder(index, values, refined)
        queries = self._queries_QD[:TUNING_QUERIES]
        finder.find(queries, NEIGHBORS_TUNED)  # the first one warms up
        batches = []
        for _ in range(TIMED_BATCHES):
            began = time.perf_counter()
            finder.find(queries, NEIGHBORS_TUNED)
            batches.append(time.perf_counter() - began)
        return min(batches) / len(queries)

    def seconds_alone(self, index: faiss.Index, values: dict[str, int], *, refined: bool) -> float:
        """Seconds of a query alone, the median."""
        finder = self._finder(index, values, refined)
        queries = self._queries_QD[:TIMED_QUERIES]
        alone = []
        for row in range(len(queries)):
            began = time.perf_counter()
            finder.find(queries[row : row + 1], NEIGHBORS_TUNED)
            alone.append(time.perf_counter() - began)
        return float(np.median(alone))

    def quality(
        self, index: faiss.Index, values: dict[str, int], *, refined: bool, recall_at_10: float | None = None
    ) -> Quality:
        """Recalls, those known already not measured again, and latency of an index."""
        at_10 = self.recall(index, values, 10, refined=refined) if recall_at_10 is None else recall_at_10
        at_1, at_100 = (self.recall(index, values, k, refined=refined) for k in (1, RECALLED_AT_MOST))
        together = self.seconds_in_batch(index, values, refined=refined)
        alone = self.seconds_alone(index, values, refined=refined)
        return Quality.measured(at_1, at_10, at_100, alone, together)

    def _finder(self, index: faiss.Index, values: dict[str, int], refined: bool) -> ApproximateFinder:
        return ApproximateFinder(index, values, self._rows_N, self.vectors_ND if refined else None)

    def _others(self, found: Candidates, k: int) -> np.ndarray:
        """Similarities of the k nearest of the rows found that are not the query itself, descending [Q, k]."""
        queries = len(found.rows_QK)
        similarities_QK = found.similarities_QK
        if not math.isfinite(found.error):  # they are those of codes
            similarities_QK = similarities(self._queries_QD[:queries], self.vectors_ND, found.rows_QK)
        itself_QK = self._keys_N[found.rows_QK] == self._keys_N[self._query_rows[:queries, None]]
        return -np.sort(np.where(itself_QK, np.inf, -similarities_QK), axis=1)[:, :k]


def cheapest_parameters(
    index: faiss.Index, judge: RecallEvaluator, target: float, *, refined: bool
) -> dict[str, int] | None:
    """The parameters with which a query takes least time of those that reach the target; None where none do."""
    reranks = RERANKS if refined and not parameters.keeps_vectors(index) else (None,)
    best: tuple[float, dict[str, int]] | None = None
    values: dict[str, int] | None = None
    for rerank in reranks:
        others = {} if rerank is None else {"rerank": rerank}
        values = _narrowest(index, judge, target, others, enough=values, refined=refined)
        if values is None:
            continue
        seconds = judge.seconds_in_batch(index, values, refined=refined)
        if best is not None and seconds > best[0]:
            break  # more candidates only take longer from here on
        best = (seconds, values)
    return best[1] if best else None


def tune_index(
    index: faiss.Index, key: str, judge: RecallEvaluator, target: float, max_latency_ms: float, *, refined: bool
) -> Tuned | None:
    """Parameters that reach the target, within the latency where that can be; None where nothing reaches it.

    autofaiss sets parameters on the index while it tries them, so `index` must not be in use elsewhere.
    """
    values = cheapest_parameters(index, judge, target, refined=refined)
    if values is None:
        return None
    alone_ms = judge.seconds_alone(index, values, refined=refined) * 1e3
    found = autofaiss_parameters(index, key, min(TUNER_MAY_TAKE * alone_ms, max_latency_ms))
    if found is not None:
        found |= {"rerank": values["rerank"]} if "rerank" in values else {}
        if judge.reaches(index, found, target, refined=refined):
            return Tuned(found, "autofaiss")
    return Tuned(values, "measured")


def autofaiss_parameters(index: faiss.Index, key: str, max_latency_ms: float) -> dict[str, int] | None:
    """What autofaiss's tuner finds for a latency; None for kinds that it has no heuristics for."""
    if "_HNSW" in key and "OPQ" not in key:
        return None  # it takes IVFn_HNSWm for a plain HNSW and sets no nprobe
    level = logging.getLogger("autofaiss").level
    logging.getLogger("autofaiss").setLevel(logging.ERROR)
    try:
        return parameters.parse(get_optimal_hyperparameters(index, key, max_speed_ms=max_latency_ms))
    except NotImplementedError:
        return None
    finally:
        logging.getLogger("autofaiss").setLevel(level)


def query_sample(keys_N: np.ndarray, seed: int, held_out: np.ndarray | None = None) -> np.ndarray:
    """Rows to measure recall with, no two of one vector: all of a small shard, a fixed random sample of a large one.

    `keys_N` are the `vector_keys` of the rows. `held_out` bool [N] says which the index was not trained on; others are
    taken only where these are too few. So are vectors of very many copies, the nearest others of which lie behind them.
    """
    _, first, places, numbers = np.unique(keys_N, return_index=True, return_inverse=True, return_counts=True)
    fewest = int(numbers.min()) if len(numbers) else 0
    usable = numbers <= max(MOST_COPIES, fewest)
    rows = np.sort(first[usable])
    if len(rows) <= MAX_QUERIES:
        return np.random.default_rng(seed).permutation(rows)
    if held_out is not None:
        unseen = np.bincount(places, ~held_out, len(first)) == 0
        if (unseen & usable).sum() >= MAX_QUERIES:
            rows = np.sort(first[unseen & usable])
    return np.random.default_rng(seed).choice(rows, MAX_QUERIES, replace=False)


def _numbers(keys_N: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How many rows hold the vector of each of some rows, int64."""
    distinct, numbers = np.unique(keys_N, return_counts=True)
    found: np.ndarray = numbers[np.searchsorted(distinct, keys_N[rows])]
    return found


def _narrowest(
    index: faiss.Index,
    judge: RecallEvaluator,
    target: float,
    others: dict[str, int],
    *,
    enough: dict[str, int] | None,
    refined: bool,
) -> dict[str, int] | None:
    """The smallest value of the parameter that trades speed for recall, to an eighth, that reaches the target.

    `enough` are values known to reach it with others that find less.
    """

    def reached(values: dict[str, int]) -> bool:
        return judge.reaches(index, values | others, target, refined=refined)

    limits = parameters.widest(index)
    values: dict[str, int] | None = {name: enough[name] if enough else 1 for name in limits}
    while values is not None and not enough and not reached(values):
        values = parameters.widen(index, values)
    if values is None:
        return None
    for name in limits:
        high = values[name]
        while enough and high > 1 and reached({name: high // 2}):
            high //= 2
        low = high // 2
        while high - low > max(high // 8, 1):
            middle = (low + high) // 2
            low, high = (low, middle) if reached({name: middle}) else (middle, high)
        values[name] = high
    return values | others

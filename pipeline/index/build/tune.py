"""Search parameters: the least work that reaches a recall, measured against exact search.

autofaiss's tuner finds the best recall within a time per query. It cannot aim at a recall. So this module first
measures the least work that reaches the target, and gives the time of this work to the tuner. If the tuner supports
the kind of index and its result also reaches the target, that result is used: the tuner balances several parameters at
once.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import faiss
import numpy as np

from pipeline.index.build.distinct import vector_keys
from pipeline.index.search import parameters
from pipeline.index.search.ann import MARGIN, RERANK, approximate_finder
from pipeline.index.search.blocks import Candidates
from pipeline.index.search.exact import ExactFinder, similarities
from pipeline.store.log.records import Quality

NEIGHBORS_TUNED = 10
RECALLED_AT_MOST = 100
MAX_QUERIES = 1_000
MOST_COPIES = 16  # copies of a query; the search asks for so many more rows
TUNING_QUERIES = 250  # queries to look for parameters with; the final recall is measured with all
TIMED_QUERIES = 100
TIMED_BATCHES = 3
RERANKS = (50, 100, 200, 400, 800)
TIE = 1e-6  # between similarities that differ only by the order of the float32 additions
TUNER_MAY_TAKE = 1.25  # times the time of the least work, so that the noise of timing does not decide


@dataclass(frozen=True)
class Tuned:
    """Search parameters, and how they were obtained: "autofaiss" or "measured"."""

    values: dict[str, int]
    by: str


class RecallEvaluator:
    """Exact answers for some stored rows, used to judge any index over the same rows.

    Each query looks for its nearest other rows, so finding itself or a copy of itself does not count.
    `vectors_ND` is float16 [N, D]; `keys_N` are its `vector_keys`, if they are known.
    The vectors can be a sample of `rows` rows. Then parameters are tuned for fewer neighbours and fewer candidates
    scored again: the fraction of them that the sample holds. Otherwise codes that are too coarse for all rows would
    seem good enough.
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
        self._copies = min(int(_numbers(self._keys_N, query_rows).max(initial=1)), MOST_COPIES)  # with the query itself
        exact = ExactFinder(vectors_ND, self._rows_N)
        self._exact_QK = self._others(exact.find(self._queries_QD, self._most + self._copies), self._most)

    reranks: tuple[int, ...] = RERANKS

    def recall(
        self, index: faiss.Index, values: dict[str, int], k: int, *, refined: bool, queries: int = MAX_QUERIES
    ) -> float:
        """recall@k with these parameters, of the first `queries` queries. If `refined`, candidates are scored again."""
        k = min(k, self._most)
        if not k:
            return 1.0
        return self._fraction(self._found(index, values, k, queries, refined=refined))

    def _found(
        self, index: faiss.Index, values: dict[str, int], k: int, queries: int, *, refined: bool, margin: int = MARGIN
    ) -> np.ndarray:
        """Similarities of the k nearest rows that a search finds for the first queries, descending [Q, k]."""
        finder = approximate_finder(index, values, self._rows_N, self.vectors_ND if refined else None, margin)
        return self._others(finder.find(self._queries_QD[:queries], k + self._copies), k)

    def _fraction(self, found_QK: np.ndarray) -> float:
        """recall@K of the first queries, from the similarities of the rows found (descending)."""
        queries, k = found_QK.shape
        exact_QK = self._exact_QK[:queries, :k]
        last_Q1 = exact_QK[:, -1:]
        # A row whose similarity equals the k-th exact one is as right as the row that exact search returned. But it
        # does not make up for a nearer row that is missing: if one of ten copies is found, all ten are found.
        nearer_Q = (exact_QK > last_Q1 + TIE).sum(axis=1)
        found_nearer_Q = np.minimum((found_QK > last_Q1 + TIE).sum(axis=1), nearer_Q)
        found_equal_Q = np.minimum((found_QK >= last_Q1 - TIE).sum(axis=1) - found_nearer_Q, k - nearer_Q)
        return float((found_nearer_Q + found_equal_Q).mean() / k)

    def reaches(self, index: faiss.Index, values: dict[str, int], target: float, *, refined: bool) -> bool:
        """Whether the tuning queries reach the target recall@10 with these parameters."""
        k = self._k_tuned
        if self.recall(index, values, NEIGHBORS_TUNED, refined=refined, queries=TUNING_QUERIES) < target:
            return False
        if k == NEIGHBORS_TUNED:
            return True
        thinned = values | {"rerank": values.get("rerank", RERANK) * k // NEIGHBORS_TUNED + self._copies}
        return self._fraction(self._found(index, thinned, k, TUNING_QUERIES, refined=refined, margin=0)) >= target

    def seconds_in_batch(self, index: faiss.Index, values: dict[str, int], *, refined: bool) -> float:
        """Seconds per query in a batch of many."""
        find = self._search(index, values, refined)
        queries = self._queries_QD[:TUNING_QUERIES]
        find(queries)  # a warm-up
        batches = []
        for _ in range(TIMED_BATCHES):
            began = time.perf_counter()
            find(queries)
            batches.append(time.perf_counter() - began)
        return min(batches) / len(queries)

    def seconds_alone(self, index: faiss.Index, values: dict[str, int], *, refined: bool) -> float:
        """Seconds of a single query (median)."""
        find = self._search(index, values, refined)
        queries = self._queries_QD[:TIMED_QUERIES]
        alone = []
        for row in range(len(queries)):
            began = time.perf_counter()
            find(queries[row : row + 1])
            alone.append(time.perf_counter() - began)
        return float(np.median(alone))

    def quality(
        self, index: faiss.Index, values: dict[str, int], *, refined: bool, recall_at_10: float | None = None
    ) -> Quality:
        """Recalls and latency of an index. `recall_at_10` is not measured again if it is given."""
        at_10 = self.recall(index, values, 10, refined=refined) if recall_at_10 is None else recall_at_10
        at_1, at_100 = (self.recall(index, values, k, refined=refined) for k in (1, RECALLED_AT_MOST))
        together = self.seconds_in_batch(index, values, refined=refined)
        alone = self.seconds_alone(index, values, refined=refined)
        return Quality.measured(at_1, at_10, at_100, alone, together)

    def _search(self, index: faiss.Index, values: dict[str, int], refined: bool) -> Callable[[np.ndarray], np.ndarray]:
        """A search as a memory does it, to be timed: similarities of the candidates of some queries."""
        finder = approximate_finder(index, values, self._rows_N, self.vectors_ND if refined else None)

        def find(queries_QD: np.ndarray) -> np.ndarray:
            found = finder.find(queries_QD, NEIGHBORS_TUNED)
            if refined and not math.isfinite(found.error):
                return similarities(queries_QD, self.vectors_ND, found.rows_QK)
            return found.similarities_QK

        return find

    def _others(self, found: Candidates, k: int) -> np.ndarray:
        """Similarities of the k nearest rows found, without the query itself and its copies, descending [Q, k]."""
        queries = len(found.rows_QK)
        similarities_QK = found.similarities_QK
        if not math.isfinite(found.error):  # they come from codes
            similarities_QK = similarities(self._queries_QD[:queries], self.vectors_ND, found.rows_QK)
        itself_QK = self._keys_N[found.rows_QK] == self._keys_N[self._query_rows[:queries, None]]
        return -np.sort(np.where(itself_QK, np.inf, -similarities_QK), axis=1)[:, :k]


def cheapest_parameters(
    index: faiss.Index, judge: RecallEvaluator, target: float, *, refined: bool
) -> dict[str, int] | None:
    """Of the parameters that reach the target, those with the least time per query; None if none reach it."""
    reranks = judge.reranks if refined and not parameters.keeps_vectors(index) else (None,)
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
    index: faiss.Index,
    key: str,
    judge: RecallEvaluator,
    target: float,
    max_latency_ms: float,
    *,
    refined: bool,
    by_tuner: bool = True,
) -> Tuned | None:
    """Parameters that reach the target, within the latency if possible; None if nothing reaches the target.

    autofaiss is asked only if `by_tuner`: it times one index, which several shards are not. It sets parameters on the
    index while it tries them, so `index` must not be in use elsewhere.
    """
    values = cheapest_parameters(index, judge, target, refined=refined)
    if values is None:
        return None
    if not by_tuner:
        return Tuned(values, "measured")
    alone_ms = judge.seconds_alone(index, values, refined=refined) * 1e3
    found = autofaiss_parameters(index, key, min(TUNER_MAY_TAKE * alone_ms, max_latency_ms))
    if found is not None:
        found |= {"rerank": values["rerank"]} if "rerank" in values else {}
        if judge.reaches(index, found, target, refined=refined):
            return Tuned(found, "autofaiss")
    return Tuned(values, "measured")


def autofaiss_parameters(index: faiss.Index, key: str, max_latency_ms: float) -> dict[str, int] | None:
    """The parameters that autofaiss's tuner finds for a latency; None for kinds without heuristics."""
    if "_HNSW" in key and "OPQ" not in key:
        return None  # it mistakes IVFn_HNSWm for a plain HNSW and sets no nprobe
    from autofaiss.external.optimize import get_optimal_hyperparameters  # imports pandas, which takes half a second

    level = logging.getLogger("autofaiss").level
    logging.getLogger("autofaiss").setLevel(logging.ERROR)
    try:
        return parameters.parse(get_optimal_hyperparameters(index, key, max_speed_ms=max_latency_ms))
    except NotImplementedError:
        return None
    finally:
        logging.getLogger("autofaiss").setLevel(level)


def query_sample(keys_N: np.ndarray, seed: int, held_out: np.ndarray | None = None) -> np.ndarray:
    """Rows to measure recall with, of distinct vectors: all of a small shard, a fixed random sample of a large one.

    `keys_N` are the `vector_keys` of the rows. `held_out` (bool [N]) marks the rows that the index was not trained on.
    Other rows are taken only if these are too few. Vectors with very many copies are taken only if no vector has fewer,
    because the nearest other vectors come after all the copies.
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
    """For each of the given rows, the number of rows with the same vector, int64."""
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
    """The smallest value (to an eighth) of the parameter that trades speed for recall, such that the target is reached.

    `enough` are values known to reach the target with other parameters in `others` that find less.
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

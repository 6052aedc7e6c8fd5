"""Search parameters for a latency, by autofaiss's tuner, and recall measured against exact search.

The tuner maximises recall at a latency; it does not know a target recall. So the recall it reaches is measured, and
where it is too low the search is widened until it is high enough.
"""

import logging

import faiss
import numpy as np
from autofaiss.external.optimize import (
    binary_search_on_param,
    get_min_param_value_for_best_neighbors_coverage,
    get_optimal_hyperparameters,
)

from pipeline.index import parameters
from pipeline.index.approximate import ApproximateFinder
from pipeline.index.exact import ExactFinder, similarities

NEIGHBORS_MEASURED = 10
MAX_QUERIES = 1_000


def tuned_parameters(index: faiss.Index, key: str, max_latency_ms: float) -> dict[str, int]:
    """Parameters that make the most of a latency a single query, as autofaiss finds them.

    The tuner sets parameters on the index while it tries them, so `index` must not be in use elsewhere.
    """
    if "_HNSW" in key and "OPQ" not in key:  # autofaiss takes IVFn_HNSWm for a plain HNSW and sets no nprobe
        return _tuned_beyond_heuristics(index, max_latency_ms)
    level = logging.getLogger("autofaiss").level
    logging.getLogger("autofaiss").setLevel(logging.ERROR)
    try:
        return parameters.parsed(get_optimal_hyperparameters(index, key, max_speed_ms=max_latency_ms))
    except NotImplementedError:
        return _tuned_beyond_heuristics(index, max_latency_ms)
    finally:
        logging.getLogger("autofaiss").setLevel(level)


def recall(index: faiss.Index, values: dict[str, int], vectors_ND: np.ndarray, query_rows: np.ndarray, k: int) -> float:
    """recall@k of approximate search with exact re-ranking, against exact search over the same rows.

    The queries are stored rows, each looking for its k nearest other rows, so that finding itself earns nothing.
    """
    if len(vectors_ND) < 2:
        return 1.0
    k = min(k, len(vectors_ND) - 1)
    rows_N = np.arange(len(vectors_ND))
    queries_QD = np.ascontiguousarray(vectors_ND[query_rows], np.float32)
    found = [
        _nearest_others(finder.find(queries_QD, k + 1).rows_QK, queries_QD, vectors_ND, query_rows, k)
        for finder in (ExactFinder(vectors_ND, rows_N), ApproximateFinder(index, values, rows_N))
    ]
    # A row whose similarity equals the k-th exact one is as right as the one exact search happened to take.
    exact_QK, approximate_QK = found
    return float((approximate_QK >= exact_QK[:, -1:]).mean())


def query_sample(num_rows: int, seed: int) -> np.ndarray:
    """Rows to measure recall with: all of a small shard, a fixed random sample of a large one."""
    if num_rows <= MAX_QUERIES:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, MAX_QUERIES, replace=False))


def _nearest_others(
    rows_QK: np.ndarray, queries_QD: np.ndarray, vectors_ND: np.ndarray, query_rows: np.ndarray, k: int
) -> np.ndarray:
    similarities_QK = similarities(queries_QD, vectors_ND, rows_QK)
    similarities_QK[rows_QK == query_rows[:, None]] = -np.inf
    return -np.sort(-similarities_QK, axis=1)[:, :k]


def _tuned_beyond_heuristics(index: faiss.Index, max_latency_ms: float) -> dict[str, int]:
    """The same search with the same pieces of autofaiss, for kinds of index its tuner has no heuristics for."""
    limits = parameters.widest(index)
    if not limits:
        return {}
    (name, limit), *_ = limits.items()
    candidates = list(range(1, limit + 1))

    def notation(value: int) -> str:
        return f"{name}={value}"

    least = get_min_param_value_for_best_neighbors_coverage(index, candidates, notation, NEIGHBORS_MEASURED)
    candidates = [value for value in candidates if value >= least] or [least]
    return {name: int(binary_search_on_param(index, candidates, max_latency_ms, notation, 6.0, False, 1.0))}

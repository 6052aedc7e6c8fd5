"""Candidates from a FAISS index, whose ids are the dense row numbers of a shard."""

import math

import faiss
import numpy as np

from pipeline.index import parameters
from pipeline.index.blocks import Candidates
from pipeline.index.exact import SLACK, product_error

# Candidates fetched for exact re-ranking from an index that keeps codes, as a multiple of k and at least. Fifty for
# k = 10 took a fast-scan PQ from .90 to .987 recall@10 on 300,000 vectors; more candidates cost a gather each.
RERANK_FACTOR = 4
RERANK_AT_LEAST = 100


class ApproximateFinder:
    """Finds candidates among the allowed rows of one FAISS index."""

    def __init__(self, index: faiss.Index, values: dict[str, int], rows_N: np.ndarray) -> None:
        self._index = index
        self._values = values
        self._keeps_vectors = parameters.keeps_vectors(index)
        self._num_allowed = len(rows_N)
        self._selector = None
        if self._num_allowed < index.ntotal:
            allowed = np.zeros(index.ntotal, bool)
            allowed[rows_N] = True
            self._bits = np.packbits(allowed, bitorder="little")  # the selector reads this buffer in place
            self._selector = faiss.IDSelectorBitmap(self._bits)

    def find(self, queries_QD: np.ndarray, k: int) -> Candidates:
        """Likely nearest rows of each query; fewer than k only where fewer rows are allowed.

        Where masked rows leave a query with fewer than k, it searches further, in the end through everything.
        """
        width = k + SLACK if self._keeps_vectors else max(k * RERANK_FACTOR, RERANK_AT_LEAST)
        width = min(width, self._num_allowed)
        if not width:
            return Candidates.none(len(queries_QD))
        similarities_QK, found_QK = self._search(queries_QD, width, self._values)
        wider = parameters.widened(self._index, self._values)
        while wider is not None:
            short = np.flatnonzero((found_QK[:, : min(k, width)] < 0).any(axis=1))
            if not len(short):
                break
            similarities_QK[short], found_QK[short] = self._search(queries_QD[short], width, wider)
            wider = parameters.widened(self._index, wider)
        similarities_QK[found_QK < 0] = -np.inf
        return Candidates(found_QK, similarities_QK, product_error(self._index.d) if self._keeps_vectors else math.inf)

    def _search(self, queries_QD: np.ndarray, width: int, values: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        params = parameters.search_parameters(self._index, values, self._selector)
        similarities_QK, found_QK = self._index.search(queries_QD, width, params=params)
        return similarities_QK, found_QK

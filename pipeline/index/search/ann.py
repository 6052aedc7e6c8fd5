"""Candidates from a FAISS index, whose ids are the dense row numbers of a shard.

An index of codes is searched for more candidates than requested. FAISS scores these again in the same call, from the
float16 vectors on disk.
"""

import math

import faiss
import numpy as np

from pipeline.deadline import is_watched, look
from pipeline.index.search import parameters
from pipeline.index.search.blocks import Candidates
from pipeline.index.search.exact import SLACK, ExactFinder, product_error

RERANK = 100  # scored again for k = 10 if the index does not say: recall .955 becomes .974 on 300,000
RERANK_FACTOR = 4  # further candidates for each neighbour beyond 10
MARGIN = 8  # candidates returned beyond k, for entries that a search leaves out and for ties
QUERIES_A_CORE = 8  # in one call of FAISS under a deadline: a call cannot be interrupted
EXACT_UP_TO = 8_192  # allowed rows: exact search is as fast as an index searched through a mask


class ApproximateFinder:
    """Finds candidates among the allowed rows of one FAISS index.

    `vectors_ND` (float16) are the vectors that the index was built from. Without them, candidates come from the codes.
    """

    def __init__(
        self,
        index: faiss.Index,
        values: dict[str, int],
        rows_N: np.ndarray,
        vectors_ND: np.ndarray | None,
        margin: int = MARGIN,
    ) -> None:
        self._index = index
        self._keeps_vectors = parameters.keeps_vectors(index)
        self._num_allowed = len(rows_N)
        self._rerank = values.get("rerank", RERANK)
        self._margin = margin
        share = self._num_allowed / max(index.ntotal, 1)
        self._values = parameters.for_share(index, values, share) if 0 < share < 1 else values
        self._refined = None if self._keeps_vectors or vectors_ND is None else Refined(index, vectors_ND)
        self._selector = None
        self._exact: ExactFinder | None = None
        if self._num_allowed < index.ntotal:
            allowed = np.zeros(index.ntotal, bool)
            allowed[rows_N] = True
            self._bits = np.packbits(allowed, bitorder="little")  # the selector reads this buffer in place
            self._selector = faiss.IDSelectorBitmap(self._bits)
            if vectors_ND is not None and self._num_allowed <= EXACT_UP_TO:
                self._exact = ExactFinder(vectors_ND, rows_N)

    def find(self, queries_QD: np.ndarray, k: int) -> Candidates:
        """Likely nearest rows of each query. There are fewer than k only if fewer rows are allowed.

        If masked rows leave a query with fewer than k, the search goes further, at last through the whole index.
        """
        if self._exact is not None:
            return self._exact.find(queries_QD, k)
        width = min(k + (SLACK if self._keeps_vectors else self._margin), self._num_allowed)
        if not width:
            return Candidates.none(len(queries_QD))
        similarities_QK, found_QK = self._search(queries_QD, width, self._values)
        wider = parameters.widen(self._index, self._values)
        while wider is not None:
            short = np.flatnonzero((found_QK[:, : min(k, width)] < 0).any(axis=1))
            if not len(short):
                break
            similarities_QK[short], found_QK[short] = self._search(queries_QD[short], width, wider)
            wider = parameters.widen(self._index, wider)
        similarities_QK[found_QK < 0] = -np.inf
        by_vectors = self._keeps_vectors or self._refined is not None
        return Candidates(found_QK, similarities_QK, product_error(self._index.d) if by_vectors else math.inf)

    def _search(self, queries_QD: np.ndarray, width: int, values: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        step = max(QUERIES_A_CORE * faiss.omp_get_max_threads(), 1) if is_watched() else max(len(queries_QD), 1)
        pieces = []
        for start in range(0, max(len(queries_QD), 1), step):
            look()
            pieces.append(self._searched(queries_QD[start : start + step], width, values))
        if len(pieces) == 1:
            return pieces[0]
        similarities_QK, found_QK = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
        return similarities_QK, found_QK

    def _searched(self, queries_QD: np.ndarray, width: int, values: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """The result of one call of FAISS. The call cannot be interrupted."""
        params = parameters.search_parameters(self._index, values, self._selector)
        if self._refined is None:
            similarities_QK, found_QK = self._index.search(queries_QD, width, params=params)
            return similarities_QK, found_QK
        candidates = self._rerank + RERANK_FACTOR * max(width - self._margin - 10, 0)
        return self._refined.search(queries_QD, width, min(max(candidates, width), self._num_allowed), params)


class Refined:
    """An index of codes whose candidates are scored again from the vectors (float16 [N, D]) that it was built from.

    FAISS reads the vectors in place, in memory or memory-mapped. Row numbers are the ids of both. An IDSelector must be
    part of the parameters of the index, which `search` takes as `params`. IndexRefine ignores a selector given outside
    of them.
    """

    def __init__(self, index: faiss.Index, vectors_ND: np.ndarray) -> None:
        self._bytes = vectors_ND.reshape(-1).view(np.uint8)  # must stay alive: FAISS has a bare pointer to it
        self._vectors = faiss.IndexScalarQuantizer(index.d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        self._vectors.codes = faiss.MaybeOwnedVectorUInt8.create_view(
            faiss.swig_ptr(self._bytes), self._bytes.size, self._vectors.codes.owner
        )
        self._vectors.ntotal = len(vectors_ND)
        self._both = faiss.IndexRefine(index, self._vectors)

    def search(
        self, queries_QD: np.ndarray, k: int, candidates: int, params: faiss.SearchParameters
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k of `candidates` candidates: float32 similarities and int64 rows [Q, K], -1 for none."""
        factor = (candidates + 0.5) / k  # FAISS takes the whole part of k * factor
        both = faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=params)
        similarities_QK, found_QK = self._both.search(queries_QD, k, params=both)
        return similarities_QK, found_QK

"""Candidates from a FAISS index, whose ids are the dense row numbers of a shard.

An index of codes is searched for more candidates than requested. The candidates of all shards are scored again in one
go, from the float16 vectors on disk (live_entries.py). How many a shard gives depends only on its parameters and on k.
So an answer does not depend on how shards are spread over processes.

The lists of an inverted file are found by the quantizer that it shares with the other shards of its generation
(quantizer.py), once for all of them.
"""

import math

import faiss
import numpy as np

from pipeline.deadline import look
from pipeline.index.search import parameters
from pipeline.index.search.blocks import Candidates
from pipeline.index.search.exact import SLACK, ExactFinder
from pipeline.index.search.quantizer import Coarse, Lists, Quantizer, pieces_of
from pipeline.index.search.rounding import product_error

RERANK = 100  # scored again for k = 10 if the index does not say: recall .955 becomes .974 on 300,000
RERANK_FACTOR = 4  # further candidates for each neighbour beyond 10, at most
RERANK_FOR = 10  # neighbours that `rerank` is given for
MARGIN = 8  # candidates returned beyond k, for entries that a search leaves out and for ties
EXACT_UP_TO = 8_192  # allowed rows: exact search is as fast as an index searched through a mask


class ApproximateFinder:
    """Finds candidates among the allowed rows of one FAISS index.

    `vectors_ND` (float16) are the vectors that the index was built from. Without them, similarities come from codes.
    `quantizer` is that of the generation. Without it, an inverted file is searched with its own.
    """

    def __init__(
        self,
        index: faiss.Index,
        values: dict[str, int],
        rows_N: np.ndarray,
        vectors_ND: np.ndarray | None,
        margin: int = MARGIN,
        quantizer: Quantizer | None = None,
    ) -> None:
        self._index = index
        inverted = faiss.try_extract_index_ivf(index)
        self._inverted = faiss.downcast_index(inverted) if inverted is not None else None
        self._quantizer = quantizer
        if self._inverted is not None and quantizer is None:
            self._quantizer = Quantizer(index)
        self._keeps_vectors = parameters.keeps_vectors(index)
        self._num_allowed = len(rows_N)
        self._rerank = values.get("rerank", RERANK)
        self._margin = margin
        share = self._num_allowed / max(index.ntotal, 1)
        self._values = parameters.for_share(index, values, share) if 0 < share < 1 else values
        self._is_rescored = self._inverted is not None and vectors_ND is not None and not self._keeps_vectors
        self._refined = None
        if vectors_ND is not None and not self._keeps_vectors and not self._is_rescored:
            self._refined = Refined(index, vectors_ND)
        self._selector = None
        self._exact: ExactFinder | None = None
        if self._num_allowed < index.ntotal:
            allowed = np.zeros(index.ntotal, bool)
            allowed[rows_N] = True
            self._bits = np.packbits(allowed, bitorder="little")  # the selector reads this buffer in place
            self._selector = faiss.IDSelectorBitmap(self._bits)
            if vectors_ND is not None and self._num_allowed <= EXACT_UP_TO:
                self._exact = ExactFinder(vectors_ND, rows_N)
        self._params: dict[tuple[tuple[str, int], ...], faiss.SearchParameters] = {}

    def find(self, queries_QD: np.ndarray, k: int, coarse: Coarse | None = None) -> Candidates:
        """Likely nearest rows of each query. There are fewer than k only if fewer rows are allowed.

        `coarse` has the lists that other shards found for the same queries. If masked rows leave a query with fewer
        than k, the search goes further, at last through the whole index.
        """
        if self._exact is not None:
            return self._exact.find(queries_QD, k)
        width = min(self._width(k), self._num_allowed)
        if not width:
            return Candidates.none(len(queries_QD))
        coarse = coarse or Coarse(queries_QD)
        similarities_QK, found_QK = self._search(queries_QD, width, self._values, coarse)
        values = self._values
        while (found_QK[:, min(k, width) - 1] < 0).any():  # FAISS gives what it found first
            wider = parameters.widen(self._index, values)
            if wider is None:
                break
            values = wider
            short = np.flatnonzero(found_QK[:, min(k, width) - 1] < 0)
            some_QD = queries_QD[short]
            similarities_QK[short], found_QK[short] = self._search(some_QD, width, values, Coarse(some_QD))
        similarities_QK[found_QK < 0] = -np.inf
        by_vectors = self._keeps_vectors or self._refined is not None
        return Candidates(found_QK, similarities_QK, product_error(self._index.d) if by_vectors else math.inf)

    def _width(self, k: int) -> int:
        """The number of candidates to return for k neighbours."""
        if self._keeps_vectors:
            return k + SLACK
        return max(rescored(self._rerank, k), k) if self._is_rescored else k + self._margin

    def _search(
        self, queries_QD: np.ndarray, width: int, values: dict[str, int], coarse: Coarse
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidates of the queries of `coarse`: float32 similarities and int64 rows [Q, width], -1 for none."""
        lists = None
        if self._quantizer is not None:
            num_lists = min(values.get("nprobe", 1), self._quantizer.num_lists)
            lists = coarse.lists(self._quantizer, num_lists, values.get("efSearch"))
        found = []
        for piece in pieces_of(len(queries_QD)):
            look()
            if lists is not None:
                found.append(self._in_lists(lists.of(piece), width, values))
            else:
                found.append(self._searched(queries_QD[piece], width, values))
        if len(found) == 1:
            return found[0]
        similarities_QK, found_QK = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return similarities_QK, found_QK

    def _in_lists(self, lists: Lists, width: int, values: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """The result of one call of FAISS over given lists. The call cannot be interrupted."""
        queries_QD, numbers_QP, centroids_QP = lists.queries_QD, lists.numbers_QP, lists.similarities_QP
        similarities_QK = np.empty((len(queries_QD), width), np.float32)
        found_QK = np.empty((len(queries_QD), width), np.int64)
        # `search_preassigned` of Python takes no parameters, and so neither a number of lists nor a selector.
        assert self._inverted is not None  # noqa: S101  # only an inverted file has a quantizer
        self._inverted.search_preassigned_c(
            len(queries_QD),
            faiss.swig_ptr(queries_QD),
            width,
            faiss.swig_ptr(numbers_QP),
            faiss.swig_ptr(centroids_QP),
            faiss.swig_ptr(similarities_QK),
            faiss.swig_ptr(found_QK),
            False,
            self._parameters(self._inverted, values | {"nprobe": numbers_QP.shape[1]}),
        )
        return similarities_QK, found_QK

    def _searched(self, queries_QD: np.ndarray, width: int, values: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """The result of one call of FAISS. The call cannot be interrupted."""
        params = self._parameters(self._index, values)
        if self._refined is None:
            similarities_QK, found_QK = self._index.search(queries_QD, width, params=params)
            return similarities_QK, found_QK
        candidates = self._rerank + RERANK_FACTOR * max(width - self._margin - RERANK_FOR, 0)
        return self._refined.search(queries_QD, width, min(max(candidates, width), self._num_allowed), params)

    def _parameters(self, index: faiss.Index, values: dict[str, int]) -> faiss.SearchParameters:
        """Parameters for one call. They are made once, because FAISS only reads them."""
        key = tuple(values.items())
        if key not in self._params:
            self._params[key] = parameters.search_parameters(index, values, self._selector)
        return self._params[key]


def rescored(rerank: int, k: int) -> int:
    """How many candidates a shard gives for k neighbours, if it gives `rerank` for up to ten.

    Beyond ten they grow with k, but by no more than RERANK_FACTOR for each neighbour.
    """
    beyond = max(k - RERANK_FOR, 0)
    return rerank + min(RERANK_FACTOR * beyond, math.ceil(rerank * beyond / RERANK_FOR))


class Refined:
    """A graph of codes whose candidates are scored again from the vectors (float16 [N, D]) that it was built from.

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

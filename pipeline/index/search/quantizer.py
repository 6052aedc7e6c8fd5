"""The coarse quantizer of a generation: kept once a process, and searched once for the queries of a call.

All shards of a generation were populated from one trained index, so the lists nearest to a query have the same numbers
in each of them. Shapes: Q queries, P lists, D dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import faiss
import numpy as np

from pipeline.deadline import is_watched, look
from pipeline.index.search.rounding import product_error

QUERIES_A_CORE = 8  # in one call of FAISS under a deadline: a call cannot be interrupted
SPARE_LISTS = 8  # beyond those asked for, so that lists about as near as the last one are told apart


@dataclass(frozen=True)
class Lists:
    """The lists to search: queries float32 [Q, D] as the lists see them, list numbers int64 and similarities [Q, P]."""

    queries_QD: np.ndarray
    numbers_QP: np.ndarray
    similarities_QP: np.ndarray

    def of(self, rows: slice | np.ndarray) -> "Lists":
        """The lists of some of the queries."""
        return Lists(self.queries_QD[rows], self.numbers_QP[rows], self.similarities_QP[rows])


class Quantizer:
    """The transformations and the centroids of a trained index."""

    def __init__(self, trained: faiss.Index) -> None:
        self._trained = trained  # owns all that the names below point to
        self.inverted = faiss.downcast_index(faiss.try_extract_index_ivf(trained))
        self.centroids = faiss.downcast_index(self.inverted.quantizer)
        self.num_lists = int(self.inverted.nlist)
        self.dimension = int(self.inverted.d)
        self.counts_similarities = bool(self.inverted.by_residual)

    @property
    def is_exact(self) -> bool:
        """Whether the nearest lists are found by comparing with every centroid."""
        return isinstance(self.centroids, faiss.IndexFlat)

    def give_to(self, index: faiss.Index) -> bool:
        """Let an inverted file of the generation use these centroids. Returns False if it has others and keeps them.

        Its own copy of the centroids is freed. This object must outlive the index. Raises ValueError if the index has
        no centroids and these do not fit.
        """
        inverted = faiss.downcast_index(faiss.try_extract_index_ivf(index))
        own = inverted.quantizer
        if own.ntotal and not _same_centroids(faiss.downcast_index(own), self.centroids):
            return False
        if (inverted.nlist, inverted.d) != (self.num_lists, self.dimension):
            raise ValueError(f"it has {inverted.nlist:,} lists and its quantizer {self.num_lists:,}")
        inverted.own_fields = False
        inverted.quantizer = self.centroids
        own.__swig_destroy__(own)  # `own.this.own(True)` would make SWIG 4.4 forget the class of the index
        return True

    def transform(self, queries_QD: np.ndarray) -> np.ndarray:
        """Queries as the lists see them, float32."""
        return transform(self._trained, queries_QD)

    def nearest(self, queries_QD: np.ndarray, num_lists: int, ef_search: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The nearest lists of transformed queries, the nearest first: their numbers and similarities [Q, P].

        A query's lists do not depend on the other queries of the call. FAISS adds up the products of few queries in
        another order than those of many. So where the border between the last list and the next is closer than the
        error of that, the lists are compared in float64.
        """
        params = None if self.is_exact or ef_search is None else faiss.SearchParametersHNSW(efSearch=ef_search)
        width = min(num_lists + SPARE_LISTS, self.num_lists) if self.is_exact else num_lists
        similarities_QP, numbers_QP = self.centroids.search(queries_QD, width, params=params)
        if self.is_exact and width > num_lists:
            gap_Q = similarities_QP[:, num_lists - 1] - similarities_QP[:, num_lists]
            unclear = np.flatnonzero(gap_Q <= 2 * product_error(self.dimension))
            if len(unclear):
                of_unclear = self._similarities(queries_QD[unclear], numbers_QP[unclear])
                order = np.lexsort((numbers_QP[unclear], -of_unclear), axis=-1)
                numbers_QP[unclear] = np.take_along_axis(numbers_QP[unclear], order, axis=1)
        numbers_QP = np.ascontiguousarray(numbers_QP[:, :num_lists])
        if self.counts_similarities:  # codes are of residuals, so similarities of rows count from those of lists
            return numbers_QP, self._similarities(queries_QD, numbers_QP).astype(np.float32)
        return numbers_QP, np.ascontiguousarray(similarities_QP[:, :num_lists])

    def _similarities(self, queries_QD: np.ndarray, numbers_QP: np.ndarray) -> np.ndarray:
        """Similarities of lists, float64 [Q, P]; -inf where the number is -1."""
        found = np.flatnonzero(numbers_QP.ravel() >= 0)
        result_QP = np.full(numbers_QP.shape, -np.inf)
        if len(found):
            centroids = self.centroids.reconstruct_batch(numbers_QP.ravel()[found]).astype(np.float64)
            asked = queries_QD[found // numbers_QP.shape[1]].astype(np.float64)
            result_QP.ravel()[found] = np.einsum("nd,nd->n", centroids, asked, optimize=False)
        return result_QP


class Coarse:
    """The queries of one call, and the lists nearest to them: found once for all shards that share a quantizer."""

    def __init__(self, queries_QD: np.ndarray) -> None:
        self._queries_QD = queries_QD
        self._found: dict[tuple[int, int, int | None], Lists] = {}

    def lists(self, quantizer: Quantizer, num_lists: int, ef_search: int | None) -> Lists:
        """The nearest lists of each query. Raises TooLate between pieces of the queries."""
        key = (id(quantizer), num_lists, ef_search)
        if key not in self._found:
            self._found[key] = self._nearest(quantizer, num_lists, ef_search)
        return self._found[key]

    def _nearest(self, quantizer: Quantizer, num_lists: int, ef_search: int | None) -> Lists:
        queries_QD = quantizer.transform(self._queries_QD)
        pieces = []
        for rows in pieces_of(len(queries_QD)):
            look()
            pieces.append(quantizer.nearest(queries_QD[rows], num_lists, ef_search))
        numbers_QP, similarities_QP = (
            (np.concatenate(arrays) for arrays in zip(*pieces, strict=True)) if len(pieces) > 1 else pieces[0]
        )
        return Lists(queries_QD, numbers_QP, similarities_QP)


def has_centroids(index: faiss.Index) -> bool:
    """Whether an inverted file has its own centroids."""
    return bool(faiss.try_extract_index_ivf(index).quantizer.ntotal)


@contextmanager
def without_centroids(index: faiss.Index) -> Iterator[None]:
    """In the block, an inverted file has an empty quantizer. Other kinds of index stay as they are."""
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is None:
        yield
        return
    centroids, empty = inverted.quantizer, faiss.IndexFlatIP(inverted.d)
    inverted.quantizer = empty
    try:
        yield
    finally:
        inverted.quantizer = centroids
        empty.__swig_destroy__(empty)  # the index owned it in between


def _same_centroids(one: faiss.Index, other: faiss.Index) -> bool:
    """Whether two quantizers have the same centroids in the same order, byte for byte."""
    ours, theirs = (faiss.downcast_index(getattr(each, "storage", each)) for each in (one, other))
    if not (isinstance(ours, faiss.IndexFlatCodes) and isinstance(theirs, faiss.IndexFlatCodes)):
        return False
    if (ours.ntotal, ours.code_size) != (theirs.ntotal, theirs.code_size):
        return False
    size = ours.ntotal * ours.code_size
    pair = (faiss.rev_swig_ptr(each.codes.data(), size) for each in (ours, theirs))
    return bool(np.array_equal(*pair))


def pieces_of(num_queries: int) -> list[slice]:
    """The queries of each call of FAISS: all of them, or few under a deadline."""
    if num_queries <= QUERIES_A_CORE or not is_watched():
        return [slice(0, num_queries)]
    step = QUERIES_A_CORE * max(faiss.omp_get_max_threads(), 1)
    return [slice(start, start + step) for start in range(0, num_queries, step)]


def transform(index: faiss.Index, vectors_ND: np.ndarray) -> np.ndarray:
    """Vectors (float32 [N, D]) after the transformations that come before the inverted lists of an index."""
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexPreTransform):
        for step in range(outer.chain.size()):
            vectors_ND = faiss.downcast_VectorTransform(outer.chain.at(step)).apply(vectors_ND)
    return vectors_ND

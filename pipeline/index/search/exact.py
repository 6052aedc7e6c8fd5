"""Exact nearest rows by inner product, over the vectors as stored.

Shapes: Q queries, N rows, D dimensions, K candidates. FAISS computes the products in float32. The rows returned always
include the true k best in float64, with ties and near-ties at the border.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import faiss
import numpy as np

from pipeline.index.search.blocks import Candidates
from pipeline.index.search.rounding import as_float32, product_error

if TYPE_CHECKING:
    from pipeline.index.search.quantizer import Coarse

CHUNK_ROWS = 65_536  # rows converted to float32 at a time: 335 MB at 1,280 dimensions
CACHED_ROWS = 65_536  # matrices of at most so many rows stay converted between calls
SLACK = 32  # extra candidates beyond k, so that the first search usually settles the border
GATHERED_BYTES = 16 << 20  # of float64 vectors gathered at a time for rescoring; so few stay near the cache


class ExactFinder:
    """Finds candidates among some rows of a float16 [N, D] matrix, in memory or memory-mapped."""

    def __init__(self, vectors_ND: np.ndarray, rows_N: np.ndarray) -> None:
        self._vectors_ND = vectors_ND
        self._rows_N = rows_N
        self._cached: np.ndarray | None = None
        self._error = product_error(vectors_ND.shape[1])

    def find(self, queries_QD: np.ndarray, k: int, coarse: "Coarse | None" = None) -> Candidates:  # noqa: ARG002
        """Rows that include the k best of each query. There are no lists, so `coarse` is not used."""
        num_rows = len(self._rows_N)
        width = min(num_rows, k + SLACK)
        if not num_rows:
            return Candidates.none(len(queries_QD))
        similarities_QK, found_QK = self._top(queries_QD, width)
        while width < num_rows:
            border_Q = similarities_QK[:, k - 1] - 2 * self._error
            unclear = np.flatnonzero(similarities_QK[:, -1] >= border_Q)
            if not len(unclear):
                break
            width = min(num_rows, width * 4)
            wider_similarities, wider_found = self._top(queries_QD[unclear], width)
            missing = ((0, 0), (0, width - found_QK.shape[1]))
            found_QK = np.pad(found_QK, missing, constant_values=-1)
            similarities_QK = np.pad(similarities_QK, missing, constant_values=-np.inf)
            found_QK[unclear], similarities_QK[unclear] = wider_found, wider_similarities
        return Candidates(np.where(found_QK >= 0, self._rows_N[found_QK], -1), similarities_QK, self._error)

    def _top(self, queries_QD: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        best_similarities = np.full((len(queries_QD), 0), -np.inf, np.float32)
        best_found = np.full((len(queries_QD), 0), -1, np.int64)
        for start, matrix in self._chunks():
            similarities, found = faiss.knn(
                queries_QD, matrix, min(width, len(matrix)), metric=faiss.METRIC_INNER_PRODUCT
            )
            best_similarities = np.concatenate([best_similarities, similarities], axis=1)
            best_found = np.concatenate([best_found, found + start], axis=1)
            if best_similarities.shape[1] > width:
                keep = np.argsort(-best_similarities, axis=1, kind="stable")[:, :width]
                best_similarities = np.take_along_axis(best_similarities, keep, axis=1)
                best_found = np.take_along_axis(best_found, keep, axis=1)
        return best_similarities, best_found

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        if len(self._rows_N) <= CACHED_ROWS:
            if self._cached is None:
                self._cached = self._converted(self._rows_N)
            yield 0, self._cached
            return
        for start in range(0, len(self._rows_N), CHUNK_ROWS):
            yield start, self._converted(self._rows_N[start : start + CHUNK_ROWS])

    def _converted(self, rows: np.ndarray) -> np.ndarray:
        contiguous = rows[-1] - rows[0] + 1 == len(rows)
        vectors = self._vectors_ND[rows[0] : rows[-1] + 1] if contiguous else self._vectors_ND[rows]
        return as_float32(vectors)


def similarities(queries_QD: np.ndarray, vectors_ND: np.ndarray, rows_QK: np.ndarray) -> np.ndarray:
    """Similarities of the given rows, as `similarities_together` computes them."""
    return similarities_together(queries_QD, [(vectors_ND, rows_QK)])


def similarities_together(queries_QD: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Similarities of rows of several matrices (float16 [N, D], and rows int64 [Q, K]) side by side, float32 [Q, K].

    They are computed in float64 from the stored float16 and rounded to float32. The value is -inf where the row is -1.
    The order of the sum does not depend on Q and K, so a query's similarities do not depend on the other queries of the
    call, nor on the other matrices.
    """
    most = GATHERED_BYTES // (8 * max(queries_QD.shape[1], 1))  # vectors gathered at a time
    pieces = [
        (vectors_ND, rows_QK[:, start : start + most])
        for vectors_ND, rows_QK in pairs
        for start in range(0, rows_QK.shape[1], most)
    ]
    if not pieces or not len(queries_QD):
        return np.empty((len(queries_QD), sum(rows_QK.shape[1] for _, rows_QK in pairs)), np.float32)
    if len(pieces) > 1 and sum(rows_QK.shape[1] for _, rows_QK in pieces) > most:
        return np.concatenate([similarities_together(queries_QD, [piece]) for piece in pieces], axis=1)
    width = sum(rows_QK.shape[1] for _, rows_QK in pieces)
    step = max(most // width, 1)
    result_QK = np.empty((len(queries_QD), width), np.float32)
    for start in range(0, len(queries_QD), step):
        some = [(vectors_ND, rows_QK[start : start + step]) for vectors_ND, rows_QK in pieces]
        result_QK[start : start + step] = _scored(queries_QD[start : start + step].astype(np.float64), some)
    return result_QK


def _scored(queries_QD: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Similarities of rows (float64 [Q, K]), -inf where the row is -1. All vectors are gathered at once."""
    rows_QK = np.concatenate([rows_QK for _, rows_QK in pairs], axis=1)
    gathered = np.empty((*rows_QK.shape, queries_QD.shape[1]), np.float16)
    end = 0
    for vectors_ND, some_QK in pairs:
        start, end = end, end + some_QK.shape[1]
        # A row of -1 takes the last row, and its similarity is replaced.
        gathered[:, start:end] = np.asarray(vectors_ND).take(some_QK, axis=0, mode="wrap")
    found_QK: np.ndarray = np.einsum("qkd,qd->qk", as_float32(gathered).astype(np.float64), queries_QD, optimize=False)
    found_QK[rows_QK < 0] = -np.inf
    return found_QK

"""Several blocks searched as one: their candidates, and the vectors of these.

A candidate is known by its number: each block has a range of numbers, and a row of it the first of these plus the row.

Shapes: Q queries, N rows, K candidates, B blocks, D dimensions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.deadline import look
from pipeline.decisions.rivals import Rivals, borders
from pipeline.index.search.ann import InLists, ListFinder, find_in_lists
from pipeline.index.search.blocks import Finder
from pipeline.index.search.exact import GATHERED_BYTES
from pipeline.index.search.quantizer import Coarse
from pipeline.index.search.rounding import as_float32

ROUNDING = 2.0**-23  # of similarities to float32, the type in which they are compared


@dataclass(frozen=True)
class Hits:
    """Candidates of several blocks: numbers int64 (-1: none), similarities float32 and what codes say float64 [Q, K].

    `starts_B` has the first number of each block. `errors_K` is by how much the similarities of a column may differ
    from the true ones; infinite if they were computed from codes. What codes say (decisions/rivals.py) is inf for
    candidates that were not found by a code.
    """

    starts_B: np.ndarray
    numbers_QK: np.ndarray
    similarities_QK: np.ndarray
    errors_K: np.ndarray
    by_code_QK: np.ndarray

    def taken(self, columns: np.ndarray) -> "Hits":
        """Those of some columns: of all queries (int64 [K]), or of each (int64 [Q, K])."""
        arrays = (self.numbers_QK, self.similarities_QK, self.by_code_QK)
        if columns.ndim == 1:
            numbers_QK, similarities_QK, by_code_QK = (array[:, columns] for array in arrays)
            errors = self.errors_K[columns]
        else:
            numbers_QK, similarities_QK, by_code_QK = (np.take_along_axis(a, columns, axis=1) for a in arrays)
            errors = np.full(columns.shape[1], math.inf)
        return Hits(self.starts_B, numbers_QK, similarities_QK, errors, by_code_QK)

    def without(self, left_out_QK: np.ndarray) -> "Hits":
        """Without some candidates. Columns that are empty then are left out."""
        numbers_QK = np.where(left_out_QK, -1, self.numbers_QK)
        similarities_QK = np.where(left_out_QK, np.float32(-np.inf), self.similarities_QK)
        hits = Hits(self.starts_B, numbers_QK, similarities_QK, self.errors_K, self.by_code_QK)
        columns = np.flatnonzero((numbers_QK >= 0).any(axis=0))
        return hits if len(columns) == numbers_QK.shape[1] else hits.taken(columns)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """The block of each candidate, and its row there, int64 [Q, K]; the row is -1 for none."""
        if not len(self.starts_B):
            return np.zeros(self.numbers_QK.shape, np.int64), self.numbers_QK
        order = np.argsort(self.starts_B, kind="stable")
        blocks_QK = order[np.searchsorted(self.starts_B[order], self.numbers_QK, side="right") - 1]
        rows_QK = self.numbers_QK - self.starts_B[blocks_QK]
        rows_QK[self.numbers_QK < 0] = -1
        return blocks_QK, rows_QK


def find_together(
    finders: Sequence[Finder], num_rows: Sequence[int], queries_QD: np.ndarray, k: int, coarse: Coarse
) -> tuple[Hits, Rivals | None]:
    """Candidates of all blocks, of which block i has `num_rows[i]` rows, for the k nearest of each query.

    Of those found in lists, the best over all blocks are candidates. The rivals say which they are, and what others to
    compare them with that are in another process; None if there are no lists.
    """
    in_lists = [i for i, finder in enumerate(finders) if isinstance(finder, ListFinder) and finder.exact is None]
    starts_B = np.empty(len(finders), np.int64)
    found: InLists | None = None
    pieces, end, rivals = [], 0, None
    if in_lists:
        found = find_in_lists([finders[i] for i in in_lists], queries_QD, k, coarse)  # type: ignore[misc]
        starts_B[in_lists] = found.starts
        end = max(start + num_rows[i] for start, i in zip(found.starts, in_lists, strict=True))
    for i in sorted({*range(len(finders))} - {*in_lists}):
        look()
        candidates = finders[i].find(queries_QD, k, coarse)
        starts_B[i], end = end, end + num_rows[i]
        numbers_QK = np.where(candidates.rows_QK >= 0, candidates.rows_QK + starts_B[i], -1)
        pieces.append((numbers_QK, candidates.similarities_QK, candidates.error, np.full(numbers_QK.shape, np.inf)))
    if found is not None:
        error, most = finders[in_lists[0]].error, found.most  # type: ignore[attr-defined]
        kept_QK = found.by_code_QK >= borders(found.by_code_QK, most, k, found.slack)[:, None]
        numbers_QK = np.where(kept_QK, found.numbers_QK, -1)
        pieces.append((numbers_QK, found.similarities_QK, error, found.by_code_QK))
        rivals = Rivals(np.empty((len(queries_QD), 0)), _best_of(found.by_code_QK, most), most, k, found.slack)
    none = np.empty((len(queries_QD), 0))
    numbers, similarities, by_code = (
        np.concatenate([none.astype(kind), *(piece[at] for piece in pieces)], axis=1, dtype=kind)
        for at, kind in ((0, np.int64), (1, np.float32), (3, np.float64))
    )
    errors_K = np.concatenate([np.empty(0), *(np.full(piece[0].shape[1], piece[2]) for piece in pieces)])
    hits = Hits(starts_B, numbers, similarities, errors_K, by_code)
    return hits.without(hits.numbers_QK < 0), rivals


def promising(hits: Hits, k: int) -> Hits:
    """The candidates that can still be in the top k.

    If similarities are known up to a small error, a candidate below the k-th best of all needs no second scoring.
    """
    if hits.numbers_QK.shape[1] <= k or np.isinf(hits.errors_K).all():
        return hits
    least_QK = hits.similarities_QK - hits.errors_K
    border_Q = np.partition(least_QK, -k, axis=1)[:, -k] - ROUNDING
    return hits.without(hits.similarities_QK < border_Q[:, None] - hits.errors_K)


def scored(
    queries_QD: np.ndarray, matrices: Sequence[np.ndarray | None], blocks_QK: np.ndarray, rows_QK: np.ndarray
) -> np.ndarray:
    """Similarities of rows of several matrices (float16 [N, D]), float32 [Q, K]; -inf where the row is -1.

    They are computed in float64 from the stored float16 and rounded to float32. The order of the sum does not depend on
    Q, K and the matrices. The value is also -inf for rows of a block that has no matrix.
    """
    width, dimension = rows_QK.shape[1], max(queries_QD.shape[1], 1)
    most = max(GATHERED_BYTES // (8 * dimension), 1)  # vectors gathered at a time
    if width > most:
        pieces = [slice(start, start + most) for start in range(0, width, most)]
        return np.concatenate([scored(queries_QD, matrices, blocks_QK[:, p], rows_QK[:, p]) for p in pieces], axis=1)
    result_QK = np.empty(rows_QK.shape, np.float32)
    if not width:
        return result_QK
    step = max(most // width, 1)
    for start in range(0, len(queries_QD), step):
        some = slice(start, start + step)
        vectors, known = _gathered(matrices, blocks_QK[some].ravel(), rows_QK[some].ravel(), queries_QD.shape[1])
        vectors_QKD = as_float32(vectors.reshape(-1, width, queries_QD.shape[1])).astype(np.float64)
        products_QK = np.einsum("qkd,qd->qk", vectors_QKD, queries_QD[some].astype(np.float64), optimize=False)
        products_QK[~known.reshape(products_QK.shape)] = -np.inf
        result_QK[some] = products_QK
    return result_QK


def _gathered(
    matrices: Sequence[np.ndarray | None], blocks_N: np.ndarray, rows_N: np.ndarray, dimension: int
) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of rows of several matrices, float16 [N, D], and which there are, bool [N]."""
    known = rows_N >= 0
    vectors_ND = np.zeros((len(rows_N), dimension), np.float16)
    order = np.argsort(blocks_N.astype(np.int16) if len(matrices) < 1 << 15 else blocks_N, kind="stable")
    ends = np.cumsum(np.bincount(blocks_N, minlength=len(matrices)))
    for number, end in enumerate(ends.tolist()):
        begin = int(ends[number - 1]) if number else 0
        if begin == end:
            continue
        at = order[begin:end]
        matrix = matrices[number]
        if matrix is None:
            known[at] = False
        elif len(matrix):
            # A row of -1 takes the last row. It is not known.
            vectors_ND[at] = np.asarray(matrix).take(rows_N[at], axis=0, mode="wrap")
    return vectors_ND, known


def _best_of(by_code_QK: np.ndarray, most: int) -> np.ndarray:
    """What the codes of the best candidates say, float64 [Q, `most` at most]."""
    width = by_code_QK.shape[1]
    return by_code_QK if width <= most else np.partition(by_code_QK, width - most, axis=1)[:, width - most :]


def contenders(by_code_QK: np.ndarray, similarities_QK: np.ndarray, k: int) -> np.ndarray:
    """Which candidates can be among the k nearest, wherever the border between codes lies, bool [Q, K].

    A candidate cannot if k others are nearer whose codes say as much as its own. The candidates are ordered by what
    their codes say, and each stretch is compared with the k-th best of all before it. So the result may hold a few that
    cannot.
    """
    order = np.argsort(-by_code_QK, axis=1, kind="stable")
    ordered_QK = np.take_along_axis(similarities_QK, order, axis=1)
    width = ordered_QK.shape[1]
    can = np.ones(ordered_QK.shape, bool)
    start = k
    while start < width:
        border_Q = np.partition(ordered_QK[:, :start], start - k, axis=1)[:, start - k]
        can[:, start : 2 * start] = ordered_QK[:, start : 2 * start] >= border_Q[:, None]
        start *= 2
    result = np.empty(can.shape, bool)
    np.put_along_axis(result, order, can & np.isfinite(ordered_QK), axis=1)
    return result

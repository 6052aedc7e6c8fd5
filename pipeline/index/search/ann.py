"""Candidates from FAISS indexes, whose ids are the dense row numbers of a shard.

An index of codes is searched for more candidates than requested. The best of all shards are scored again in one go,
from the float16 vectors on disk (live_entries.py). Which rows are candidates depends on the parameters of the index, on
k, and on all shards together. So an answer does not depend on how shards are spread over processes, if each process
returns what the codes of its candidates say (decisions/rivals.py).

The lists of an inverted file are found by the quantizer that it shares with the other shards of its generation
(quantizer.py), once for all of them. Shards in one stack are searched in one call (stack.py).

Shapes: Q queries, K candidates, D dimensions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from pipeline.deadline import look
from pipeline.decisions.rivals import FURTHER, borders
from pipeline.index.search import parameters
from pipeline.index.search.blocks import Candidates
from pipeline.index.search.exact import SLACK, ExactFinder
from pipeline.index.search.quantizer import Coarse, Quantizer, pieces_of
from pipeline.index.search.rounding import product_error
from pipeline.index.search.stack import Mask, Seat, Stack

RERANK = 100  # scored again for k = 10 if the index does not say: recall .955 becomes .974 on 300,000
RERANK_FACTOR = 4  # further candidates for each neighbour beyond 10, at most
RERANK_FOR = 10  # neighbours that `rerank` is given for
MARGIN = 8  # candidates returned beyond k, for entries that a search leaves out and for ties
EXACT_UP_TO = 8_192  # allowed rows: exact search is as fast as an index searched through a mask


class ListFinder:
    """Finds candidates among the allowed rows of one shard, in its inverted lists.

    `vectors_ND` (float16) are the vectors that the index was built from. Without them, similarities come from codes.
    Few allowed rows are searched exactly, by `exact`.
    """

    def __init__(
        self,
        seat: Seat,
        values: Mapping[str, int],
        rows_N: np.ndarray,
        vectors_ND: np.ndarray | None,
        margin: int = MARGIN,
    ) -> None:
        stack, member = seat.place
        self.seat = seat
        self.num_rows = stack.num_rows[member]
        self.num_allowed = len(rows_N)
        self._keeps_vectors = parameters.keeps_vectors(stack.index)
        self._rerank = values.get("rerank", RERANK)
        self._margin = margin
        self._is_rescored = vectors_ND is not None and not self._keeps_vectors
        share = self.num_allowed / max(self.num_rows, 1)
        self.values = {name: value for name, value in values.items() if name != "rerank"}
        if 0 < share < 1:
            self.values = parameters.for_share(stack.inverted, self.values, share)
        self.mask: Mask | None = None
        self.exact: ExactFinder | None = None
        if self.num_allowed < self.num_rows:
            self.mask = Mask(self.num_rows, rows_N)
            if vectors_ND is not None and self.num_allowed <= EXACT_UP_TO:
                self.exact = ExactFinder(vectors_ND, rows_N)
        self.error = product_error(stack.index.d) if self._keeps_vectors else math.inf

    @property
    def slack(self) -> float:
        """How much lower than another candidate's the similarity may be and still be the higher one."""
        return 2 * self.error if self._keeps_vectors else 0.0

    def num_candidates(self, k: int) -> int:
        """The number of candidates of all shards for k neighbours."""
        if self._keeps_vectors:
            return k
        return max(rescored(self._rerank, k), k) if self._is_rescored else k + self._margin

    def find(self, queries_QD: np.ndarray, k: int, coarse: Coarse | None = None) -> Candidates:
        """Likely nearest rows of each query. There are fewer than k only if fewer rows are allowed."""
        if self.exact is not None:
            return self.exact.find(queries_QD, k)
        found = find_in_lists([self], queries_QD, k, coarse or Coarse(queries_QD))
        kept = found.by_code_QK >= borders(found.by_code_QK, found.most, k, self.slack)[:, None]
        start = found.starts[0]
        rows_QK = np.where(kept & (found.numbers_QK >= 0), found.numbers_QK - start, -1)
        return Candidates(rows_QK, np.where(rows_QK >= 0, found.similarities_QK, -np.inf), self.error)


@dataclass(frozen=True)
class InLists:
    """Candidates from the lists of several shards.

    The rows of shard i (of the finders asked) have the numbers from `starts[i]` on. `numbers_QK` is -1 for none, with
    similarity -inf. `by_code_QK` (float64) is the similarity, less FURTHER for each step further that the search went
    to find the row. All rows that were found and are within `slack` of the best `most` by that are here.
    """

    numbers_QK: np.ndarray
    similarities_QK: np.ndarray
    by_code_QK: np.ndarray
    starts: list[int]
    most: int
    slack: float


def find_in_lists(finders: Sequence[ListFinder], queries_QD: np.ndarray, k: int, coarse: Coarse) -> InLists:
    """The likely nearest rows of each query in several shards of one generation, none of which is searched exactly.

    Shards of a stack that are searched equally far are searched in one call. If a query finds fewer than k rows, its
    search goes further in all of them, at last through all lists.
    """
    most = finders[0].num_candidates(k)
    reaches, starts = _reaches(finders)
    pieces = [reach.search(queries_QD, most, coarse) for reach in reaches]
    similarities_QK, numbers_QK = _side_by_side(pieces)
    by_code_QK = similarities_QK.astype(np.float64)
    enough, steps = min(k, sum(finder.num_allowed for finder in finders)), 0
    while True:
        short = np.flatnonzero((numbers_QK >= 0).sum(axis=1) < enough)
        if not len(short):
            break
        wider = [parameters.widen(reach.stack.inverted, reach.values) for reach in reaches]
        if not any(wider):
            break
        steps += 1
        reaches = [reach.going(values or reach.values) for reach, values in zip(reaches, wider, strict=True)]
        look()
        some_QD, again = queries_QD[short], Coarse(queries_QD[short])
        further_QK, new_QK = _side_by_side([reach.search(some_QD, most + enough, again) for reach in reaches])
        new_QK = np.where(_among(new_QK, numbers_QK[short]), -1, new_QK)
        width = numbers_QK.shape[1]
        missing = ((0, 0), (0, new_QK.shape[1]))
        numbers_QK = np.pad(numbers_QK, missing, constant_values=-1)
        similarities_QK, by_code_QK = (
            np.pad(array, missing, constant_values=-np.inf) for array in (similarities_QK, by_code_QK)
        )
        numbers_QK[short, width:] = new_QK
        similarities_QK[short, width:] = np.where(new_QK >= 0, further_QK, -np.inf)
        by_code_QK[short, width:] = similarities_QK[short, width:].astype(np.float64) - FURTHER * steps
    return InLists(numbers_QK, similarities_QK, by_code_QK, starts, most, finders[0].slack)


class _Reach:
    """Some shards of a stack that are searched equally far. Their numbers begin at `base`."""

    def __init__(self, stack: Stack, base: int, values: Mapping[str, int], slack: float) -> None:
        self.stack = stack
        self.values = dict(values)
        self._base = base
        self._slack = slack
        self._masks: dict[int, Mask | None] = {}
        self._num_allowed = 0

    def add(self, member: int, finder: ListFinder) -> None:
        self._masks[member] = finder.mask
        self._num_allowed += finder.num_allowed

    def going(self, values: dict[str, int]) -> "_Reach":
        """The same shards, searched further."""
        reach = _Reach(self.stack, self._base, values, self._slack)
        reach._masks, reach._num_allowed = self._masks, self._num_allowed
        return reach

    def search(self, queries_QD: np.ndarray, most: int, coarse: Coarse) -> tuple[np.ndarray, np.ndarray]:
        """The best `most` rows of each query, and all within the slack of these: similarities, numbers [Q, K].

        FAISS cuts off rows of equal similarity at random. So more are asked for, until a lower similarity is seen.
        """
        width = min(most + SLACK, self._num_allowed)
        if not width:
            return np.empty((len(queries_QD), 0), np.float32), np.empty((len(queries_QD), 0), np.int64)
        num_lists = min(self.values.get("nprobe", 1), self.stack.quantizer.num_lists)
        lists = coarse.lists(self.stack.quantizer, num_lists, self.values.get("efSearch"))
        similarities_QK, numbers_QK = self.stack.search(lists, width, self.values, self._masks)
        while most < width < self._num_allowed:
            last_Q = np.where(numbers_QK[:, -1] >= 0, similarities_QK[:, -1], -np.inf)
            unclear = np.flatnonzero(last_Q >= similarities_QK[:, most - 1] - self._slack)
            unclear = unclear[numbers_QK[unclear, -1] >= 0]
            if not len(unclear):
                break
            missing = ((0, 0), (0, min(3 * width, self._num_allowed - width)))
            width += missing[1][1]
            similarities_QK = np.pad(similarities_QK, missing, constant_values=-np.inf)
            numbers_QK = np.pad(numbers_QK, missing, constant_values=-1)
            some = self.stack.search(lists.of(unclear), width, self.values, self._masks)
            similarities_QK[unclear], numbers_QK[unclear] = some
        similarities_QK[numbers_QK < 0] = -np.inf
        if self._base:
            numbers_QK = np.where(numbers_QK >= 0, numbers_QK + self._base, -1)
        return similarities_QK, numbers_QK


def _reaches(finders: Sequence[ListFinder]) -> tuple[list[_Reach], list[int]]:
    """The searches that the shards need, and the first number of each shard."""
    bases: dict[int, int] = {}
    reaches: dict[tuple[int, tuple[tuple[str, int], ...]], _Reach] = {}
    starts, end = [], 0
    for finder in finders:
        stack, member = finder.seat.place
        if id(stack) not in bases:
            bases[id(stack)] = end
            end += int(stack.starts[-1])
        base = bases[id(stack)]
        starts.append(base + int(stack.starts[member]))
        key = (id(stack), tuple(finder.values.items()))
        if key not in reaches:
            reaches[key] = _Reach(stack, base, finder.values, finder.slack)
        reaches[key].add(member, finder)
    return [*reaches.values()], starts


def _side_by_side(pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if len(pieces) == 1:
        return pieces[0]
    similarities_QK, numbers_QK = (np.concatenate(arrays, axis=1) for arrays in zip(*pieces, strict=True))
    return similarities_QK, numbers_QK


def _among(numbers_QK: np.ndarray, known_QK: np.ndarray) -> np.ndarray:
    """Which numbers are among the known ones of their query, of which there are few, bool [Q, K]."""
    known_QK = -np.sort(-known_QK, axis=1)  # those that are none come last
    known_QK = known_QK[:, (known_QK >= 0).any(axis=0)]
    found = np.zeros(numbers_QK.shape, bool)
    for column in range(known_QK.shape[1]):
        found |= (numbers_QK == known_QK[:, column, None]) & (numbers_QK >= 0)
    return found


def rescored(rerank: int, k: int) -> int:
    """How many candidates there are for k neighbours, if there are `rerank` for up to ten.

    Beyond ten they grow with k, but by no more than RERANK_FACTOR for each neighbour.
    """
    beyond = max(k - RERANK_FOR, 0)
    return rerank + min(RERANK_FACTOR * beyond, math.ceil(rerank * beyond / RERANK_FOR))


class GraphFinder:
    """Finds candidates among the allowed rows of one shard, in a graph or any other index that has no lists.

    `vectors_ND` (float16) are the vectors that the index was built from. Without them, similarities come from codes.
    """

    def __init__(
        self,
        index: faiss.Index,
        values: Mapping[str, int],
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
        self._values = parameters.for_share(index, dict(values), share) if 0 < share < 1 else dict(values)
        self._refined = None
        if vectors_ND is not None and not self._keeps_vectors:
            self._refined = Refined(index, vectors_ND)
        self._selector = None
        self._exact: ExactFinder | None = None
        if self._num_allowed < index.ntotal:
            self._mask = Mask(index.ntotal, rows_N)  # the selector reads its bits in place
            self._selector = faiss.IDSelectorBitmap(self._mask.bits)
            if vectors_ND is not None and self._num_allowed <= EXACT_UP_TO:
                self._exact = ExactFinder(vectors_ND, rows_N)

    def find(self, queries_QD: np.ndarray, k: int, coarse: Coarse | None = None) -> Candidates:  # noqa: ARG002
        """Likely nearest rows of each query. There are fewer than k only if fewer rows are allowed.

        If masked rows leave a query with fewer than k, the search goes further, at last through the whole index.
        """
        if self._exact is not None:
            return self._exact.find(queries_QD, k)
        width = min(k + (SLACK if self._keeps_vectors else self._margin), self._num_allowed)
        if not width:
            return Candidates.none(len(queries_QD))
        similarities_QK, found_QK = self._search(queries_QD, width, self._values)
        values = self._values
        while (found_QK[:, min(k, width) - 1] < 0).any():  # FAISS gives what it found first
            wider = parameters.widen(self._index, values)
            if wider is None:
                break
            values = wider
            short = np.flatnonzero(found_QK[:, min(k, width) - 1] < 0)
            similarities_QK[short], found_QK[short] = self._search(queries_QD[short], width, values)
        similarities_QK[found_QK < 0] = -np.inf
        by_vectors = self._keeps_vectors or self._refined is not None
        return Candidates(found_QK, similarities_QK, product_error(self._index.d) if by_vectors else math.inf)

    def _search(self, queries_QD: np.ndarray, width: int, values: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """Candidates: float32 similarities and int64 rows [Q, width], -1 for none."""
        params = parameters.search_parameters(self._index, values, self._selector)
        found = []
        for piece in pieces_of(len(queries_QD)):
            look()
            found.append(self._searched(queries_QD[piece], width, params))
        if len(found) == 1:
            return found[0]
        similarities_QK, found_QK = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return similarities_QK, found_QK

    def _searched(
        self, queries_QD: np.ndarray, width: int, params: faiss.SearchParameters
    ) -> tuple[np.ndarray, np.ndarray]:
        """The result of one call of FAISS. The call cannot be interrupted."""
        if self._refined is None:
            similarities_QK, found_QK = self._index.search(queries_QD, width, params=params)
            return similarities_QK, found_QK
        candidates = self._rerank + RERANK_FACTOR * max(width - self._margin - RERANK_FOR, 0)
        return self._refined.search(queries_QD, width, min(max(candidates, width), self._num_allowed), params)


def approximate_finder(
    index: faiss.Index,
    values: Mapping[str, int],
    rows_N: np.ndarray,
    vectors_ND: np.ndarray | None,
    margin: int = MARGIN,
    quantizer: Quantizer | None = None,
) -> ListFinder | GraphFinder:
    """A finder among the allowed rows of an index that stands alone.

    `quantizer` is that of the generation. Without it, an inverted file is searched with its own.
    """
    if faiss.try_extract_index_ivf(index) is None:
        return GraphFinder(index, values, rows_N, vectors_ND, margin)
    return ListFinder(Seat(Stack(index, quantizer, [index.ntotal])), values, rows_N, vectors_ND, margin)


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

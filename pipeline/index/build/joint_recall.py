"""Recall over all shards of a generation together, against exact search in all of them.

A shard alone says little about the whole: the ten nearest of all rows are nearer than the ten nearest of one shard, and
lie in fewer lists. Parameters tuned within each of ten shards for recall .95 reached .988 over all of their rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from pipeline.index.build import tune
from pipeline.index.build.distinct import vector_keys
from pipeline.index.build.tune import (
    MAX_QUERIES,
    MOST_COPIES,
    NEIGHBORS_TUNED,
    RECALLED_AT_MOST,
    RecallEvaluator,
    query_sample,
)
from pipeline.index.search.ann import MARGIN, GraphFinder, ListFinder
from pipeline.index.search.blocks import Candidates, Finder
from pipeline.index.search.exact import ExactFinder, similarities
from pipeline.index.search.quantizer import Coarse
from pipeline.index.search.stack import Seat
from pipeline.index.search.together import find_together, scored

FEWER_RERANKS = (10, 20, 30)  # of each shard, where several graphs give candidates


@dataclass(frozen=True)
class Member:
    """A shard to be searched with others: its index, its vectors float16 [N, D] and their `vector_keys`.

    An index with lists has a seat: where they are searched. `held_out` (bool [N]) marks the rows that the index was not
    trained on.
    """

    index: faiss.Index
    seat: Seat | None
    vectors_ND: np.ndarray
    keys_N: np.ndarray
    held_out: np.ndarray


class JointRecall(RecallEvaluator):
    """Exact answers over all rows of some shards, used to judge the search of these shards together.

    The queries are `questions_QD` (float16 [Q, D]), or stored rows of every shard. A query does not find itself or a
    copy of itself, in any shard. The members can be a sample of shards with `rows` rows in all (RecallEvaluator).
    Reads every vector of the members once.
    """

    def __init__(self, members: Sequence[Member], questions_QD: np.ndarray | None, rows: int) -> None:
        self._members = members
        if questions_QD is None:
            each = -(-MAX_QUERIES // len(members))
            pairs = [
                (m.vectors_ND, query_sample(m.keys_N, number, m.held_out)[:each]) for number, m in enumerate(members)
            ]
            mixed = np.random.default_rng(0).permutation(sum(len(chosen) for _, chosen in pairs))
            questions_QD = np.concatenate([vectors_ND[chosen] for vectors_ND, chosen in pairs])[mixed]
        self._lengths = [len(member.vectors_ND) for member in members]
        self._offsets = np.cumsum([0, *self._lengths[:-1]])
        self._keys_N = np.concatenate([member.keys_N for member in members])
        self._question_keys_Q = vector_keys(questions_QD)
        self._queries_QD = np.ascontiguousarray(questions_QD, np.float32)
        present = sum(len(member.vectors_ND) for member in members)
        self._k_tuned = max(round(NEIGHBORS_TUNED * min(present / max(rows, present), 1.0)), 1)
        copies = [self._copies_in(member) for member in members]
        self._most = max(min(RECALLED_AT_MOST, present - sum(int(most_Q.max(initial=0)) for most_Q in copies)), 0)
        self._copies = min(int(np.sum(copies, axis=0).max(initial=0)), MOST_COPIES)
        least = tune.RERANKS[0]
        fewer = (n for n in FEWER_RERANKS if n < least <= n * len(members) and members[0].seat is None)
        self.reranks = (*fewer, *tune.RERANKS)
        found = [
            self._without_copies(
                m,
                ExactFinder(m.vectors_ND, np.arange(len(m.vectors_ND))).find(
                    self._queries_QD, self._most + self._copies
                ),
            )
            for m in members
        ]
        self._exact_QK = _nearest(found, self._most)

    def _found(
        self,
        index: faiss.Index,  # noqa: ARG002  # all members are searched
        values: dict[str, int],
        k: int,
        queries: int,
        *,
        refined: bool,
        margin: int = MARGIN,
    ) -> np.ndarray:
        queries_QD = self._queries_QD[:queries]
        finders = self._finders(values, refined, margin)
        hits, _ = find_together(finders, self._lengths, queries_QD, k + self._copies, Coarse(queries_QD))
        blocks_QK, rows_QK = hits.places()
        found_QK = scored(queries_QD, [member.vectors_ND for member in self._members], blocks_QK, rows_QK)
        itself_QK = self._keys_N[self._offsets[blocks_QK] + rows_QK] == self._question_keys_Q[:queries, None]
        return _nearest([np.where(itself_QK | (rows_QK < 0), np.float32(-np.inf), found_QK)], k)

    def _search(
        self,
        index: faiss.Index,  # noqa: ARG002  # all members are searched
        values: dict[str, int],
        refined: bool,
    ) -> Callable[[np.ndarray], np.ndarray]:
        finders = self._finders(values, refined, MARGIN)
        matrices = [member.vectors_ND for member in self._members]

        def find(queries_QD: np.ndarray) -> np.ndarray:
            hits, _ = find_together(finders, self._lengths, queries_QD, NEIGHBORS_TUNED, Coarse(queries_QD))
            return scored(queries_QD, matrices, *hits.places()) if refined else hits.similarities_QK

        return find

    def _finders(self, values: dict[str, int], refined: bool, margin: int) -> list[Finder]:
        found: list[Finder] = []
        for member in self._members:
            rows_N = np.arange(len(member.vectors_ND))
            vectors_ND = member.vectors_ND if refined else None
            if member.seat is not None:
                found.append(ListFinder(member.seat, values, rows_N, vectors_ND, margin))
            else:
                found.append(GraphFinder(member.index, values, rows_N, vectors_ND, margin))
        return found

    def _copies_in(self, member: Member) -> np.ndarray:
        """How many rows of a member hold the vector of each question, int64 [Q]."""
        ordered = np.sort(member.keys_N)
        sides = (np.searchsorted(ordered, self._question_keys_Q, side) for side in ("right", "left"))
        most_Q: np.ndarray = np.subtract(*sides)
        return most_Q

    def _without_copies(self, member: Member, found: Candidates) -> np.ndarray:
        """Similarities of the candidates of the first questions, -inf for copies of the question, [Q, K]."""
        rows_QK = found.rows_QK
        similarities_QK = found.similarities_QK
        if not np.isfinite(found.error):  # they come from codes
            similarities_QK = similarities(self._queries_QD[: len(rows_QK)], member.vectors_ND, rows_QK)
        itself_QK = member.keys_N[rows_QK] == self._question_keys_Q[: len(rows_QK), None]
        return np.where(itself_QK | (rows_QK < 0), np.float32(-np.inf), similarities_QK)


def _nearest(found: Sequence[np.ndarray], k: int) -> np.ndarray:
    """The k largest similarities of each query, descending, -inf if there are fewer [Q, K]."""
    together_QK = np.concatenate(found, axis=1)
    nearest_QK = -np.sort(-together_QK, axis=1)[:, :k]
    missing = ((0, 0), (0, k - nearest_QK.shape[1]))
    return np.pad(nearest_QK, missing, constant_values=-np.inf)

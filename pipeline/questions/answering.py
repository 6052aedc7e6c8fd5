"""From query vectors to neighbours, decisions and scores: the glue between search and voting.

This module works on vectors and on the live entries of one version. It uses no encoder, no files and no Ray, so the
library and a server give the same answers.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.deadline import look
from pipeline.decisions.decision import Decision, Neighbor
from pipeline.decisions.neighbor_table import LabelStatistics, NeighborTable, decide
from pipeline.decisions.question import AnswerContext, Question, check_k
from pipeline.decisions.voting import VOTINGS
from pipeline.errors import UnknownName, UsageError
from pipeline.index.search.live_entries import LiveEntries, Restrictions, Retrieved
from pipeline.questions.balance import best_balance
from pipeline.store.lookup.digests import Digests

ROWS_ONE_BY_ONE = 256  # read from a column one by one; for more rows `take` is cheaper, which costs 0.1 ms per call
K_FOR_FORGOTTEN = 50
DECISIONS_ABOUT_FORGOTTEN = 200


def unit_vectors(embeddings: np.ndarray, dimension: int) -> np.ndarray:
    """Query vectors scaled to unit length, float32 [Q, D]. Raises UsageError for vectors that no encoder could make."""
    try:
        given_QD = np.asarray(embeddings, np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the embeddings are no array of numbers ({error}): give [queries, {dimension}]") from error
    if given_QD.ndim != 2 or given_QD.shape[1] != dimension:
        raise UsageError(f"the embeddings have the shape {list(given_QD.shape)}: give [queries, {dimension}]")
    largest_Q1 = np.abs(given_QD).max(axis=1, keepdims=True, initial=0.0)
    if not (np.isfinite(largest_Q1).all() and (largest_Q1 > 0).all()):
        raise UsageError("an embedding is zero or not finite: give vectors an encoder made")
    scaled_QD = given_QD / largest_Q1  # then no square can overflow
    units_QD: np.ndarray = scaled_QD / np.linalg.norm(scaled_QD, axis=1, keepdims=True)
    return units_QD.astype(np.float32)


def search(live: LiveEntries, vectors_QD: np.ndarray, k: int) -> list[tuple[Neighbor, ...]]:
    """The k nearest live entries of each query, with or without a label."""
    check_k(k)
    neighbors = find_neighbors(live, vectors_QD, k)
    return [neighbors.neighbors(query, live.labels) for query in range(len(vectors_QD))]


def find_neighbors(
    live: LiveEntries, vectors_QD: np.ndarray, k: int, restrictions: Restrictions = Restrictions()
) -> NeighborTable:
    """The k nearest entries of each query (float32 [Q, D] of unit length) that the restrictions permit."""
    return neighbor_table(live, live.search(vectors_QD, k, restrictions))


def neighbor_table(live: LiveEntries, retrieved: Retrieved) -> NeighborTable:
    """The retrieved neighbours with their uris and datasets."""
    uris_Q, datasets_Q = (_texts(live, retrieved, name) for name in ("uris", "datasets"))
    columns = retrieved.similarities_QK, retrieved.ids_QK, retrieved.codes_QK
    return NeighborTable(*columns, uris_Q, datasets_Q, rivals=retrieved.rivals)


def _texts(live: LiveEntries, retrieved: Retrieved, name: Literal["uris", "datasets"]) -> list[list[str]]:
    """One column of the retrieved neighbours: for each query a list with one text per neighbour."""
    found_QK = retrieved.ids_QK >= 0
    blocks, rows = retrieved.blocks_QK[found_QK], retrieved.rows_QK[found_QK]
    texts: list[str] = []
    if len(rows) <= ROWS_ONE_BY_ONE:
        columns = [getattr(block, name) for block in live.blocks]
        texts = [columns[block][row].as_py() for block, row in zip(blocks.tolist(), rows.tolist(), strict=True)]
    else:
        texts_N = np.empty(len(rows), object)
        for number in np.unique(blocks):
            look()
            there = blocks == number
            texts_N[there] = getattr(live.blocks[number], name).take(pa.array(rows[there])).to_pylist()
        texts = texts_N.tolist()
    ends = np.cumsum(found_QK.sum(axis=1)).tolist()
    return [texts[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def label_statistics(live: LiveEntries, assume: Mapping[int, str]) -> tuple[LabelStatistics, dict[int, int]]:
    """The label statistics as if the assumed labels were stored, and the codes of the assumed labels by id."""
    labels, counts, codes = _assumed_labels(live, assume)
    return LabelStatistics(labels, counts, len(live), len(live.whole)), codes


def check_what_ifs(live: LiveEntries, question: Question) -> None:
    """Raises UnknownName if a what-if option names an id that is no live entry."""
    named = np.array(question.named_ids, object)
    inside = np.array([int(entry_id) for entry_id in named if 0 <= int(entry_id) < 1 << 63], np.int64)
    check_named(question, frozenset(inside[live.whole.contains(inside)].tolist()))


def check_named(question: Question, known: Collection[int]) -> None:
    """Raises UnknownName if a what-if option names an id that is not in `known`, the ids of entries."""
    for option, ids in (("exclude", question.exclude), ("weigh", question.weigh), ("assume", question.assume)):
        for entry_id in ids:
            if int(entry_id) not in known:
                error = UnknownName(
                    f"{option} names id {entry_id}, which is no entry: `search` shows the ids there are"
                )
                error.field = option
                raise error


def classify(
    live: LiveEntries,
    vectors_QD: np.ndarray,
    uris: Sequence[str | None],
    question: Question,
    version: int,
    digests: Digests | None = None,
) -> list[Decision]:
    """One decision per query, in order. Raises UnknownName if a what-if option names an id that is no live entry.

    `digests` are required if the balance is "auto". If `live` holds only the entries that satisfy an expression, only
    these entries vote and count for the balance.
    """
    check_what_ifs(live, question)
    if question.balance == "auto":
        if digests is None:
            raise AssertionError("without digests a copy of an entry would answer for it")
        question = question.balanced_by(best_balance(live, question.k, question.rule, digests))
    voters, codes = label_statistics(live, question.assume)
    restrictions = Restrictions("labelled", frozenset(question.exclude), None, codes)
    why_empty = voters.why_empty(question.label_set, question.where, excluding=bool(question.exclude))
    answering = AnswerContext(question, version, live.num_shards, live.shards_total, why_empty)
    return decide(find_neighbors(live, vectors_QD, question.k, restrictions), voters, answering, uris)


def ask_about_forgotten(live: LiveEntries, vectors_ND: np.ndarray, ids_N: np.ndarray, version: int) -> dict[str, Any]:
    """Query with the vectors of forgotten entries (float16 [N, D]), and count the forgotten entries that are returned.

    Every vector is searched for. In addition the first DECISIONS_ABOUT_FORGOTTEN vectors are decided by each voting.
    These are enough, because a voting only weighs the entries that a search finds.
    """
    returned: set[int] = set()
    if len(vectors_ND) and live.blocks:
        queries_QD = unit_vectors(vectors_ND, live.dimension)
        returned |= set(live.search(queries_QD, K_FOR_FORGOTTEN).ids_QK.ravel().tolist())
        some = queries_QD[:DECISIONS_ABOUT_FORGOTTEN]
        for voting in VOTINGS:
            question = Question(k=K_FOR_FORGOTTEN, voting=voting)
            for decision in classify(live, some, [None] * len(some), question, version):
                returned |= {neighbor.id for neighbor in decision.neighbors}
    came_back = len(returned & set(ids_N.tolist()))
    return {"queries": len(vectors_ND), "k": K_FOR_FORGOTTEN, "votings": list(VOTINGS), "returned": came_back}


def _assumed_labels(live: LiveEntries, assume: Mapping[int, str]) -> tuple[tuple[str, ...], np.ndarray, dict[int, int]]:
    """The labels, the number of live entries of each, and the assumed codes by id, as if these labels were stored."""
    if not assume:
        return live.labels, live.label_counts(), {}
    new = sorted({label for label in assume.values() if label not in live.label_codes})
    labels = [*live.labels, *new]
    counts = np.concatenate([live.label_counts(), np.zeros(len(new), np.int64)])
    all_codes = {label: len(live.labels) + at for at, label in enumerate(new)}
    codes = {i: all_codes[label] if label in all_codes else live.label_codes[label] for i, label in assume.items()}
    ids_N = np.array(list(codes), np.int64)
    ids_N = ids_N[live.contains(ids_N)]
    before = live.codes_of(ids_N)
    np.subtract.at(counts, before[before >= 0], 1)
    np.add.at(counts, [codes[entry_id] for entry_id in ids_N.tolist()], 1)
    return tuple(labels), counts, codes

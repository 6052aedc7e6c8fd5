"""From query vectors to neighbours, decisions and scores: the glue between search and voting.

This module works on vectors and on the live entries of one version. It uses no encoder, no files and no Ray, so the
library and a server give the same answers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.deadline import look
from pipeline.decisions.decision import Decision, Neighbor
from pipeline.decisions.evaluation import LabelledNeighbors, Score, choose_balance, score_all
from pipeline.decisions.neighbor_table import LabelStatistics, NeighborTable, decide
from pipeline.decisions.question import AnswerContext, Question, check_k
from pipeline.decisions.voting import VOTINGS, Voting, VotingRule
from pipeline.errors import SourceError, UnknownName, UsageError
from pipeline.index.search.leave_one_out import copies_among, search_others
from pipeline.index.search.live_entries import LiveEntries, Restrictions, Retrieved
from pipeline.index.search.sampling import Sample, draw, each_of
from pipeline.store.lookup.digests import Digests
from pipeline.tabular import Tabular

ROWS_ONE_BY_ONE = 256  # read from a column one by one; for more rows `take` is cheaper, which costs 0.1 ms per call
K_FOR_FORGOTTEN = 50
DECISIONS_ABOUT_FORGOTTEN = 200


@dataclass(frozen=True)
class Evaluation(Tabular):
    """Scores of each voting at each k.

    `skipped` counts the queries that could not be asked: `unreadable` images could not be read, the label set has no
    word for the labels of `without_word` queries, and the other queries had no label.

    `held_already` counts the queries whose image bytes the memory holds. The memory recognises such images, so their
    scores do not predict the scores of other images. It is None in leave-one-out, which leaves such entries out.

    `by_label` is the percentage of right decisions for each true label, by voting and k. `best` is the voting and k
    with the best overall accuracy.
    """

    num_queries: int
    skipped: int
    accuracy: dict[Voting, dict[int, float]]
    balanced_accuracy: dict[Voting, dict[int, float]]
    best: tuple[Voting, int]
    by_label: dict[Voting, dict[int, dict[str, float]]]
    balance: float
    version: int
    label_set: str | None = None
    where: str | None = None
    held_already: int | None = None
    unreadable: int = 0
    without_word: int = 0

    def _rows(self) -> list[dict[str, Any]]:
        """One row for each voting and k, with accuracies in percent."""
        return [
            {
                "voting": voting,
                "k": k,
                "accuracy": accuracy,
                "balanced_accuracy": self.balanced_accuracy[voting][k],
            }
            for voting, at_k in self.accuracy.items()
            for k, accuracy in at_k.items()
        ]

    def to_json(self) -> dict:
        """The evaluation as a JSON object. Accuracies are in percent; the inner objects have k as string keys."""
        voting, k = self.best
        return {
            "num_queries": self.num_queries,
            "skipped": self.skipped,
            "held_already": self.held_already,
            "unreadable": self.unreadable,
            "without_word": self.without_word,
            "accuracy": _with_string_keys(self.accuracy),
            "balanced_accuracy": _with_string_keys(self.balanced_accuracy),
            "best": {"voting": voting, "k": k, "accuracy": self.accuracy[voting][k]},
            "by_label": self.by_label[voting][k],
            "balance": self.balance,
            "label_set": self.label_set,
            "where": self.where,
            "version": self.version,
        }


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
    return NeighborTable(retrieved.similarities_QK, retrieved.ids_QK, retrieved.codes_QK, uris_Q, datasets_Q)


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


@dataclass(frozen=True)
class Scoring:
    """The votings and the values of k to score. With `auto_balance` the balance of `rule` is measured first."""

    ks: Sequence[int]
    votings: Sequence[Voting] = VOTINGS
    rule: VotingRule = VotingRule()
    auto_balance: bool = False


def evaluate(
    live: LiveEntries,
    vectors_QD: np.ndarray,
    truths: Sequence[str],
    scoring: Scoring,
    version: int,
    digests: Digests,
    *,
    asked_digests_Q: np.ndarray | None = None,
    skipped: int = 0,
) -> Evaluation:
    """Score queries with known labels. A query whose label the memory does not have counts as wrong.

    If `asked_digests_Q`, the digests of the query images (uint64 [Q]), are given, the evaluation counts the queries
    whose bytes the memory holds.
    """
    ks, rule = scoring.ks, scoring.rule
    codes = {label: code for code, label in enumerate(live.labels)}
    extra = {label: len(codes) + i for i, label in enumerate(sorted(set(truths) - set(codes)))}
    if scoring.auto_balance:
        rule = replace(rule, balance=best_balance(live, max(ks), rule, digests))
    for k in ks:
        check_k(k)
    retrieved = live.search(vectors_QD, max(ks), Restrictions("labelled"))
    names = [*live.labels, *extra]
    truths_Q = np.array([(codes | extra)[label] for label in truths], np.int64)
    counts = np.concatenate([live.label_counts(), np.zeros(len(extra), np.int64)])
    asked = LabelledNeighbors(retrieved.similarities_QK, retrieved.codes_QK, truths_Q, counts)
    evaluation = _evaluation(asked, live, names, replace(scoring, rule=rule), version, skipped)
    if asked_digests_Q is None:
        return evaluation
    held = copies_among(live, digests, retrieved, asked_digests_Q).any(axis=1)
    return replace(evaluation, held_already=int(held.sum()))


def truths_in_label_set(
    labels: Sequence[str | None], stored: LiveEntries, live: LiveEntries, mapped: Mapping[str, str]
) -> list[str | None]:
    """The labels of queries translated to a label set; None for a label that the set has no word for.

    A query's label is translated in the same way as an entry's stored label. A label in the map becomes the mapped
    label. A label that entries are stored under but that the set leaves out becomes None. Any other label is taken as
    a label of the set itself. An unknown label is not changed, and counts as wrong.
    """
    in_set = {label for label, count in zip(live.labels, live.label_counts(), strict=True) if count}
    left_out = {label for label, count in zip(stored.labels, stored.label_counts(), strict=True) if count} - in_set
    return [mapped.get(label, None if label in left_out else label) if label is not None else None for label in labels]


def evaluate_leave_one_out(
    live: LiveEntries,
    ks: Sequence[int],
    rule: VotingRule,
    version: int,
    digests: Digests,
    votings: Sequence[Voting] = VOTINGS,
) -> Evaluation:
    """Score every labelled entry as a query, which can find neither itself nor an entry with the same bytes.

    Raises SourceError if there is no labelled entry.
    """
    for k in ks:
        check_k(k)
    ids = live.live_ids(labelled=True)
    if not len(ids):
        way = "`relabel --label-set` gives some" if live.label_set else "add images in class sub-folders"
        if live.where is not None:
            way = f"the others do not satisfy where: {live.where}" if live.whole.label_counts().any() else way
        raise SourceError(f"the memory has no entry with a label{_in_set(live)} to ask about: {way}")
    asked = _leave_one_out(live, ids, max(ks), digests)
    return _evaluation(asked, live, live.labels, Scoring(ks, votings, rule), version, 0)


def best_balance(live: LiveEntries, k: int, rule: VotingRule, digests: Digests) -> float:
    """The balance with the best balanced accuracy in leave-one-out over a sample drawn evenly from the classes.

    Each query leaves out its own entry and all entries with the same bytes. The balance is 0 if no entry has a label.
    """
    counts_C = live.label_counts()
    if not counts_C.any():
        return 0.0
    sample = draw(live, each_of(counts_C))
    retrieved = search_others(live, digests, sample.vectors_ND.astype(np.float32), k, sample.ids_N)
    return balance_by(sample, retrieved.similarities_QK, retrieved.codes_QK, counts_C, rule, k)


def balance_by(
    sample: Sample,
    similarities_QK: np.ndarray,
    codes_QK: np.ndarray,
    counts_C: np.ndarray,
    rule: VotingRule,
    k: int,
) -> float:
    """The balance with the best balanced accuracy on a sample, whose neighbours do not include its own entries."""
    truths_Q = sample.codes_N.astype(np.int64)
    return choose_balance(LabelledNeighbors(similarities_QK, codes_QK, truths_Q, counts_C), rule, k)


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


def _leave_one_out(live: LiveEntries, ids: np.ndarray, k: int, digests: Digests) -> LabelledNeighbors:
    retrieved = search_others(live, digests, live.vectors_of(ids), k, ids)
    return LabelledNeighbors(
        retrieved.similarities_QK, retrieved.codes_QK, live.codes_of(ids).astype(np.int64), live.label_counts()
    )


def _evaluation(
    asked: LabelledNeighbors,
    live: LiveEntries,
    names: Sequence[str],
    scoring: Scoring,
    version: int,
    skipped: int,
) -> Evaluation:
    rule, ks, votings = scoring.rule, scoring.ks, scoring.votings
    scores = score_all(asked, rule, sorted(set(ks)), votings)

    def named(score: Score) -> dict[str, float]:
        return {names[code]: percent for code, percent in score.by_class.items()}

    best = max(((v, k) for v in scores for k in scores[v]), key=lambda pair: scores[pair[0]][pair[1]].accuracy)
    return Evaluation(
        num_queries=len(asked.truths_Q),
        skipped=skipped,
        accuracy={v: {k: s.accuracy for k, s in by_k.items()} for v, by_k in scores.items()},
        balanced_accuracy={v: {k: s.balanced_accuracy for k, s in by_k.items()} for v, by_k in scores.items()},
        best=best,
        by_label={v: {k: named(s) for k, s in by_k.items()} for v, by_k in scores.items()},
        balance=rule.balance,
        version=version,
        label_set=live.label_set,
        where=live.where,
    )


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


def _in_set(live: LiveEntries) -> str:
    return f" in the label set '{live.label_set}'" if live.label_set is not None else ""


def _with_string_keys(scores: Mapping[Voting, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    return {voting: {str(k): value for k, value in by_k.items()} for voting, by_k in scores.items()}

"""Scores of votings on queries with known labels, or on the entries themselves, each asked about without itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import numpy as np

from pipeline.decisions.evaluation import LabelledNeighbors, Score, score_all
from pipeline.decisions.question import check_k
from pipeline.decisions.voting import VOTINGS, Voting, VotingRule
from pipeline.errors import SourceError
from pipeline.index.search.leave_one_out import copies_among
from pipeline.index.search.live_entries import LiveEntries, Restrictions
from pipeline.questions.balance import best_balance, leave_one_out
from pipeline.store.lookup.digests import Digests
from pipeline.tabular import Tabular


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


class EvaluationOptions(TypedDict, total=False):
    """The options of an evaluation that are options of a question too, as keywords."""

    balance: float | Literal["auto"]
    label_set: str | None
    where: str | None


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
    asked = leave_one_out(live, ids, max(ks), digests)
    return _evaluation(asked, live, live.labels, Scoring(ks, votings, rule), version, 0)


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


def _with_string_keys(scores: Mapping[Voting, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    return {voting: {str(k): value for k, value in by_k.items()} for voting, by_k in scores.items()}


def _in_set(live: LiveEntries) -> str:
    return f" in the label set '{live.label_set}'" if live.label_set is not None else ""

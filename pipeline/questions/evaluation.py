"""Scores of votings on queries with known labels, or on the entries themselves, each asked about without itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import numpy as np

from pipeline.decisions.evaluation import (
    LabelledNeighbors,
    Score,
    right_answers,
    sampling_error,
    score_all,
    score_of,
)
from pipeline.decisions.question import check_k
from pipeline.decisions.voting import VOTINGS, Voting, VotingRule
from pipeline.errors import SourceError, UsageError
from pipeline.index.search.leave_one_out import copies_among, search_others
from pipeline.index.search.live_entries import LiveEntries, Restrictions
from pipeline.index.search.sampling import draw_simply
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.questions.balance import best_balance
from pipeline.store.lookup.digests import Digests
from pipeline.tabular import Tabular

SAMPLED_ABOVE = 100_000  # labelled entries: asking about all of 1,000,000 takes 35 s, of 10,000,000 an hour
DEFAULT_SAMPLE = 10_000  # queries: the accuracy is then known to within 1 percent, in 95 of 100 samples
QUERIES_AT_ONCE = 1_024  # of leave-one-out: their vectors and neighbours are held at once
ASKING = "asking about entries"

SampleSize = int | Literal["all"] | None


@dataclass(frozen=True)
class Evaluation(Tabular):
    """Scores of each voting at each k.

    `skipped` counts the queries that could not be asked: `unreadable` images could not be read, the label set has no
    word for the labels of `without_word` queries, and the other queries had no label.

    `held_already` counts the queries whose image bytes the memory holds. The memory recognises such images, so their
    scores do not predict the scores of other images. It is None in leave-one-out, which leaves such entries out.

    `by_label` is the percentage of right decisions for each true label, by voting and k. `best` is the voting and k
    with the best overall accuracy.

    `labelled` counts the labelled entries that leave-one-out chose its queries from; it is None for images of a source.
    `sampling_error` is set if the queries are only a sample of them: how far off each accuracy may be, in percent, by
    voting and k (95% interval).
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
    labelled: int | None = None
    sampling_error: dict[Voting, dict[int, float]] | None = None

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
            "labelled": self.labelled,
            "sampling_error": _with_string_keys(self.sampling_error) if self.sampling_error is not None else None,
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
    scores = score_all(asked, rule, sorted(set(ks)), scoring.votings)
    evaluation = _evaluation(scores, live, names, rule, version, len(truths_Q), skipped)
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
    scoring: Scoring,
    version: int,
    digests: Digests,
    sample: SampleSize = None,
    on_progress: OnProgress = ignore_progress,
) -> Evaluation:
    """Score labelled entries as queries; a query can find neither itself nor an entry with the same bytes.

    `sample` is the number of entries to ask about, a simple random sample; "all" or 0 asks about all. None asks about
    all up to SAMPLED_ABOVE labelled entries, and about DEFAULT_SAMPLE of more. Vectors and neighbours of
    QUERIES_AT_ONCE queries are held at a time; of an entry asked about stay 13 bytes, and one for each voting and k.

    Raises SourceError if there is no labelled entry. Raises UsageError for an impossible size.
    """
    for k in scoring.ks:
        check_k(k)
    size = _checked_size(sample)
    counts_C = live.label_counts()
    labelled = int(counts_C.sum())
    if not labelled:
        way = "`relabel --label-set` gives some" if live.label_set else "add images in class sub-folders"
        if live.where is not None:
            way = f"the others do not satisfy where: {live.where}" if live.whole.label_counts().any() else way
        raise SourceError(f"the memory has no entry with a label{_in_set(live)} to ask about: {way}")
    rule, ks = scoring.rule, sorted(set(scoring.ks))
    if scoring.auto_balance:
        rule = replace(rule, balance=best_balance(live, max(ks), rule, digests))
    if size is None:
        size = DEFAULT_SAMPLE if labelled > SAMPLED_ABOVE else labelled
    ids_Q, codes_Q = draw_simply(live, size or labelled)
    rights: dict[tuple[Voting, int], list[np.ndarray]] = {(v, k): [] for v in scoring.votings for k in ks}
    for start in range(0, len(ids_Q), QUERIES_AT_ONCE):
        on_progress(Progress(ASKING, start, len(ids_Q)))
        own = slice(start, start + QUERIES_AT_ONCE)
        found = search_others(live, digests, live.vectors_of(ids_Q[own]), max(ks), ids_Q[own])
        asked = LabelledNeighbors(found.similarities_QK, found.codes_QK, codes_Q[own].astype(np.int64), counts_C)
        for (voting, k), right in rights.items():
            right.append(right_answers(asked, replace(rule, voting=voting), k))
    on_progress(Progress(ASKING, len(ids_Q), len(ids_Q)))
    scores = {v: {k: score_of(np.concatenate(rights[v, k]), codes_Q) for k in ks} for v in scoring.votings}
    found_out = replace(_evaluation(scores, live, live.labels, rule, version, len(ids_Q)), labelled=labelled)
    if len(ids_Q) == labelled:
        return found_out
    errors = {
        v: {k: sampling_error(percent, len(ids_Q), labelled) for k, percent in by_k.items()}
        for v, by_k in found_out.accuracy.items()
    }
    return replace(found_out, sampling_error=errors)


def _checked_size(sample: SampleSize) -> int | None:
    """The number of entries to ask about: 0 for all, None for the default. Raises UsageError."""
    if sample is None or sample == "all":
        return None if sample is None else 0
    if isinstance(sample, bool) or not isinstance(sample, (int, np.integer)) or sample < 0:
        raise UsageError(f"`sample` {sample} is not a number of entries: give 1 or more, or all (0) to ask about all")
    return int(sample)


def _evaluation(
    scores: Mapping[Voting, Mapping[int, Score]],
    live: LiveEntries,
    names: Sequence[str],
    rule: VotingRule,
    version: int,
    num_queries: int,
    skipped: int = 0,
) -> Evaluation:
    def named(score: Score) -> dict[str, float]:
        return {names[code]: percent for code, percent in score.by_class.items()}

    best = max(((v, k) for v in scores for k in scores[v]), key=lambda pair: scores[pair[0]][pair[1]].accuracy)
    return Evaluation(
        num_queries=num_queries,
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

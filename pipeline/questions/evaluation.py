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
    score_of_counts,
)
from pipeline.decisions.question import check_k
from pipeline.decisions.voting import VOTINGS, Voting, VotingRule
from pipeline.errors import SourceError, UsageError
from pipeline.index.search.leave_one_out import copies_among
from pipeline.index.search.live_entries import LiveEntries, Restrictions
from pipeline.index.search.sampling import draw_simply
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.questions.balance import best_balance
from pipeline.questions.others import Others, others_of, others_of_all
from pipeline.store.lookup.digests import Digests
from pipeline.tabular import Tabular

SAMPLED_ABOVE = 100_000  # labelled entries: asking about all of 1,000,000 takes 35 s, of 10,000,000 an hour
DEFAULT_SAMPLE = 10_000  # queries: the accuracy is then known to within 1 percent, in 95 of 100 samples
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


def told(options: EvaluationOptions, method: str) -> tuple[float | Literal["auto"], str | None, str | None]:
    """The balance, the label set and the expression in keywords of a method. Raises TypeError for any other keyword."""
    if unknown := set(options) - set(EvaluationOptions.__annotations__):
        raise TypeError(f"{method}() got an unexpected keyword argument '{min(unknown)}'")
    return options.get("balance", 0.0), options.get("label_set"), options.get("where")


@dataclass(frozen=True)
class Scoring:
    """The votings and the values of k to score. With `auto_balance` the balance of `rule` is measured first."""

    ks: Sequence[int]
    votings: Sequence[Voting] = VOTINGS
    rule: VotingRule = VotingRule()
    auto_balance: bool = False

    @property
    def sorted_ks(self) -> list[int]:
        """The values of k, each once, ascending."""
        return sorted(set(self.ks))

    @property
    def keys(self) -> list[tuple[Voting, int]]:
        """Each voting with each k."""
        return [(voting, k) for voting in self.votings for k in self.sorted_ks]

    def balanced_by(self, balance: float) -> "Scoring":
        """This scoring with a balance that is known."""
        return replace(self, rule=replace(self.rule, balance=balance), auto_balance=False)


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


class Rights:
    """Counts, for each class, the entries asked about, and the right decisions of each voting at each k.

    Holds 8 bytes for each class, voting and k, however many entries are asked about.
    """

    def __init__(self, live: LiveEntries, scoring: Scoring) -> None:
        self._scoring = scoring
        self.asked_C = np.zeros(len(live.labels), np.int64)
        self._rights = {key: np.zeros(len(live.labels), np.int64) for key in scoring.keys}

    @property
    def num_queries(self) -> int:
        """The number of entries asked about."""
        return int(self.asked_C.sum())

    def count(self, codes_Q: np.ndarray, rights: Mapping[tuple[Voting, int], np.ndarray]) -> None:
        """Count entries by their label codes (int [Q]) and by whether they were decided rightly (bool [Q])."""
        self.asked_C += np.bincount(codes_Q, minlength=len(self.asked_C))
        for key, right_Q in rights.items():
            self._rights[key] += np.bincount(codes_Q[right_Q], minlength=len(self.asked_C))

    def scores(self) -> dict[Voting, dict[int, Score]]:
        """The score of each voting at each k."""
        classes_C = np.flatnonzero(self.asked_C)

        def score(key: tuple[Voting, int]) -> Score:
            return score_of_counts(classes_C, self.asked_C[classes_C], self._rights[key][classes_C])

        return {v: {k: score((v, k)) for k in self._scoring.sorted_ks} for v in self._scoring.votings}


def rights_among(others: Others, scoring: Scoring, counts_C: np.ndarray) -> dict[tuple[Voting, int], np.ndarray]:
    """Which entries each voting at each k decides rightly, bool [Q]; `counts_C` are the live entries of each label."""
    found = others.found
    asked = LabelledNeighbors(found.similarities_QK, found.codes_QK, others.codes_Q.astype(np.int64), counts_C)
    return {(v, k): right_answers(asked, replace(scoring.rule, voting=v), k) for v, k in scoring.keys}


def check_labelled(live: LiveEntries) -> int:
    """The number of labelled entries. Raises SourceError if there is none."""
    labelled = int(live.label_counts().sum())
    if not labelled:
        way = "`relabel --label-set` gives some" if live.label_set else "add images in class sub-folders"
        if live.where is not None:
            way = f"the others do not satisfy where: {live.where}" if live.whole.label_counts().any() else way
        raise SourceError(f"the memory has no entry with a label{_in_set(live)} to ask about: {way}")
    return labelled


def balanced(live: LiveEntries, scoring: Scoring, digests: Digests) -> Scoring:
    """The scoring with its balance measured, if it is to be."""
    if not scoring.auto_balance:
        return scoring
    return scoring.balanced_by(best_balance(live, max(scoring.ks), scoring.rule, digests))


def evaluate_leave_one_out(
    live: LiveEntries,
    scoring: Scoring,
    version: int,
    digests: Digests,
    starts: Sequence[int],
    sample: SampleSize = None,
    on_progress: OnProgress = ignore_progress,
) -> Evaluation:
    """Score labelled entries as queries; a query can find neither itself nor an entry with the same bytes.

    `sample` is the number of entries to ask about, a simple random sample; "all" or 0 asks about all, in the parts that
    begin at the ids `starts`. None asks about all up to SAMPLED_ABOVE labelled entries, and about DEFAULT_SAMPLE of
    more. Vectors and neighbours of QUERIES_AT_ONCE queries are held at a time, and counts for each class.

    Raises SourceError if there is no labelled entry. Raises UsageError for an impossible size.
    """
    for k in scoring.ks:
        check_k(k)
    checked_size(sample)
    labelled = check_labelled(live)
    scoring = balanced(live, scoring, digests)
    size = num_asked(sample, labelled)
    if size < labelled:
        batches = others_of(live, digests, max(scoring.ks), *draw_simply(live, size))
    else:
        batches = others_of_all(live, digests, max(scoring.ks), starts)
    rights = Rights(live, scoring)
    on_progress(Progress(ASKING, 0, size))
    for others in batches:
        rights.count(others.codes_Q, rights_among(others, scoring, live.label_counts()))
        on_progress(Progress(ASKING, rights.num_queries, size))
    return evaluation_of(rights, live, scoring, version, labelled)


def evaluation_of(rights: Rights, live: LiveEntries, scoring: Scoring, version: int, labelled: int) -> Evaluation:
    """The evaluation by counts of right decisions about entries, out of so many labelled ones."""
    asked = rights.num_queries
    found_out = _evaluation(rights.scores(), live, live.labels, scoring.rule, version, asked)
    found_out = replace(found_out, labelled=labelled)
    if asked == labelled:
        return found_out
    errors = {
        v: {k: sampling_error(percent, asked, labelled) for k, percent in by_k.items()}
        for v, by_k in found_out.accuracy.items()
    }
    return replace(found_out, sampling_error=errors)


def checked_size(sample: SampleSize) -> int | None:
    """The number of entries to ask about: 0 for all, None for the default. Raises UsageError."""
    if sample is None or sample == "all":
        return None if sample is None else 0
    if isinstance(sample, bool) or not isinstance(sample, (int, np.integer)) or sample < 0:
        raise UsageError(f"`sample` {sample} is not a number of entries: give 1 or more, or all (0) to ask about all")
    return int(sample)


def num_asked(sample: SampleSize, labelled: int) -> int:
    """How many of the labelled entries are asked about. Raises UsageError for an impossible size."""
    size = checked_size(sample)
    if size is None:
        size = DEFAULT_SAMPLE if labelled > SAMPLED_ABOVE else labelled
    return min(size or labelled, labelled)


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

"""What entries sway: the decisions in which they vote, and those that would be others without them.

Each question is decided twice: by the entries as they are, and as they would be after a change. The change makes the
same blocks as forgetting or relabelling does, so the second answers are those of a memory that was changed.

Shapes: Q queries, K neighbours, D dimensions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pipeline.decisions.evaluation import Score, score_of_counts
from pipeline.decisions.neighbor_table import values_by_id
from pipeline.decisions.question import check_k
from pipeline.decisions.voting import Votes, VotingRule, count_votes
from pipeline.errors import SourceError
from pipeline.index.search.leave_one_out import search_others
from pipeline.index.search.live_entries import LiveEntries, Restrictions, Retrieved
from pipeline.index.search.sampling import draw_simply
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.questions.evaluation import ASKING, SampleSize, check_labelled, num_asked
from pipeline.questions.others import QUERIES_AT_ONCE, labelled_in_part
from pipeline.store.lookup.digests import Digests
from pipeline.store.tables.ids import is_in
from pipeline.tabular import Tabular


@dataclass(frozen=True)
class Change:
    """What is supposed: `forgotten` ids (int64 [N], ascending), labels by id, and factors of weights by id."""

    forgotten: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    assume: Mapping[int, str] = field(default_factory=dict)
    weigh: Mapping[int, float] = field(default_factory=dict)

    @property
    def ids(self) -> np.ndarray:
        """All ids that it is about, int64 [N], ascending."""
        named = np.array([*self.assume, *self.weigh], np.int64)
        return np.union1d(self.forgotten, named)


@dataclass(frozen=True)
class Asked:
    """Questions: vectors float32 [Q, D], uris, and true labels (None: not known).

    `own_Q` are the ids of entries that ask about themselves (leave-one-out), each left out of its own answer.
    """

    vectors_QD: np.ndarray
    uris: Sequence[str]
    truths: Sequence[str | None]
    own_Q: np.ndarray | None = None


class Questions(NamedTuple):
    """Questions in batches, their number, and that of all there are."""

    batches: Iterator[Asked]
    num_questions: int
    asked_of: int


@dataclass(frozen=True)
class Swayed:
    """A decision in which the entries vote. `share` is their fraction of its votes; None is an abstention."""

    uri: str
    id: int | None
    truth: str | None
    share: float
    before: str | None
    after: str | None

    @property
    def flips(self) -> bool:
        """Whether the change makes another decision."""
        return self.before != self.after

    def to_json(self) -> dict:
        """The decision as a JSON object."""
        return {
            "uri": self.uri,
            "id": self.id,
            "truth": self.truth,
            "share": self.share,
            "before": self.before,
            "after": self.after,
            "flips": self.flips,
        }


@dataclass(frozen=True)
class InfluenceReport(Tabular):
    """The influence of `entries` on decisions about questions.

    `num_questions` were decided before the change, of `asked_of` that there are; they vote in `voted_in` of them, with
    `mean_share` of the votes on average over these. `flips` decisions change, of which `mended` become right and
    `spoiled` wrong. `before` and `after` are the accuracies that an evaluation gives before and after the change (None
    without true labels); after it, forgotten entries no longer ask. `by_label` has the percentages of right decisions
    for each true label, before and after (None if nothing asks with it). `swayed` are the first of the decisions: those
    that flip, then those with the largest shares. `unreadable` images of a source could not be read, and the label set
    has no word for the labels of `without_word`: these are asked about without a true label.
    """

    entries: int
    num_questions: int
    asked_of: int
    voted_in: int
    mean_share: float
    flips: int
    mended: int
    spoiled: int
    before: Score | None
    after: Score | None
    by_label: dict[str, tuple[float | None, float | None]]
    swayed: tuple[Swayed, ...]
    k: int
    voting: str
    version: int
    label_set: str | None = None
    unreadable: int = 0
    without_word: int = 0

    def _rows(self) -> list[dict[str, Any]]:
        """One row for each decision."""
        return [each.to_json() for each in self.swayed]

    def to_json(self) -> dict:
        """The report as a JSON object. Accuracies are in percent."""
        scores = (("before", self.before), ("after", self.after))
        return {
            "entries": self.entries,
            "num_questions": self.num_questions,
            "asked_of": self.asked_of,
            "voted_in": self.voted_in,
            "mean_share": self.mean_share,
            "flips": self.flips,
            "mended": self.mended,
            "spoiled": self.spoiled,
            "accuracy": {when: score.accuracy if score else None for when, score in scores},
            "balanced_accuracy": {when: score.balanced_accuracy if score else None for when, score in scores},
            "by_label": {name: {"before": b, "after": a} for name, (b, a) in self.by_label.items()},
            "k": self.k,
            "voting": self.voting,
            "version": self.version,
            "label_set": self.label_set,
            "unreadable": self.unreadable,
            "without_word": self.without_word,
            "swayed": [each.to_json() for each in self.swayed],
        }


def influence(
    live: LiveEntries,
    digests: Digests,
    change: Change,
    questions: Questions,
    k: int,
    rule: VotingRule,
    version: int,
    limit: int,
    on_progress: OnProgress = ignore_progress,
) -> InfluenceReport:
    """Decide about each question with and without the change. Costs two searches for each question.

    Holds QUERIES_AT_ONCE questions at a time, and the decisions in which the entries vote. Raises DamagedFile.
    """
    check_k(k)
    batches, num_questions, asked_of = questions
    changed = live.supposing(change.forgotten, change.assume)
    tally = _Tally(changed.labels)
    on_progress(Progress(ASKING, 0, num_questions))
    for asked in batches:
        now = _decided(live, digests, asked, k, rule, {})
        then = _decided(changed, digests, asked, k, rule, change.weigh)
        tally.count(asked, change, now, then)
        on_progress(Progress(ASKING, tally.num_questions, num_questions))
    return tally.report(change, asked_of, k, rule, version, limit, live.label_set)


def entries_as_questions(live: LiveEntries, starts: Sequence[int], sample: SampleSize) -> Questions:
    """Labelled entries as questions.

    All are asked about up to SAMPLED_ABOVE, and DEFAULT_SAMPLE of more, as in an evaluation. Raises SourceError.
    """
    labelled = check_labelled(live)
    size = num_asked(sample, labelled)
    if size < labelled:
        batches = iter([draw_simply(live, size)])
    else:
        batches = (labelled_in_part(live, starts, part) for part in range(len(starts)))

    def questions() -> Iterator[Asked]:
        for ids_N, codes_N in batches:
            for start in range(0, len(ids_N), QUERIES_AT_ONCE):
                some = slice(start, start + QUERIES_AT_ONCE)
                uris = [uri for uri, _ in live.described(ids_N[some])]
                truths = [live.labels[code] for code in codes_N[some].tolist()]
                yield Asked(live.vectors_of(ids_N[some]), uris, truths, ids_N[some])

    return Questions(questions(), size, labelled)


def images_as_questions(vectors_QD: np.ndarray, uris: Sequence[str], truths: Sequence[str | None]) -> Questions:
    """Embedded images as questions. Raises SourceError if there is none."""
    if not len(vectors_QD):
        raise SourceError("there is no image to ask about: mend the files")

    def questions() -> Iterator[Asked]:
        for start in range(0, len(vectors_QD), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            yield Asked(vectors_QD[some], uris[some], truths[some])

    return Questions(questions(), len(vectors_QD), len(vectors_QD))


def _decided(
    live: LiveEntries, digests: Digests, asked: Asked, k: int, rule: VotingRule, weigh: Mapping[int, float]
) -> tuple[Retrieved, Votes]:
    """The neighbours of each question, and their votes."""
    if asked.own_Q is None:
        found = live.search(asked.vectors_QD, k, Restrictions("labelled"))
    else:
        found = search_others(live, digests, asked.vectors_QD, k, asked.own_Q)
    reliabilities_QK = values_by_id(found.ids_QK, weigh, np.ones(found.ids_QK.shape)) if weigh else None
    return found, count_votes(found.similarities_QK, found.codes_QK, rule, live.label_counts(), reliabilities_QK)


class _Tally:
    """Counts decisions before and after a change. `labels` are those after it, which begin with those before it."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self._codes = {label: code for code, label in enumerate(labels)}
        self._unknown: dict[str, int] = {}  # true labels that no entry has: such a question counts as wrong
        self.num_questions = 0
        self._swayed: list[Swayed] = []
        self._mended = self._spoiled = 0
        self._asked, self._right = ({when: dict[int, int]() for when in ("before", "after")} for _ in range(2))

    def count(self, asked: Asked, change: Change, now: tuple[Retrieved, Votes], then: tuple[Retrieved, Votes]) -> None:
        """Count some questions, decided now and then."""
        found, votes = now
        voting_QK = is_in(found.ids_QK.ravel(), change.ids).reshape(found.ids_QK.shape)
        shares_Q = np.where(voting_QK, votes.weights_QK, 0.0).sum(axis=1)
        after_Q = then[1].winners_Q
        own = asked.own_Q if asked.own_Q is not None else np.full(len(asked.uris), -1, np.int64)
        gone_Q = is_in(own, change.forgotten)
        for query, truth in enumerate(asked.truths):
            before, after = int(votes.winners_Q[query]), int(after_Q[query])
            is_gone = bool(gone_Q[query])
            self._score("before", truth, before, relabelled=None)
            if not is_gone:
                self._score("after", truth, after, relabelled=change.assume.get(int(own[query])))
            if not is_gone and before != after and truth is not None:
                now_right = before == self._codes.get(truth)
                then_right = after == self._codes.get(change.assume.get(int(own[query])) or truth)
                self._mended += then_right and not now_right
                self._spoiled += now_right and not then_right
            if not is_gone and (before != after or voting_QK[query].any()):
                self._swayed.append(
                    Swayed(
                        uri=asked.uris[query],
                        id=int(own[query]) if asked.own_Q is not None else None,
                        truth=truth,
                        share=float(shares_Q[query]),
                        before=self._labels[before] if before >= 0 else None,
                        after=self._labels[after] if after >= 0 else None,
                    )
                )
        self.num_questions += len(asked.uris)

    def _score(self, when: str, truth: str | None, winner: int, relabelled: str | None) -> None:
        truth = relabelled or truth
        if truth is None:
            return
        code = self._codes.get(truth)
        if code is None:
            code = len(self._labels) + self._unknown.setdefault(truth, len(self._unknown))
        self._asked[when][code] = self._asked[when].get(code, 0) + 1
        self._right[when][code] = self._right[when].get(code, 0) + (winner == code)

    def _scored(self, when: str) -> Score | None:
        classes = sorted(self._asked[when])
        if not classes:
            return None
        counts = (np.array([of[when][code] for code in classes], np.int64) for of in (self._asked, self._right))
        return score_of_counts(np.array(classes), *counts)

    def report(
        self, change: Change, asked_of: int, k: int, rule: VotingRule, version: int, limit: int, label_set: str | None
    ) -> InfluenceReport:
        """The report of all questions that were counted."""
        before, after = self._scored("before"), self._scored("after")
        names = [*self._labels, *self._unknown]
        codes = sorted({*(before.by_class if before else ()), *(after.by_class if after else ())})
        percents = [tuple(score.by_class.get(code) if score else None for score in (before, after)) for code in codes]
        voted = [each.share for each in self._swayed if each.share > 0]
        flips = [each for each in self._swayed if each.flips]
        ordered = sorted(self._swayed, key=lambda each: (not each.flips, -each.share, each.uri))
        return InfluenceReport(
            entries=len(change.ids),
            num_questions=self.num_questions,
            asked_of=asked_of,
            voted_in=len(voted),
            mean_share=float(np.mean(voted)) if voted else 0.0,
            flips=len(flips),
            mended=self._mended,
            spoiled=self._spoiled,
            before=before,
            after=after,
            by_label={names[code]: (b, a) for code, (b, a) in zip(codes, percents, strict=True)},
            swayed=tuple(ordered[:limit]),
            k=k,
            voting=rule.voting,
            version=version,
            label_set=label_set,
        )

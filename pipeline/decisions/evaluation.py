"""Compares decisions with known labels: accuracy at each k for each voting, and the best balance for all classes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.decisions.voting import VOTINGS, Voting, VotingRule, count_votes

DEFAULT_KS = (1, 10, 50, 100)
BALANCES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


@dataclass(frozen=True)
class LabelledNeighbors:
    """Retrieved neighbours of queries whose labels are known.

    similarities_QK is float, codes_QK int (-1: no neighbour), truths_Q int. The truth -1 is a label that no class has;
    such a query counts as wrong.
    """

    similarities_QK: np.ndarray
    codes_QK: np.ndarray
    truths_Q: np.ndarray
    class_counts_C: np.ndarray


@dataclass(frozen=True)
class Score:
    """Percentages of right queries: of all (accuracy), averaged over true classes (balanced), and of each class."""

    accuracy: float
    balanced_accuracy: float
    by_class: dict[int, float]


def score(asked: LabelledNeighbors, rule: VotingRule, k: int) -> Score:
    """Score one rule on the first k neighbours."""
    return score_of(right_answers(asked, rule, k), asked.truths_Q)


def right_answers(asked: LabelledNeighbors, rule: VotingRule, k: int) -> np.ndarray:
    """Which queries one rule decides rightly on the first k neighbours, bool [Q]."""
    votes = count_votes(asked.similarities_QK[:, :k], asked.codes_QK[:, :k], rule, asked.class_counts_C)
    right_Q: np.ndarray = (votes.winners_Q == asked.truths_Q) & (asked.truths_Q >= 0)
    return right_Q


def score_of(right_Q: np.ndarray, truths_Q: np.ndarray) -> Score:
    """The score of queries of which it is known whether they were decided rightly (bool [Q], truths int [Q])."""
    classes, of_class_Q = np.unique(truths_Q, return_inverse=True)
    return score_of_counts(classes, np.bincount(of_class_Q), np.bincount(of_class_Q, right_Q))


def score_of_counts(classes_C: np.ndarray, asked_C: np.ndarray, right_C: np.ndarray) -> Score:
    """The score by counts of queries, and of right decisions, for each true class (int [C]) that was asked about.

    Counts are whole numbers, so the score is the same however the queries were split and counted.
    """
    percents = right_C / asked_C * 100
    by_class = dict(zip(classes_C.tolist(), percents.tolist(), strict=True))
    accuracy = float(right_C.sum() / asked_C.sum() * 100) if len(classes_C) else 0.0
    return Score(accuracy, float(np.mean(list(by_class.values()))) if by_class else 0.0, by_class)


def score_all(
    asked: LabelledNeighbors, rule: VotingRule, ks: Sequence[int], votings: Sequence[Voting] = VOTINGS
) -> dict[Voting, dict[int, Score]]:
    """The score of each voting at each k, with the constants and the balance of `rule`."""
    return {v: {k: score(asked, replace(rule, voting=v), k) for k in ks} for v in votings}


def sampling_error(percent: float, num_queries: int, population: int) -> float:
    """How far off a percentage may be that was measured on a simple random sample: its 95% interval, in percent.

    It is the distance to the farther end of Wilson's interval (JASA 22, 1927), which holds near 0 and 100 too. Drawing
    without replacement makes it shorter (finite population correction): it is 0 if the sample is the population.
    """
    if num_queries >= population:
        return 0.0
    z2 = 1.959964**2
    share, n = percent / 100, num_queries * (population - 1) / (population - num_queries)
    off_centre = z2 * abs(0.5 - share) / n
    half_width = np.sqrt(z2 * share * (1 - share) / n + (z2 / (2 * n)) ** 2)
    return float(100 * (off_centre + half_width) / (1 + z2 / n))


def choose_balance(asked: LabelledNeighbors, rule: VotingRule, k: int) -> float:
    """The balance with the best balanced accuracy on leave-one-out queries; the smallest one if several are equal."""
    return max(BALANCES, key=lambda tau: (score(asked, replace(rule, balance=tau), k).balanced_accuracy, -tau))

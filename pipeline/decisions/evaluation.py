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
    votes = count_votes(asked.similarities_QK[:, :k], asked.codes_QK[:, :k], rule, asked.class_counts_C)
    right_Q = (votes.winners_Q == asked.truths_Q) & (asked.truths_Q >= 0)
    classes, of_class_Q = np.unique(asked.truths_Q, return_inverse=True)
    percents = np.bincount(of_class_Q, right_Q) / np.bincount(of_class_Q) * 100
    by_class = dict(zip(classes.tolist(), percents.tolist(), strict=True))
    accuracy = float(right_Q.mean() * 100) if len(right_Q) else 0.0
    return Score(accuracy, float(np.mean(list(by_class.values()))) if by_class else 0.0, by_class)


def score_all(
    asked: LabelledNeighbors, rule: VotingRule, ks: Sequence[int], votings: Sequence[Voting] = VOTINGS
) -> dict[Voting, dict[int, Score]]:
    """The score of each voting at each k, with the constants and the balance of `rule`."""
    return {v: {k: score(asked, replace(rule, voting=v), k) for k in ks} for v in votings}


def choose_balance(asked: LabelledNeighbors, rule: VotingRule, k: int) -> float:
    """The balance with the best balanced accuracy on leave-one-out queries; the smallest one if several are equal."""
    return max(BALANCES, key=lambda tau: (score(asked, replace(rule, balance=tau), k).balanced_accuracy, -tau))

"""Scores against counts made by hand, and the balance that helps a small class."""

import numpy as np
import pytest

from pipeline.decisions.evaluation import LabelledNeighbors, choose_balance, sampling_error, score, score_all
from pipeline.decisions.voting import VOTINGS, VotingRule

ASKED = LabelledNeighbors(
    similarities_QK=np.tile(np.array([0.9, 0.8, 0.7]), (4, 1)),
    codes_QK=np.array([[0, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 1]]),
    truths_Q=np.array([0, 0, 1, -1]),
    class_counts_C=np.array([6, 6]),
)


def test_accuracy_at_k() -> None:
    assert score(ASKED, VotingRule("plurality"), k=1).accuracy == 50.0  # the truth -1 is right for nobody
    third = score(ASKED, VotingRule("plurality"), k=3)
    assert third.accuracy == 50.0
    assert third.by_class == {-1: 0.0, 0: 50.0, 1: 100.0}
    assert third.balanced_accuracy == pytest.approx(50.0)


def test_all_votings_and_ks() -> None:
    scores = score_all(ASKED, VotingRule(), [1, 3])
    assert set(scores) == set(VOTINGS)
    assert {k for by_k in scores.values() for k in by_k} == {1, 3}
    assert {by_k[1].accuracy for by_k in scores.values()} == {50.0}


def test_balance_is_chosen_where_a_class_is_small() -> None:
    generator = np.random.default_rng(0)
    # Class 1 has 3 entries among 300: near its queries one neighbour of ten is of class 1, and it is among the first.
    codes = np.zeros((200, 10), int)
    codes[100:, 1] = 1
    truths = np.repeat([0, 1], 100)
    asked = LabelledNeighbors(-np.sort(-generator.random((200, 10)), axis=1), codes, truths, np.array([297, 3]))
    assert score(asked, VotingRule(), 10).by_class == {0: 100.0, 1: 0.0}
    tau = choose_balance(asked, VotingRule(), 10)
    assert tau > 0
    assert score(asked, VotingRule(balance=tau), 10).by_class == {0: 100.0, 1: 100.0}
    even = LabelledNeighbors(asked.similarities_QK, np.zeros((200, 10), int), np.zeros(200, int), np.array([150, 150]))
    assert choose_balance(even, VotingRule(), 10) == 0.0


@pytest.mark.parametrize("percent", [0.0, 2.0, 50.0, 97.0, 100.0])
def test_the_sampling_error_covers_the_truth_in_95_of_100_samples(percent: float) -> None:
    population, size = 5_000, 400
    right_N = np.arange(population) < population * percent / 100
    rng = np.random.default_rng(0)
    near = 0
    for _ in range(400):
        found = float(rng.choice(right_N, size, replace=False).mean() * 100)
        near += abs(found - percent) <= sampling_error(found, size, population)
    assert near / 400 > 0.92
    assert sampling_error(percent, population, population) == 0
    assert sampling_error(percent, size, population) > 0

"""Agreement of neighbours with those they are near to: counts, and KNN-Shapley values against the formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decisions.reliability import Agreements, shapley_values


def by_the_formula(agrees: list[bool], voters: int) -> list[float]:
    """The values of one list: s_T = 0; s_j = s_(j+1) + (m_j - m_(j+1)) / voters * min(voters, j) / j."""
    values = [0.0] * len(agrees)
    for j in range(len(agrees) - 1, 0, -1):
        step = (agrees[j - 1] - agrees[j]) / voters * min(voters, j) / j
        values[j - 1] = values[j] + step
    return values


@given(st.lists(st.lists(st.booleans(), max_size=12), min_size=1, max_size=6), st.integers(1, 15))
def test_values_are_those_of_the_formula(lists: list[list[bool]], voters: int) -> None:
    width = max(map(len, lists))
    agrees_QK, present_QK = np.zeros((len(lists), width), bool), np.zeros((len(lists), width), bool)
    for query, agrees in enumerate(lists):
        agrees_QK[query, : len(agrees)] = agrees
        present_QK[query, : len(agrees)] = True
    values_QK = shapley_values(agrees_QK, present_QK, voters)
    for query, agrees in enumerate(lists):
        assert values_QK[query, : len(agrees)] == pytest.approx(by_the_formula(agrees, voters), abs=1e-12)
        assert not values_QK[query, len(agrees) :].any()


def test_one_list() -> None:
    """Two voters: the nearest agrees, the second does not, the third does, the last does not."""
    values_QK = shapley_values(np.array([[True, False, True, False]]), np.ones((1, 4), bool), 2)
    assert values_QK[0] == pytest.approx([1 / 2 - 1 / 2 + 1 / 3, -1 / 2 + 1 / 3, 1 / 3, 0])


@given(st.integers(0, 2**32 - 1))
def test_counts_do_not_depend_on_the_order_of_lists(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows_QK = np.argsort(random.random((40, 9)), axis=1)[:, :6]
    rows_QK[random.random(40) < 0.3, 4:] = -1
    agrees_QK = (random.random((40, 6)) < 0.5) & (rows_QK >= 0)
    whole, pieces = Agreements(9, 3), Agreements(9, 3)
    whole.count(rows_QK, agrees_QK)
    order = random.permutation(40)
    for some in np.array_split(order, 7):
        pieces.count(rows_QK[some], agrees_QK[some])
    for name in ("right_N", "wrong_N", "values_N"):
        assert np.array_equal(getattr(whole, name), getattr(pieces, name))
    voting = rows_QK[:, :3]
    assert whole.right_N.tolist() == [int((agrees_QK[:, :3] & (voting == row)).sum()) for row in range(9)]
    assert whole.wrong_N.tolist() == [int((~agrees_QK[:, :3] & (voting == row)).sum()) for row in range(9)]


def test_no_list_counts_nothing() -> None:
    agreements = Agreements(3)
    agreements.count(np.full((2, 0), -1), np.zeros((2, 0), bool))
    agreements.count(np.full((2, 5), -1), np.zeros((2, 5), bool))
    assert not agreements.right_N.any()
    assert not agreements.wrong_N.any()
    assert not agreements.values_N.any()

"""The four votings against cases worked by hand, and against a slow reference written from the contract."""

import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decisions.voting import VOTINGS, VotingRule, count_votes
from pipeline.errors import UsageError
from tests.decisions.dense import dense_votes

COUNTS = np.array([10, 10, 10])


def decide(codes: list[int], similarities: list[float] | None = None, **options: object):
    rule_options = {k: v for k, v in options.items() if k in VotingRule.__dataclass_fields__}
    reliabilities = options.get("reliabilities")
    return count_votes(
        np.array([similarities or [0.9] * len(codes)]),
        np.array([codes]),
        VotingRule(**rule_options),  # type: ignore[arg-type]
        np.array(options.get("counts", COUNTS)),
        None if reliabilities is None else np.array([reliabilities]),
    )


def test_plurality_counts_heads() -> None:
    votes = decide([1, 2, 2, 0], voting="plurality")
    assert votes.winners_Q == [2]
    assert votes.confidences_Q == [0.5]
    assert votes.margins_Q == [0.25]


def test_class_0_can_win() -> None:
    votes = decide([0, 0, 1], voting="plurality")
    assert votes.winners_Q == [0]
    assert votes.confidences_Q == [pytest.approx(2 / 3)]


def test_class_0_wins_alone() -> None:
    assert decide([0], voting="rank").winners_Q == [0]


def test_rank_weights_are_one_over_rank_plus_offset() -> None:
    votes = decide([1, 0, 0], voting="rank")  # 1/2 against 1/3 + 1/4
    total = 1 / 2 + 1 / 3 + 1 / 4
    assert votes.winners_Q == [0]
    assert votes.weights_QK[0] == pytest.approx([1 / 2 / total, 1 / 3 / total, 1 / 4 / total])
    assert votes.confidences_Q == [pytest.approx((1 / 3 + 1 / 4) / total)]


def test_distance_weights_are_exp_of_minus_distance() -> None:
    votes = decide([1, 0], [0.9, 0.4], voting="distance")
    near, far = math.exp(-0.1), math.exp(-0.6)
    assert votes.weights_QK[0] == pytest.approx([near / (near + far), far / (near + far)])
    squared = decide([1, 0], [0.9, 0.4], voting="distance", exponent=2.0)
    assert squared.weights_QK[0] == pytest.approx([near**2 / (near**2 + far**2), far**2 / (near**2 + far**2)])


def test_softmax_weights_are_exp_of_similarity_over_temperature() -> None:
    votes = decide([1, 0], [0.9, 0.83], voting="softmax")
    assert votes.weights_QK[0, 0] / votes.weights_QK[0, 1] == pytest.approx(math.exp(0.07 / 0.07))


def test_softmax_does_not_overflow() -> None:
    votes = decide([1, 0], [1.0, 0.5], voting="softmax", temperature=1e-4)
    assert votes.winners_Q == [1]
    assert votes.confidences_Q == [1.0]


@pytest.mark.parametrize(
    ("codes", "winner"),
    [
        ([0, 1], 0),  # one each: class 0 was there first
        ([1, 0], 1),
        ([1, 0, 0, 1], 0),  # two each: class 0 reached two at rank 2, class 1 at rank 3
        ([2, 1, 0, 1, 2, 0], 1),
    ],
)
def test_plurality_ties_go_to_the_class_that_got_there_first(codes: list[int], winner: int) -> None:
    votes = decide(codes, voting="plurality")
    assert votes.winners_Q == [winner]
    assert votes.margins_Q == [0.0]


def test_rank_ties_follow_the_same_rule() -> None:
    # 1/2 = 1/3 + 1/6: class 0 reaches it at rank 0, class 1 at rank 4; ranks 2 and 3 vote for others, one each.
    votes = decide([0, 1, 2, 3, 1], voting="rank", counts=[1, 1, 1, 1])
    assert votes.winners_Q == [0]
    assert votes.margins_Q == [0.0]


def test_zero_weight_neighbours_do_not_reach_anything() -> None:
    # Class 1's second neighbour weighs nothing, so class 1 had reached its one vote at rank 0.
    votes = decide([1, 0, 1], voting="plurality", reliabilities=[1.0, 1.0, 0.0])
    assert votes.winners_Q == [1]


def test_reliability_multiplies_and_stays_with_its_neighbour() -> None:
    votes = decide([0, 1, 1], voting="plurality", reliabilities=[1.0, 0.2, 0.3])
    assert votes.winners_Q == [0]
    assert votes.weights_QK[0] == pytest.approx([1 / 1.5, 0.2 / 1.5, 0.3 / 1.5])


def test_balance_divides_by_class_size() -> None:
    counts = [100, 4, 1]
    assert decide([0, 0, 1], voting="plurality", counts=counts).winners_Q == [0]
    votes = decide([0, 0, 1], voting="plurality", counts=counts, balance=0.5)  # 2/10 against 1/2
    assert votes.winners_Q == [1]
    assert votes.confidences_Q == [pytest.approx(0.5 / 0.7)]
    assert votes.weights_QK[0] == pytest.approx([0.1 / 0.7, 0.1 / 0.7, 0.5 / 0.7])


def test_fewer_neighbours_than_k() -> None:
    votes = decide([1, -1, -1], [0.9, -math.inf, -math.inf], voting="softmax")
    assert votes.winners_Q == [1]
    assert votes.weights_QK[0].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("voting", VOTINGS)
def test_no_neighbour_is_no_winner(voting: str) -> None:
    votes = decide([-1, -1], [-math.inf, -math.inf], voting=voting)
    assert votes.winners_Q == [-1]
    assert (votes.confidences_Q, votes.margins_Q) == ([0.0], [0.0])


def test_all_weights_zero_is_no_winner() -> None:
    votes = decide([0, 1], voting="rank", reliabilities=[0.0, 0.0])
    assert votes.winners_Q == [-1]
    assert votes.confidences_Q == [0.0]


@pytest.mark.parametrize(
    "options", [{"voting": "most"}, {"temperature": 0.0}, {"offset": -1.0}, {"balance": -0.5}, {"balance": math.nan}]
)
def test_impossible_rules_are_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        VotingRule(**options)


def reference(similarities: list[float], codes: list[int], reliabilities: list[float], rule: VotingRule, counts):
    """The contract, one neighbour at a time: shares of each class and the winner."""
    weight = {
        "plurality": lambda i, s: 1.0,
        "distance": lambda i, s: math.exp(-(1 - s)) ** rule.exponent,
        "softmax": lambda i, s: math.exp((s - similarities[0]) / rule.temperature),
        "rank": lambda i, s: 1 / (i + rule.offset),
    }[rule.voting]
    sums: dict[int, float] = {}
    reached: dict[int, int] = {}
    for i, (s, code, reliability) in enumerate(zip(similarities, codes, reliabilities, strict=True)):
        if reliability > 0:
            sums[code] = sums.get(code, 0.0) + weight(i, s) * reliability
            reached[code] = i
    balanced = {code: total / counts[code] ** rule.balance for code, total in sums.items()}
    if not balanced:
        return {}, -1
    best = max(balanced.values())
    winner = min((reached[code], code) for code, total in balanced.items() if total == best)[1]
    return {code: total / sum(balanced.values()) for code, total in balanced.items()}, winner


@settings(max_examples=300, deadline=None)
@given(
    neighbours=st.lists(
        st.tuples(st.integers(-100, 100), st.integers(0, 3), st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=30
    ),
    voting=st.sampled_from(VOTINGS),
    balance=st.sampled_from([0.0, 0.5, 1.0]),
    missing=st.integers(0, 3),
)
def test_equals_the_reference(neighbours: list, voting, balance: float, missing: int) -> None:
    neighbours = sorted(neighbours, key=lambda n: -n[0])
    similarities = [n[0] / 100 for n in neighbours]
    codes = [n[1] for n in neighbours]
    reliabilities = [n[2] for n in neighbours]
    counts = [7, 1, 30, 2]
    rule = VotingRule(voting=voting, balance=balance)
    shares, winner = reference(similarities, codes, reliabilities, rule, counts)
    votes = count_votes(
        np.array([similarities + [-math.inf] * missing]),
        np.array([codes + [-1] * missing]),
        rule,
        np.array(counts),
        np.array([reliabilities + [1.0] * missing]),
    )
    assert votes.winners_Q[0] == winner
    if winner < 0:
        return
    ranked = sorted(shares.values(), reverse=True)
    assert votes.confidences_Q[0] == pytest.approx(shares[winner])
    assert votes.margins_Q[0] == pytest.approx(shares[winner] - (ranked[1] if len(ranked) > 1 else 0.0))
    assert votes.weights_QK[0].sum() == pytest.approx(1.0)


@pytest.mark.parametrize("balance", [0.0, 0.7, 10.0])
@pytest.mark.parametrize("voting", VOTINGS)
def test_many_queries_are_counted_as_each_alone(voting: str, balance: float) -> None:
    """To the last digit: one alone is counted in another way."""
    generator = np.random.default_rng(0)
    similarities_QK = -np.sort(-generator.random((400, 20)).round(1), axis=1)
    codes_QK = generator.integers(-1, 5, (400, 20))
    codes_QK[:3] = -1
    reliabilities_QK = generator.choice([0.0, 0.3, 1.0], (400, 20))
    reliabilities_QK[3:6] = 0.0
    counts_C = np.array([1, 7, 7, 3_000, 10**9])
    rule = VotingRule(voting=voting, balance=balance)
    together = count_votes(similarities_QK, codes_QK, rule, counts_C, reliabilities_QK)
    for query in range(400):
        one = slice(query, query + 1)
        alone = count_votes(similarities_QK[one], codes_QK[one], rule, counts_C, reliabilities_QK[one])
        for name in ("winners_Q", "confidences_Q", "margins_Q", "weights_QK"):
            assert (getattr(alone, name)[0] == getattr(together, name)[query]).all(), (query, name)


@pytest.mark.parametrize("voting", VOTINGS)
def test_the_order_of_the_codes_changes_not_a_digit(voting: str) -> None:
    generator = np.random.default_rng(0)
    codes_QK = generator.integers(0, 40, (200, 50))
    similarities_QK = -np.sort(-generator.uniform(0.2, 1.0, (200, 50)).astype(np.float32), axis=1)
    counts_C = generator.integers(1, 100, 40)
    rule = VotingRule(voting=voting, balance=0.5)  # type: ignore[arg-type]
    renumbered = generator.permutation(60)[:40]  # as in a process that has met labels which are gone now
    others_C = np.zeros(60, np.int64)
    others_C[renumbered] = counts_C
    one = count_votes(similarities_QK, codes_QK, rule, counts_C)
    other = count_votes(similarities_QK, renumbered[codes_QK], rule, others_C)
    assert (renumbered[one.winners_Q] == other.winners_Q).all()
    for name in ("confidences_Q", "margins_Q", "weights_QK"):
        assert (getattr(one, name) == getattr(other, name)).all()


@pytest.mark.parametrize("voting", VOTINGS)
@pytest.mark.parametrize(("num_classes", "balance"), [(3, 0.0), (40, 0.75), (5_000, 1.25), (200_000, 1.0)])
def test_many_classes_are_counted_to_the_last_digit_as_in_a_table(voting, num_classes: int, balance: float) -> None:
    generator = np.random.default_rng(num_classes)
    near = generator.integers(0, num_classes, 6)  # classes that come back, so that votes add up and tie
    codes_QK = np.where(
        generator.random((60, 30)) < 0.7, generator.choice(near, (60, 30)), generator.integers(0, num_classes, (60, 30))
    )
    codes_QK[:5, 10:] = -1
    codes_QK[5] = -1
    similarities_QK = -np.sort(-generator.uniform(0.2, 1.0, (60, 30)).astype(np.float32), axis=1)
    counts_C = generator.integers(1, 100, num_classes)
    rule = VotingRule(voting=voting, balance=balance)
    votes = count_votes(similarities_QK, codes_QK, rule, counts_C)
    winners_Q, confidences_Q, margins_Q = dense_votes(similarities_QK, codes_QK, rule, counts_C)
    assert (votes.winners_Q == winners_Q).all()
    assert (votes.confidences_Q == confidences_Q).all()
    assert (votes.margins_Q == margins_Q).all()


def test_counting_votes_takes_no_memory_by_the_number_of_classes() -> None:
    codes_QK = np.random.default_rng(0).integers(0, 1_000_000, (2_000, 50))
    similarities_QK = np.full((2_000, 50), 0.5)
    tracemalloc.start()
    votes = count_votes(similarities_QK, codes_QK, VotingRule(balance=1.0), np.ones(1_000_000, np.int64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (votes.winners_Q >= 0).all()
    assert peak < 100 << 20  # a table of 2,000 x 1,000,000 would be 16 GB


def test_classes_without_a_neighbour_cost_nothing() -> None:
    """A query over a million classes took 6 ms, for the sizes of all of them, and 0.06 ms over a thousand."""
    generator = np.random.default_rng(0)
    similarities_QK = np.sort(generator.random((1, 50)))[:, ::-1]
    took = {}
    for num_classes in (1_000, 1_000_000):
        codes_QK, counts_C = generator.integers(0, num_classes, (1, 50)), np.full(num_classes, 3)
        runs = []
        for _ in range(20):
            began = time.process_time()
            count_votes(similarities_QK, codes_QK, VotingRule(balance=0.5), counts_C)
            runs.append(time.process_time() - began)
        took[num_classes] = min(runs)
    assert took[1_000_000] < 5 * took[1_000]

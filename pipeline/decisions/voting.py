"""Turns the labels of neighbours into votes: the four votings, balance, winner, confidence and margin. NumPy only.

Shapes: Q queries, K neighbours in rank order (nearest first), C classes. Neighbour i is counted from 0; s is its
similarity, d = 1 - s its distance. The formulas of the weights are from "Towards flexible perception with visual
memory" (Geirhos et al., 2024, arXiv 2408.08172), in which rank voting is 1 / (i + offset).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from pipeline.errors import UsageError

Voting = Literal["plurality", "distance", "softmax", "rank"]
VOTINGS: tuple[Voting, ...] = get_args(Voting)

MAX_BALANCE = 10  # a billion entries to this power is still a finite float

FEW_NEIGHBORS = 256  # a single query with at most so many neighbours is counted without NumPy
NEIGHBORS_AT_ONCE = 1 << 21  # neighbours of all queries, counted in one step: about 200 MB


@dataclass(frozen=True)
class VotingRule:
    """A voting with its constants. `balance` is tau: the sum of class c is divided by n_c ** tau.

    Raises UsageError for values with which votes cannot be counted.
    """

    voting: Voting = "rank"
    exponent: float = 1.0
    temperature: float = 0.07
    offset: float = 2.0
    balance: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.voting, str) or self.voting not in VOTINGS:
            raise UsageError(f"voting {self.voting} is unknown: give one of {', '.join(VOTINGS)}")
        if not (self.temperature > 0 and self.offset > 0 and np.isfinite([self.exponent, self.temperature]).all()):
            raise UsageError("temperature and offset must be more than 0, and the exponent a finite number")
        if not isinstance(self.balance, int | float) or not 0 <= self.balance <= MAX_BALANCE:
            raise UsageError(f"balance {self.balance} is not a strength: give 0 (none) to {MAX_BALANCE}, or auto")


@dataclass(frozen=True)
class Votes:
    """Counted votes. The weights of each query sum to 1, or are all 0 if no neighbour had weight.

    weights_QK: float64, the fraction of all votes that each neighbour gives. winners_Q: int64 class codes, -1 if there
    is no winner. confidences_Q: float64, the winner's fraction of all votes. margins_Q: float64, the winner's fraction
    minus the runner-up's fraction.
    """

    weights_QK: np.ndarray
    winners_Q: np.ndarray
    confidences_Q: np.ndarray
    margins_Q: np.ndarray


def neighbor_weights(similarities_QK: np.ndarray, present_QK: np.ndarray, rule: VotingRule) -> np.ndarray:
    """Unnormalised weights, float64 [Q, K]; 0 if there is no neighbour.

    Softmax weights are relative to the nearest neighbour. This changes no fraction of votes, and cannot overflow.
    """
    similarities = np.where(present_QK, similarities_QK, 0.0).astype(np.float64)
    if rule.voting == "plurality":
        weights = np.ones_like(similarities)
    elif rule.voting == "distance":
        weights = np.exp(-(1.0 - similarities)) ** rule.exponent
    elif rule.voting == "softmax":
        nearest = np.max(similarities_QK, axis=1, keepdims=True, initial=-np.inf, where=present_QK)
        nearest = np.where(np.isfinite(nearest), nearest, 0.0).astype(np.float64)
        weights = np.exp((similarities - nearest) / rule.temperature)
    else:
        ranks = np.broadcast_to(np.arange(similarities.shape[1], dtype=np.float64), similarities.shape)
        weights = 1.0 / (ranks + rule.offset)
    return np.where(present_QK, weights, 0.0)


def count_votes(
    similarities_QK: np.ndarray,
    codes_QK: np.ndarray,
    rule: VotingRule,
    class_counts_C: np.ndarray,
    reliabilities_QK: np.ndarray | None = None,
) -> Votes:
    """Count the votes of every query.

    `codes_QK` are class codes in [0, C), or -1 if there is no neighbour; missing neighbours come last.
    `class_counts_C` has the number of live entries of each class, used for balance. In a tie, the class that reached
    the winning weight first in rank order wins. The cost depends on the neighbours, not on the number of classes.
    """
    present_QK = codes_QK >= 0
    weights_QK = neighbor_weights(similarities_QK, present_QK, rule)
    if reliabilities_QK is not None:
        weights_QK = weights_QK * reliabilities_QK
    num_classes = len(class_counts_C)
    if num_classes and rule.balance:
        counts_QK = class_counts_C[np.maximum(codes_QK, 0)]
        sizes_QK = np.maximum(counts_QK, 1).astype(np.float64) ** rule.balance  # of the classes that occur
    else:
        sizes_QK = np.ones(codes_QK.shape)
    balanced_QK = weights_QK / sizes_QK
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    step = max(NEIGHBORS_AT_ONCE // max(codes_QK.shape[1], 1), 1)
    for start in range(0, max(len(codes_QK), 1), step):
        rows = slice(start, start + step)
        pieces.append(_winners(weights_QK[rows], codes_QK[rows], sizes_QK[rows], num_classes))
    winners_Q, confidences_Q, margins_Q = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    totals_Q = balanced_QK.sum(axis=1, keepdims=True)
    shares_QK = np.divide(balanced_QK, totals_Q, out=np.zeros_like(balanced_QK), where=totals_Q > 0)
    return Votes(shares_QK, winners_Q, confidences_Q, margins_Q)


def _winners(
    weights_QK: np.ndarray, codes_QK: np.ndarray, sizes_QK: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Winners, confidences and margins. `sizes_QK` divides the sum of each neighbour's class (balance).

    A cell is a pair of a query and a class with a vote in it. There are M cells; the cells of a query are adjacent.
    """
    num_queries = len(codes_QK)
    if num_queries == 1 and codes_QK.shape[1] <= FEW_NEIGHBORS:
        winner, confidence, margin = _winner(weights_QK[0].tolist(), codes_QK[0].tolist(), sizes_QK[0].tolist())
        return np.array([winner]), np.array([confidence]), np.array([margin])
    winners_Q, confidences_Q, margins_Q = np.full(num_queries, -1), np.zeros(num_queries), np.zeros(num_queries)
    voting_QK = (codes_QK >= 0) & (weights_QK > 0)
    queries, ranks = np.nonzero(voting_QK)  # in rank order within a query, so that bincount sums in rank order
    if not num_classes or not len(queries):
        return winners_Q, confidences_Q, margins_Q
    codes = codes_QK[queries, ranks].astype(np.int64)
    keys_M, firsts, cells = np.unique(queries * num_classes + codes, return_index=True, return_inverse=True)
    sums_M = np.bincount(cells, weights_QK[queries, ranks]) / sizes_QK[queries, ranks][firsts]
    # A class reaches its sum with its last voting neighbour. Of equal sums, the sum that was reached first wins.
    reached_M = np.zeros(len(keys_M), np.int64)
    reached_M[cells] = ranks
    asked, first = np.unique(keys_M // num_classes, return_index=True)  # queries with a vote, and their first cells
    sizes = np.diff([*first, len(keys_M)])
    best = np.maximum.reduceat(sums_M, first)
    is_best_M = sums_M == np.repeat(best, sizes)
    earliest = np.minimum.reduceat(np.where(is_best_M, reached_M, weights_QK.shape[1]), first)
    others_M = np.where(is_best_M & (reached_M == np.repeat(earliest, sizes)), 0.0, sums_M)
    # Sum in the order in which the classes reached their sums, because another process may order the codes differently.
    last = reached_M[cells] == ranks
    totals = np.bincount(queries[last], sums_M[cells[last]], minlength=num_queries)[asked]
    voted = totals > 0
    winners_Q[asked] = np.where(voted, codes_QK[asked, earliest], -1)
    safe = np.where(voted, totals, 1.0)
    confidences_Q[asked] = best / safe
    margins_Q[asked] = (best - np.maximum.reduceat(others_M, first)) / safe
    return winners_Q, confidences_Q, margins_Q


def _winner(weights_K: Sequence[float], codes_K: Sequence[int], sizes_K: Sequence[float]) -> tuple[int, float, float]:
    """Exactly the result of `_winners` for one query, but faster: with few neighbours NumPy calls are all the cost."""
    sums: dict[int, float] = {}
    reached: dict[int, int] = {}
    for rank, (weight, code) in enumerate(zip(weights_K, codes_K, strict=True)):
        if code >= 0 and weight > 0:
            sums[code] = sums.get(code, 0.0) + weight
            reached[code] = rank
    if not sums:
        return -1, 0.0, 0.0
    sums = {code: total / sizes_K[reached[code]] for code, total in sums.items()}
    best = max(sums.values())
    winner = min((code for code, total in sums.items() if total == best), key=reached.__getitem__)
    runner_up = max((total for code, total in sums.items() if code != winner), default=0.0)
    total = 0.0
    for code in sorted(reached, key=reached.__getitem__):
        total += sums[code]
    safe = total if total > 0 else 1.0
    return winner if total > 0 else -1, best / safe, (best - runner_up) / safe

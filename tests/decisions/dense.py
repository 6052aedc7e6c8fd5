"""Votes counted in a table of queries x classes: slow, and plain to see through. The reference for what is faster."""

import numpy as np

from pipeline.decisions.voting import VotingRule, neighbor_weights


def dense_votes(
    similarities_QK: np.ndarray, codes_QK: np.ndarray, rule: VotingRule, class_counts_C: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Winners, confidences and margins, as `count_votes` gives them."""
    weights_QK = neighbor_weights(similarities_QK, codes_QK >= 0, rule)
    per_class_C = np.maximum(class_counts_C, 1).astype(np.float64) ** rule.balance
    num_queries, num_neighbors = codes_QK.shape
    winners_Q, confidences_Q, margins_Q = np.full(num_queries, -1), np.zeros(num_queries), np.zeros(num_queries)
    for query in range(num_queries):
        sums_C = np.zeros(len(class_counts_C))
        reached_C = np.full(len(class_counts_C), num_neighbors)
        for rank in range(num_neighbors):
            code = codes_QK[query, rank]
            if code >= 0 and weights_QK[query, rank] > 0:
                sums_C[code] += weights_QK[query, rank]
                reached_C[code] = rank
        sums_C /= per_class_C
        total = 0.0
        for code in np.argsort(reached_C, kind="stable")[: (reached_C < num_neighbors).sum()]:
            total += sums_C[code]
        if total <= 0:
            continue
        winner = min(np.flatnonzero(sums_C == sums_C.max()), key=lambda code: reached_C[code])
        winners_Q[query] = winner
        confidences_Q[query] = sums_C[winner] / total
        margins_Q[query] = (sums_C[winner] - np.delete(sums_C, winner).max(initial=0.0)) / total
    return winners_Q, confidences_Q, margins_Q

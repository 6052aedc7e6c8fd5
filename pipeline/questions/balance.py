"""The balance of votes between classes of different sizes, measured in leave-one-out over a sample of the entries."""

import numpy as np

from pipeline.decisions.evaluation import LabelledNeighbors, choose_balance
from pipeline.decisions.voting import VotingRule
from pipeline.index.search.leave_one_out import search_others
from pipeline.index.search.live_entries import LiveEntries
from pipeline.index.search.sampling import Sample, draw, each_of
from pipeline.store.lookup.digests import Digests


def best_balance(live: LiveEntries, k: int, rule: VotingRule, digests: Digests) -> float:
    """The balance with the best balanced accuracy in leave-one-out over a sample drawn evenly from the classes.

    Each query leaves out its own entry and all entries with the same bytes. The balance is 0 if no entry has a label.
    """
    counts_C = live.label_counts()
    if not counts_C.any():
        return 0.0
    sample = draw(live, each_of(counts_C))
    retrieved = search_others(live, digests, sample.vectors_ND.astype(np.float32), k, sample.ids_N)
    return balance_by(sample, retrieved.similarities_QK, retrieved.codes_QK, counts_C, rule, k)


def balance_by(
    sample: Sample,
    similarities_QK: np.ndarray,
    codes_QK: np.ndarray,
    counts_C: np.ndarray,
    rule: VotingRule,
    k: int,
) -> float:
    """The balance with the best balanced accuracy on a sample, whose neighbours do not include its own entries."""
    truths_Q = sample.codes_N.astype(np.int64)
    return choose_balance(LabelledNeighbors(similarities_QK, codes_QK, truths_Q, counts_C), rule, k)

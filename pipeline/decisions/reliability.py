"""How much entries can be relied on: whether their labels agree with those of the entries that they are near to.

In leave-one-out each labelled entry is asked about and has a list of its nearest others. An entry is in the lists of
the entries around it. There it is right if it has the label of the entry asked about, and wrong otherwise. An entry
with a mistaken label is wrong in most lists that it is in.

The KNN-Shapley value of an entry is what its vote adds to the right decisions about others: Jia et al., "Efficient
task-specific data valuation for nearest neighbor algorithms", VLDB 2019, theorem 1, with each list cut off.

Shapes: Q queries, K neighbours, N entries.
"""

from dataclasses import dataclass, field

import numpy as np

VOTERS = 10  # of each list; the paper on visual memory prunes with as many
LIST_FACTOR = 10  # times as long a list as its voters: of 1,000 least values .985 were mislabelled, of 2 times .975
_UNIT = 2.0**-40  # values are summed as whole numbers of it, so that no sum depends on the order of the lists


def shapley_values(agrees_QK: np.ndarray, present_QK: np.ndarray, voters: int) -> np.ndarray:
    """The KNN-Shapley value of each neighbour in its list, float64 [Q, K].

    `agrees_QK` says which neighbours have the label of the query, `present_QK` where there are neighbours; missing ones
    come last. With j = 1 for the nearest: s_j = s_(j+1) + (m_j - m_(j+1)) / voters * min(voters, j) / j, where m_j is 1
    for a neighbour that agrees and 0 for another. The last one of a list has the value 0.
    """
    places = np.arange(1, agrees_QK.shape[1])
    factors = np.minimum(voters, places) / (places * voters)
    matches_QK = agrees_QK.astype(np.float64)
    steps_QK = (matches_QK[:, :-1] - matches_QK[:, 1:]) * factors * present_QK[:, 1:]
    values_QK = np.zeros(agrees_QK.shape)
    values_QK[:, :-1] = np.cumsum(steps_QK[:, ::-1], axis=1)[:, ::-1]
    return values_QK


@dataclass
class Agreements:
    """How N entries agree with the entries in whose lists they are.

    `right_N` and `wrong_N` (int64) count the lists in which an entry is among the first `voters`. The KNN-Shapley
    values are summed over whole lists. 24 bytes an entry.
    """

    num_entries: int
    voters: int = VOTERS
    right_N: np.ndarray = field(init=False)
    wrong_N: np.ndarray = field(init=False)
    _units_N: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.right_N, self.wrong_N, self._units_N = (np.zeros(self.num_entries, np.int64) for _ in range(3))

    def count(self, rows_QK: np.ndarray, agrees_QK: np.ndarray) -> None:
        """Count the lists of some queries: numbers of entries (int64, -1 for none), and whether they agree (bool)."""
        present_QK = rows_QK >= 0
        units_QK = np.rint(shapley_values(agrees_QK, present_QK, self.voters) / _UNIT).astype(np.int64)
        np.add.at(self._units_N, rows_QK[present_QK], units_QK[present_QK])
        voting_QK, agree_QK = rows_QK[:, : self.voters], agrees_QK[:, : self.voters]
        for counts_N, chosen_QK in ((self.right_N, agree_QK), (self.wrong_N, ~agree_QK)):
            np.add.at(counts_N, voting_QK[chosen_QK & (voting_QK >= 0)], 1)

    @property
    def values_N(self) -> np.ndarray:
        """The KNN-Shapley value of each entry over all lists, float64 [N]."""
        return self._units_N * _UNIT

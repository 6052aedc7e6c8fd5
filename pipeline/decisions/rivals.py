"""Which candidates are scored: those whose codes come closest to the query, over all places that hold entries.

An index of codes says how near a row is only roughly. So the best candidates by their codes are compared by their
vectors. Which are the best is decided over all shards together, also where several processes hold them: each process
returns what its candidates' codes say.

Candidates of a search that had to go further, because it found fewer than k, rank behind all those found before.

Shapes: Q queries, K neighbours, R candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

FURTHER = 8.0  # subtracted for each step further; similarities of codes lie between -4 and 4


@dataclass(frozen=True)
class Rivals:
    """What codes say of the candidates of some shards, float64: similarities, less FURTHER for each step further.

    `own_QK` belongs to each neighbour of a table (inf: it was not chosen by a code), `all_QR` to the best candidates,
    in any order (-inf: none). The best `most` of all places are compared by their vectors, and those that are within
    `error` of them. None: all are. A search goes further until it has `k`.
    """

    own_QK: np.ndarray
    all_QR: np.ndarray
    most: int | None
    k: int
    error: float = 0.0

    def rows(self, queries: slice) -> "Rivals":
        """Those of some of the queries."""
        return replace(self, own_QK=self.own_QK[queries], all_QR=self.all_QR[queries])


def borders(all_QR: np.ndarray, most: int | None, k: int, error: float = 0.0) -> np.ndarray:
    """What a candidate's code must say at least, so that it is compared by its vector, float64 [Q]."""
    border_Q = np.full(len(all_QR), -np.inf)
    width = all_QR.shape[1]
    if most is not None and width > most:
        border_Q = np.partition(all_QR, width - most, axis=1)[:, width - most] - error
    if width >= k:
        last_Q = np.partition(all_QR, width - k, axis=1)[:, width - k]
        steps_Q = np.round(np.where(np.isfinite(last_Q), -last_Q / FURTHER, np.inf))
        border_Q = np.maximum(border_Q, -FURTHER * (steps_Q + 0.5))
    return border_Q


def shared_borders(parts: Sequence[Rivals]) -> np.ndarray:
    """The borders over several places, of which each gave its best candidates by their codes, float64 [Q]."""
    first = parts[0]
    return borders(np.concatenate([part.all_QR for part in parts], axis=1), first.most, first.k, first.error)

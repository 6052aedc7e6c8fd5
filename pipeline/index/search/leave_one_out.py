"""Leave-one-out: the neighbours of stored entries, without the entry itself and without its copies.

An image stored twice would answer for itself. Two entries are copies if their files have the same sha256.
Copies have the same vector except for rounding, so digests are looked up only for neighbours at nearly full similarity.

Shapes: Q queries, K neighbours, D dimensions.
"""

from dataclasses import replace

import numpy as np

from pipeline.index.search.live_entries import LiveEntries, Restrictions, Retrieved
from pipeline.store.lookup.digests import Digests

# Vectors are rounded to float16. Another device may have computed them, or bfloat16, which is accepted only if 99 of
# 100 vectors keep a cosine of 0.999. So copies are nearer than this, and only nearer neighbours are looked up.
COPY_SIMILARITY = 0.99
CELLS_AT_ONCE = 1 << 22  # queries x neighbours per search, if there are many copies
SPARE = 8


def search_others(
    live: LiveEntries,
    digests: Digests,
    vectors_QD: np.ndarray,
    k: int,
    own_Q: np.ndarray,
    own_digests_Q: np.ndarray | None = None,
    restrictions: Restrictions = Restrictions("labelled"),
    *,
    shared: bool = False,
) -> Retrieved:
    """The k nearest entries of each query (float32 [Q, D]), without its own entry (ids int64 [Q]) and copies of it.

    `own_digests_Q` holds the digests of the queries' own entries, if these are not among `digests`. A query with copies
    among its neighbours is searched again for more neighbours, until k others are found or no entries are left.
    Queries that are copies of each other share this search. Among neighbours, the sha256 is read only of those nearer
    than COPY_SIMILARITY and of those scored by codes. If these are a share of a memory (`shared`), contenders are
    returned: those of a query with copies here all count. Raises DamagedFile.
    """
    own = Restrictions(restrictions.scope, restrictions.exclude, own_Q, restrictions.assume)
    found = (live.contenders if shared else live.search)(vectors_QD, k, own)
    suspects_Q = np.flatnonzero(_suspected(live, found).any(axis=1))
    if not len(suspects_Q):
        return found
    given = own_digests_Q[suspects_Q] if own_digests_Q is not None else digests.of(own_Q[suspects_Q])
    copies_QK = copies_among(live, digests, _rows(found, suspects_Q), given)
    counts = copies_QK.sum(axis=1)
    again, given, counts = suspects_Q[counts > 0], given[counts > 0], counts[counts > 0]
    if not len(again):
        return found
    _, first, places = np.unique(given, return_index=True, return_inverse=True)  # copies of each other share one search
    most = np.zeros(len(first), np.int64)
    np.maximum.at(most, places, counts)
    replaced = _searched_again(live, digests, vectors_QD[again[first]], given[first], most, k, restrictions)
    arrays: dict[str, np.ndarray] = {}
    for name in ("similarities_QK", "ids_QK", "codes_QK", "blocks_QK", "rows_QK"):
        before, after = getattr(found, name), getattr(replaced, name)[places]
        width = max(before.shape[1], after.shape[1])
        before, after = _padded(before, width), _padded(after, width)
        before[again] = after
        arrays[name] = before
    rivals = found.rivals
    if rivals is not None:
        own_QK, all_QR = _padded(rivals.own_QK, arrays["ids_QK"].shape[1]), rivals.all_QR.copy()
        own_QK[again], all_QR[again] = np.inf, -np.inf
        rivals = replace(rivals, own_QK=own_QK, all_QR=all_QR)
    return Retrieved(**arrays, rivals=rivals)


def _searched_again(
    live: LiveEntries,
    digests: Digests,
    vectors_QD: np.ndarray,
    given_Q: np.ndarray,
    counts_Q: np.ndarray,
    k: int,
    restrictions: Restrictions,
) -> Retrieved:
    """The k nearest of each query without its copies. At least `counts_Q` copies are known to be near."""
    result = Retrieved(
        np.full((len(vectors_QD), k), -np.inf, np.float32),
        np.full((len(vectors_QD), k), -1, np.int64),
        np.full((len(vectors_QD), k), -1, np.int32),
        np.zeros((len(vectors_QD), k), np.int64),
        np.full((len(vectors_QD), k), -1, np.int64),
    )
    left = np.argsort(counts_Q, kind="stable")
    widths_Q = k + 2 * counts_Q + SPARE
    while len(left):
        width = int(widths_Q[left[-1]])
        chunk, left = left[-max(CELLS_AT_ONCE // width, 1) :], left[: -max(CELLS_AT_ONCE // width, 1)]
        found = live.search(vectors_QD[chunk], width, restrictions)
        there = found.ids_QK >= 0
        kept = there & ~copies_among(live, digests, found, given_Q[chunk])
        whole = (kept.sum(axis=1) >= k) | (there.sum(axis=1) < width)
        order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        is_kept = np.take_along_axis(kept, order, axis=1)
        for name, nothing in (("similarities", -np.inf), ("ids", -1), ("codes", -1), ("blocks", 0), ("rows", -1)):
            values = np.take_along_axis(getattr(found, f"{name}_QK"), order, axis=1)
            values = np.where(is_kept, values, nothing)
            getattr(result, f"{name}_QK")[chunk[whole], : values.shape[1]] = values[whole]
        widths_Q[chunk[~whole]] = 2 * width
        left = np.concatenate([left, chunk[~whole]])
    return result


def _suspected(live: LiveEntries, found: Retrieved) -> np.ndarray:
    """Which neighbours may be copies, bool [Q, K]: the very near ones, and all in blocks scored by codes alone."""
    coarse = np.array([block.vectors_ND is None for block in live.blocks] or [False])
    near: np.ndarray = (found.similarities_QK >= COPY_SIMILARITY) | coarse[found.blocks_QK]
    return near & (found.ids_QK >= 0)


def copies_among(live: LiveEntries, digests: Digests, found: Retrieved, digests_Q: np.ndarray) -> np.ndarray:
    """Which neighbours have the same bytes as their query (digests uint64 [Q]), bool [Q, K]. Raises DamagedFile."""
    suspected = _suspected(live, found)
    copies = np.zeros(suspected.shape, bool)
    copies[suspected] = digests.of(found.ids_QK[suspected]) == digests_Q[np.nonzero(suspected)[0]]
    return copies


def _rows(found: Retrieved, queries: np.ndarray) -> Retrieved:
    columns = (found.similarities_QK, found.ids_QK, found.codes_QK, found.blocks_QK, found.rows_QK)
    return Retrieved(*(column[queries] for column in columns))


def _padded(values_QK: np.ndarray, width: int) -> np.ndarray:
    """A copy with `width` columns. The added cells mean "no neighbour"."""
    nothing = -np.inf if values_QK.dtype.kind == "f" else -1
    return np.pad(values_QK, ((0, 0), (0, width - values_QK.shape[1])), constant_values=nothing)

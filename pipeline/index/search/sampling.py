"""Samples of labelled entries, even over the classes or simply random. They are the same however entries are split."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.index.search.blocks import Block
from pipeline.index.search.live_entries import LiveEntries
from pipeline.store.lookup.digests import Digests

QUERIES = 2_000  # entries queried to choose a balance, and the most classes they are drawn from
SCRAMBLING = np.uint64(0x9E3779B97F4A7C15)  # 2 ** 64 / golden ratio: Fibonacci hashing (Knuth, TAOCP 3, 6.4)
ROWS_AT_ONCE = 1 << 20
LARGEST = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Sample:
    """Entries used to choose a balance: ids int64 [N], label codes int32 [N], vectors float16 [N, D].

    `digests_N` (uint64) identifies the bytes of each entry. It is None if the digests are not looked up yet.
    """

    ids_N: np.ndarray
    codes_N: np.ndarray
    vectors_ND: np.ndarray
    digests_N: np.ndarray | None = None

    def least(self, each: int) -> "Sample":
        """The `each` entries of each class with the smallest scrambled ids: the same however the entries are split."""
        scrambled_N = self.ids_N.astype(np.uint64) * SCRAMBLING
        order_N = np.lexsort((scrambled_N, self.codes_N))
        codes_N = self.codes_N[order_N]
        starts = np.searchsorted(codes_N, codes_N)  # for each entry, where its class begins
        return self._rows(order_N[np.arange(len(codes_N)) - starts < each])

    def of(self, codes: np.ndarray) -> "Sample":
        """The entries of some classes."""
        return self._rows(np.flatnonzero(np.isin(self.codes_N, codes)))

    def _rows(self, rows: np.ndarray) -> "Sample":
        digests_N = None if self.digests_N is None else self.digests_N[rows]
        return Sample(self.ids_N[rows], self.codes_N[rows], self.vectors_ND[rows], digests_N)


def each_of(counts_C: np.ndarray) -> int:
    """How many entries of each class are queried to choose a balance; counts int64 [C]."""
    return max(QUERIES // max(int((counts_C > 0).sum()), 1), 1)


def asked_classes(labels: Sequence[str], counts_C: np.ndarray) -> np.ndarray:
    """The codes (int64, ascending) of the classes to draw from: all classes with entries, at most QUERIES.

    If there are more than QUERIES, the classes whose names have the smallest hashes are chosen. So every process draws
    from the same classes, whatever their codes are there. A process with only some of the classes still finds all of
    the chosen classes that it has.
    """
    codes = np.flatnonzero(counts_C)
    if len(codes) <= QUERIES:
        return codes
    hashes = [hashlib.blake2b(labels[code].encode(), digest_size=8).digest() for code in codes]
    return np.sort(codes[np.argsort(np.array(hashes, "S8"), kind="stable")[:QUERIES]])


def draw(live: LiveEntries, each: int, digests: Digests | None = None) -> Sample:
    """Up to `each` labelled entries of each class to draw from, always the same. Has digests if `digests` is given.

    Passes once over the ids and label codes in memory, as counting the labels does. It reads 13 bytes a row and stores
    very little: it examines an id further only if the scrambled id is within the fraction drawn from its class.
    """
    counts_C = live.label_counts()
    wanted = asked_classes(live.labels, counts_C)
    enough_C = np.zeros(len(counts_C), np.int64)
    enough_C[wanted] = np.minimum(counts_C[wanted], each)
    slack = each + 6 * int(each**0.5) + 20  # six standard deviations more: a second pass is almost never needed
    limits_C = np.zeros(len(counts_C), np.uint64)
    shares = slack / np.maximum(counts_C[wanted], 1)
    limits_C[wanted] = np.where(shares < 1, np.minimum(shares, 0.999) * 2.0**64, 0).astype(np.uint64)
    limits_C[wanted[shares >= 1]] = LARGEST
    while True:
        ids_N, codes_N = _below(live.blocks, limits_C)
        short = np.bincount(codes_N, minlength=len(counts_C)) < enough_C
        if not (short & (limits_C < LARGEST)).any():
            break
        limits_C[short] = LARGEST
    chosen = Sample(ids_N, codes_N, np.empty((len(ids_N), 0), np.float16)).least(each)
    vectors_ND = live.vectors_of(chosen.ids_N).astype(np.float16)
    return Sample(chosen.ids_N, chosen.codes_N, vectors_ND, digests.of(chosen.ids_N) if digests else None)


def draw_simply(live: LiveEntries, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A simple random sample of the labelled entries: ids int64 [N] and codes int32 [N], in block order.

    Every labelled entry is as likely as any other to be in it, whatever its class. It is always the same: the `size`
    entries whose ids have the smallest hashes. So most of it stays when entries are added. Passes once over the ids and
    label codes in memory (13 bytes a row) and stores little more than the sample. All are taken if there are no more.
    """
    labelled = int(live.label_counts().sum())
    slack = size + 6 * int(size**0.5) + 20  # six standard deviations more: a second pass is almost never needed
    limit = LARGEST if slack >= labelled else np.uint64(slack / labelled * 2.0**64)
    while True:
        ids_N, codes_N, hashes_N = _hashed_below(live.blocks, limit)
        if len(ids_N) >= size or limit == LARGEST:
            break
        limit = LARGEST
    if len(ids_N) > size:
        chosen = np.sort(np.lexsort((ids_N, hashes_N))[:size])
        ids_N, codes_N = ids_N[chosen], codes_N[chosen]
    return ids_N, codes_N


def _hashed_below(blocks: Sequence[Block], limit: np.uint64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids int64 [N], codes int32 [N] and hashes uint64 [N] of the live labelled entries with hashes up to `limit`."""
    ids, codes, hashes = [np.empty(0, np.int64)], [np.empty(0, np.int32)], [np.empty(0, np.uint64)]
    for block in blocks:
        for start in range(0, len(block.ids_N), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            hashes_N = _hashes(block.ids_N[rows])
            inside_N = (hashes_N <= limit) & block.live_N[rows] & (block.codes_N[rows] >= 0)
            ids.append(block.ids_N[rows][inside_N])
            codes.append(block.codes_N[rows][inside_N])
            hashes.append(hashes_N[inside_N])
    return np.concatenate(ids), np.concatenate(codes), np.concatenate(hashes)


def _hashes(ids_N: np.ndarray) -> np.ndarray:
    """Hashes of ids that are as good as random (uint64 [N]): the finaliser of SplitMix64 (Steele et al., 2014)."""
    mixed_N = ids_N.astype(np.uint64) + SCRAMBLING  # the seed
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashes_N: np.ndarray = mixed_N ^ (mixed_N >> np.uint64(31))
    return hashes_N


def _below(blocks: Sequence[Block], limits_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 [N] and codes int32 [N] of the live labelled entries whose scrambled ids are within their limits."""
    limits = np.append(limits_C, np.uint64(0))  # the last limit is for the code -1 (no label)
    ids, codes = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for block in blocks:
        for start in range(0, len(block.ids_N), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            scrambled_N = block.ids_N[rows].astype(np.uint64) * SCRAMBLING
            inside_N = (scrambled_N <= limits[block.codes_N[rows]]) & block.live_N[rows] & (block.codes_N[rows] >= 0)
            ids.append(block.ids_N[rows][inside_N])
            codes.append(block.codes_N[rows][inside_N])
    return np.concatenate(ids), np.concatenate(codes)

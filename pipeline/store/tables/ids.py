"""Entry ids: int64, `segment << 39 | part << 20 | row`, fixed by the plan before any image is read.

24 bits of segment, 19 of part and 20 of row leave the sign bit clear. The bits give the origin of an entry, not the
file that holds it: a version names its files with their id ranges.
"""

import numpy as np

from pipeline.errors import UsageError

MAX_SEGMENTS = 1 << 24
MAX_PARTS = 1 << 19
MAX_ROWS = 1 << 20

SEGMENT_SHIFT = 39  # bits of an id below its segment's number

MIN_PART_ROWS = 128
MAX_PART_ROWS = 16_384
PARTS_AIMED_AT = 128
ROWS_MULTIPLE = 16


def first_id(segment: int, part: int) -> int:
    """The id of row 0 of a part. Raises UsageError if a number does not fit its bits."""
    if not (0 <= segment < MAX_SEGMENTS and 0 <= part < MAX_PARTS):
        raise UsageError(f"segment {segment}, part {part} is beyond what an id can hold: split the source in two")
    return segment << 39 | part << 20


def part_ids(segment: int, part: int, num_rows: int) -> np.ndarray:
    """The ids of a part's planned rows, int64 [num_rows]."""
    return first_id(segment, part) + np.arange(num_rows, dtype=np.int64)


def split_id(entry_id: int) -> tuple[int, int, int]:
    """Segment, part and row of an id."""
    return entry_id >> 39, entry_id >> 20 & (MAX_PARTS - 1), entry_id & (MAX_ROWS - 1)


def rows_per_part(planned: int) -> int:
    """The rows in each part of a plan but the last. Parts are small, to resume cheaply, and few, to list quickly.

    The number is rounded up to whole batches of a CPU, since the last batch of every part is padded.
    """
    whole_batches = -(-planned // (PARTS_AIMED_AT * ROWS_MULTIPLE)) * ROWS_MULTIPLE
    return min(max(whole_batches, MIN_PART_ROWS), MAX_PART_ROWS)


def within(ids_N: np.ndarray, first: int, last: int) -> slice:
    """Where ascending ids (int64 [N]) lie from `first` to `last`."""
    return slice(int(np.searchsorted(ids_N, first)), int(np.searchsorted(ids_N, last, "right")))


def is_in(ids_N: np.ndarray, known_M: np.ndarray) -> np.ndarray:
    """Which ids (int64 [N], in any order) are among known ids (int64 [M] ascending), bool [N].

    The known ids are cut to the range of the ids first. So the cost is that of N, however many ids are known elsewhere.
    """
    near_K = known_M[within(known_M, ids_N.min(), ids_N.max())] if len(ids_N) else known_M[:0]
    if not len(near_K):
        return np.zeros(len(ids_N), bool)
    at_N = np.minimum(np.searchsorted(near_K, ids_N), len(near_K) - 1)
    found_N: np.ndarray = near_K[at_N] == ids_N
    return found_N


def in_common(known_N: np.ndarray, ids_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where two lists of ids agree: positions in `known_N` (strictly ascending) and in `ids_M` (ascending), int64 [K].

    Both are cut to the range that they share. Then the shorter one is bisected in the longer one. So ids that lie
    elsewhere cost nothing.
    """
    none = np.empty(0, np.int64)
    if not len(known_N) or not len(ids_M):
        return none, none
    near = within(ids_M, known_N[0], known_N[-1])
    ids_M = ids_M[near]
    if not len(ids_M):
        return none, none
    there = within(known_N, ids_M[0], ids_M[-1])
    known_N = known_N[there]
    if len(ids_M) <= len(known_N):
        rows_M = np.minimum(np.searchsorted(known_N, ids_M), len(known_N) - 1)
        positions = np.flatnonzero(known_N[rows_M] == ids_M)
        return rows_M[positions] + there.start, positions + near.start
    starts_N, stops_N = np.searchsorted(ids_M, known_N), np.searchsorted(ids_M, known_N, "right")
    counts_N = stops_N - starts_N  # more than one where an id is repeated
    rows = np.repeat(np.arange(len(known_N)), counts_N)
    positions = np.arange(len(rows)) + np.repeat(starts_N - (np.cumsum(counts_N) - counts_N), counts_N)
    return rows + there.start, positions + near.start


def num_parts(images: int, container_parts: int) -> int:
    """The parts of a plan: of image files, `rows_per_part` to a part, and the parts of containers."""
    return -(-images // rows_per_part(images)) + container_parts

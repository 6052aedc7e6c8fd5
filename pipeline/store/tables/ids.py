"""Entry ids: int64, `segment << 39 | part << 20 | row`, fixed by the plan before any image is read.

24 bits of segment, 19 of part and 20 of row leave the sign bit clear. The bits give the origin of an entry, not the
file that holds it: a version names its files with their id ranges.
"""

import numpy as np

from pipeline.errors import UsageError

MAX_SEGMENTS = 1 << 24
MAX_PARTS = 1 << 19
MAX_ROWS = 1 << 20

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

"""Leave-one-out over many entries: the labelled entries in batches, with their neighbours without themselves.

Entries are asked about part by part, in the order of their ids. A part covers a range of ids, about as many entries as
a part of an add. So one process, and many that share the parts, ask about the same entries in the same batches.

Shapes: Q queries, K neighbours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.index.search.leave_one_out import search_others
from pipeline.index.search.live_entries import LiveEntries, Retrieved
from pipeline.store.log.state import State
from pipeline.store.lookup.digests import Digests
from pipeline.store.tables.ids import MAX_PART_ROWS

QUERIES_AT_ONCE = 1_024  # their vectors and neighbours are held at once
LAST_ID = (1 << 63) - 1


@dataclass(frozen=True)
class Others:
    """A batch of entries (ids int64 [Q], label codes int32 [Q]), with the K nearest others of each."""

    ids_Q: np.ndarray
    codes_Q: np.ndarray
    found: Retrieved


def starts_of_parts(state: State) -> tuple[int, ...]:
    """The first ids of parts that hold all entries of a version, ascending; the last part has no end.

    A part holds whole entries files, up to MAX_PART_ROWS rows of them or one larger file. Reads nothing.
    """
    starts, rows = [0], 0
    for file in state.entries_files():
        if rows and rows + file.rows > MAX_PART_ROWS and file.first_id > starts[-1]:
            starts.append(file.first_id)
            rows = 0
        rows += file.rows
    return tuple(starts)


def labelled_in_part(live: LiveEntries, starts: Sequence[int], part: int) -> tuple[np.ndarray, np.ndarray]:
    """The labelled entries of a part: ids int64 [N], ascending, and label codes int32 [N]. Bisects each block."""
    stop = starts[part + 1] if part + 1 < len(starts) else LAST_ID
    ids, codes = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for block in live.blocks:
        rows = slice(*np.searchsorted(block.ids_N, np.array([starts[part], stop], np.int64)).tolist())
        asked_N = block.live_N[rows] & (block.codes_N[rows] >= 0)
        ids.append(block.ids_N[rows][asked_N])
        codes.append(block.codes_N[rows][asked_N])
    ids_N, codes_N = np.concatenate(ids), np.concatenate(codes)
    order = np.argsort(ids_N, kind="stable")
    return ids_N[order], codes_N[order]


def others_of(live: LiveEntries, digests: Digests, k: int, ids_N: np.ndarray, codes_N: np.ndarray) -> Iterator[Others]:
    """Some labelled entries in batches of QUERIES_AT_ONCE, each entry with its k nearest others.

    Neither the entry itself nor an entry with the same bytes is among these. Costs one search for each entry. Raises
    DamagedFile.
    """
    for start in range(0, len(ids_N), QUERIES_AT_ONCE):
        own = slice(start, start + QUERIES_AT_ONCE)
        found = search_others(live, digests, live.vectors_of(ids_N[own]), k, ids_N[own])
        yield Others(ids_N[own], codes_N[own], found)


def others_of_all(live: LiveEntries, digests: Digests, k: int, starts: Sequence[int]) -> Iterator[Others]:
    """All labelled entries in batches, part by part, each entry with its k nearest others. See `others_of`."""
    for part in range(len(starts)):
        yield from others_of(live, digests, k, *labelled_in_part(live, starts, part))

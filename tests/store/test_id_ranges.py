"""Ids are looked up in ranges of ids and of files: what a bisection finds is what a comparison of all finds."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.store.storage.file_ranges import FileRanges
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.tables.ids import in_common, is_in, within

IDS = st.lists(st.integers(0, 60), max_size=40)


def ascending(ids: list[int]) -> np.ndarray:
    return np.array(sorted(ids), np.int64)


@given(IDS, IDS)
def test_ids_are_found_among_known_ones(ids: list[int], known: list[int]) -> None:
    assert is_in(np.array(ids, np.int64), ascending(known)).tolist() == [each in known for each in ids]


@given(st.sets(st.integers(0, 60)), IDS)
def test_what_two_lists_have_in_common(known: set[int], ids: list[int]) -> None:
    known_N, ids_M = ascending([*known]), ascending(ids)
    at_known, at_ids = in_common(known_N, ids_M)
    assert at_ids.tolist() == [at for at, each in enumerate(ids_M.tolist()) if each in known]
    assert (known_N[at_known] == ids_M[at_ids]).all()


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12), IDS)
def test_files_are_found_by_their_ranges(spans: list[tuple[int, int]], ids: list[int]) -> None:
    files = [
        RowsFile(path=f"{at}", num_bytes=0, sha256="0" * 64, rows=1, first_id=first, last_id=first + length)
        for at, (first, length) in enumerate(spans)
    ]
    ranges, ids_N = FileRanges(files), ascending(ids)
    for first, last in ((10, 20), (0, 0), (30, 80)):
        found = {file.path for file in ranges.overlapping(first, last)}
        assert found == {file.path for file in files if file.first_id <= last and file.last_id >= first}
    held = {file.path: ids_N[here].tolist() for file, here in ranges.holding(ids_N)}
    wanted = {file.path: [i for i in ids_N.tolist() if file.first_id <= i <= file.last_id] for file in files}
    assert held == {path: inside for path, inside in wanted.items() if inside}


def test_ids_of_other_files_cost_nothing() -> None:
    """Ten million ids that lie elsewhere are not passed over: 1.6 ms for a shard where all were bisected in 157."""
    elsewhere = np.arange(10_000_000, dtype=np.int64) * 64
    own = np.arange(300_000_000, 300_010_000, dtype=np.int64)
    took = []
    for _ in range(5):
        began = time.process_time()
        assert is_in(own, elsewhere).sum() == len(own[own % 64 == 0])
        assert len(in_common(own, elsewhere)[0]) == len(own[own % 64 == 0])
        took.append(time.process_time() - began)
    assert min(took) < 0.005
    assert within(elsewhere, 640, 1_280) == slice(10, 21)

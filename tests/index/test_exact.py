"""Exact search against a float64 sort of everything, with duplicates and near-ties at the border."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.index.search import exact
from pipeline.index.search.exact import ExactFinder, similarities
from tests.conftest import unit


def best(queries: np.ndarray, vectors: np.ndarray, rows: np.ndarray, k: int) -> list[list[int]]:
    """The k best rows by float64 similarity rounded to float32, ties by row."""
    scores = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    return [[int(r) for r in sorted(rows, key=lambda r, q=q: (-scores[q, r], r))[:k]] for q in range(len(queries))]


def top(finder: ExactFinder, queries: np.ndarray, vectors: np.ndarray, k: int) -> list[list[int]]:
    rows = finder.find(queries, k).rows_QK
    scores = similarities(queries, vectors, rows)
    found = []
    for query in range(len(queries)):
        pairs = sorted((-s, r) for s, r in zip(scores[query], rows[query], strict=True) if r >= 0)
        found.append([int(r) for _, r in pairs[:k]])
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1_000),
    num_rows=st.integers(0, 120),
    distinct=st.integers(1, 120),
    k=st.integers(1, 60),
    share=st.floats(0, 1),
)
def test_equals_a_float64_sort(seed: int, num_rows: int, distinct: int, k: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    vectors = unit(generator.normal(size=(distinct, 24)))[generator.integers(0, distinct, num_rows)]
    rows = np.flatnonzero(generator.random(num_rows) < share)
    queries = np.concatenate([unit(generator.normal(size=(3, 24))), vectors[:2]]).astype(np.float32)
    expected = best(queries, vectors, rows, k)
    assert top(ExactFinder(vectors, rows), queries, vectors, k) == expected


def test_many_duplicates_at_the_border_are_ordered_by_row() -> None:
    generator = np.random.default_rng(0)
    vectors = unit(generator.normal(size=(2_000, 32)))
    vectors[100:1_500] = vectors[100]
    queries = vectors[100:101].astype(np.float32)
    rows = np.arange(2_000)
    found = top(ExactFinder(vectors, rows), queries, vectors, 50)
    assert found == [list(range(100, 150))]


def test_a_memory_of_copies_needs_no_more_room_than_any_other() -> None:
    vectors = np.repeat(unit(np.random.default_rng(0).normal(size=(1, 512))), 20_000, axis=0)
    finder = ExactFinder(vectors, np.arange(20_000))
    queries = vectors[:4].astype(np.float32)
    finder.find(queries, 10)  # converts and keeps the matrix
    tracemalloc.start()
    found = top(finder, queries, vectors, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [list(range(10))] * 4
    assert peak < 100 << 20  # gathering all of them as float64 took 328 MB


def test_chunks_and_caching_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    vectors = unit(generator.normal(size=(1_000, 16)))
    rows = np.flatnonzero(generator.random(1_000) < 0.7)
    queries = unit(generator.normal(size=(9, 16))).astype(np.float32)
    cached = top(ExactFinder(vectors, rows), queries, vectors, 20)
    for name in ("CHUNK_ROWS", "CACHED_ROWS"):
        monkeypatch.setitem(vars(exact), name, 100)
    assert top(ExactFinder(vectors, rows), queries, vectors, 20) == cached


def test_similarities_do_not_depend_on_the_batch() -> None:
    generator = np.random.default_rng(2)
    vectors = unit(generator.normal(size=(500, 1_280)))
    queries = unit(generator.normal(size=(40, 1_280))).astype(np.float32)
    rows = generator.integers(0, 500, (40, 33))
    together = similarities(queries, vectors, rows)
    for query in range(40):
        assert (
            similarities(queries[query : query + 1], vectors, rows[query : query + 1, ::3]) == together[query, ::3]
        ).all()
    assert together.dtype == np.float32

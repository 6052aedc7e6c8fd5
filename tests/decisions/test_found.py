"""What several places found, merged, against one that found it all."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decisions.neighbor_table import LabelStatistics, NeighborTable, merge_labels, merge_neighbors


def found_among(
    similarities_N: np.ndarray, ids_N: np.ndarray, codes_N: np.ndarray, k: int, width: int
) -> NeighborTable:
    """The k nearest for one query, by similarity and then by id, padded to a width."""
    order = np.lexsort((ids_N, -similarities_N))[:k]
    missing = (0, max(width - len(order), 0))
    return NeighborTable(
        np.pad(similarities_N[order], missing, constant_values=-np.inf)[None].astype(np.float32),
        np.pad(ids_N[order], missing, constant_values=-1)[None],
        np.pad(codes_N[order], missing, constant_values=-1)[None].astype(np.int32),
        [[f"uri {entry_id}" for entry_id in ids_N[order]]],
        [["d"] * len(order)],
    )


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 2)), max_size=30),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_merging_parts_finds_what_one_search_finds(rows: list[tuple[int, int, int]], k: int, padding: int) -> None:
    """Few different similarities, so that ties are common, also across parts."""
    similarities_N = np.array([similarity / 4 for similarity, _, _ in rows], np.float32)
    places_N = np.array([place for _, place, _ in rows], np.int64)
    codes_N = np.array([code for _, _, code in rows], np.int64)
    ids_N = np.random.default_rng(0).permutation(len(rows)).astype(np.int64)
    parts = [
        found_among(similarities_N[here], ids_N[here], codes_N[here], k, min(k, int(here.sum())) + padding)
        for here in (places_N == place for place in range(4))
    ]
    whole = found_among(similarities_N, ids_N, codes_N, k, 0)
    found = merge_neighbors(parts, k)
    count = whole.ids_QK.shape[1]
    for name in ("similarities_QK", "ids_QK", "codes_QK"):
        assert getattr(found, name)[:, :count].tolist() == getattr(whole, name).tolist()
    assert (found.ids_QK[:, count:] == -1).all()
    assert (found.uris, found.datasets) == (whole.uris, whole.datasets)


def test_standings_join_by_the_names_of_labels() -> None:
    one = LabelStatistics(("a", "c"), np.array([3, 1]), 5, 6)
    other = LabelStatistics(("b", "c", "d"), np.array([2, 4, 0]), 7, 7)
    whole, translations = merge_labels([one, other])
    assert dict(zip(whole.labels, whole.counts_C.tolist(), strict=True)) == {"a": 3, "b": 2, "c": 5, "d": 0}
    assert (whole.live, whole.whole) == (12, 13)
    for part, translation in zip((one, other), translations, strict=True):
        assert [whole.labels[code] for code in translation[:-1]] == list(part.labels)
        assert translation[-1] == -1

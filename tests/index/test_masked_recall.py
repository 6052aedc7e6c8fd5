"""Forgetting does not cost recall: what is masked is searched around."""

import numpy as np
import pytest

from pipeline.index.build.plan import IndexOptions
from pipeline.visual_memory import VisualMemory
from tests.conftest import MakeMemory
from tests.index.test_choice import correlated

ROWS, QUERIES, K = 20_000, 500, 10
CLASSES = 20


def recall(memory: VisualMemory, stored_ND: np.ndarray, queries_QD: np.ndarray) -> float:
    """recall@10 of a search, against products with all live vectors; K neighbours come back for each query."""
    live = memory.live()
    ids_N = live.live_ids()
    vectors_ND = live.vectors_of(ids_N).astype(np.float64)
    nearest_QK = np.argsort(-(queries_QD.astype(np.float64) @ vectors_ND.T), axis=1)[:, :K]
    found_QK = live.search(queries_QD, K).ids_QK
    assert found_QK.shape == (len(queries_QD), K)
    assert np.isin(found_QK, ids_N).all()
    pairs = zip(found_QK, ids_N[nearest_QK], strict=True)
    return float(np.mean([len(set(found) & set(true)) / K for found, true in pairs]))


@pytest.mark.parametrize("key", ["IVF128,PQ32x4fs", "IVF128,SQ8", "HNSW32"])
def test_recall_stays_when_rows_are_forgotten(make_memory: MakeMemory, key: str) -> None:
    vectors_ND = correlated(ROWS + QUERIES)
    directions_DC = np.random.default_rng(1).standard_normal((vectors_ND.shape[1], CLASSES))
    classes_N = (vectors_ND.astype(np.float32) @ directions_DC).argmax(axis=1)  # what is near is of one class
    memory = make_memory(vectors_ND[:ROWS], [str(label) for label in classes_N[:ROWS]])
    queries_QD = np.ascontiguousarray(vectors_ND[ROWS:], np.float32)
    memory.index(IndexOptions(key=key, target_recall=0.95, shard_rows=ROWS // 2))
    whole = recall(memory, vectors_ND, queries_QD)
    assert whole >= 0.94
    memory.forget(labels=["3"])
    without_class = recall(memory, vectors_ND, queries_QD)
    ids = memory.live().live_ids()
    half = np.random.default_rng(2).choice(ids, len(ids) // 2, replace=False)
    memory.forget(ids=half.tolist())
    halved = recall(memory, vectors_ND, queries_QD)
    assert min(without_class, halved) >= whole - 0.01

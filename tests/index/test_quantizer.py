"""One quantizer a process: lists are found once a query, and answers depend on no batch and no grouping of shards."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from pipeline.decisions.neighbor_table import merge_neighbors
from pipeline.index.build.plan import IndexOptions
from pipeline.index.search import quantizer as quantizers
from pipeline.index.search.ann import ListFinder, rescored
from pipeline.index.search.exact import similarities, similarities_together
from pipeline.index.search.live_entries import LiveEntries
from pipeline.index.search.open_blocks import Share
from pipeline.index.search.quantizer import Quantizer
from pipeline.index.search.rounding import as_float32
from pipeline.questions.answering import neighbor_table
from pipeline.visual_memory import VisualMemory
from tests.conftest import MakeMemory, add_vectors, unit
from tests.index.test_search import clustered

KEYS = ("IVF32,PQ16x4fs", "IVF32,SQ8", "IVF32,Flat", "RR32,IVF32,RaBitQ", "PCA24,IVF32_HNSW8,PQ12x4fs")


def sharded(make_memory: MakeMemory, key: str) -> tuple[VisualMemory, np.ndarray]:
    """A memory of four shards and some fresh entries, a tenth forgotten, and queries that are not rows of it."""
    vectors, labels = clustered(2_600)
    memory = make_memory(vectors[:2_400], labels[:2_400])
    memory.index(IndexOptions(key=key, shard_rows=640, target_recall=0.3))
    memory.forget(ids=memory.live().live_ids()[::10].tolist())
    add_vectors(memory.log, vectors[2_400:], labels[2_400:], name="fresh")
    return memory, clustered(60, seed=1)[0].astype(np.float32)


@pytest.mark.parametrize("key", KEYS)
def test_answers_depend_on_no_batch_and_no_grouping(make_memory: MakeMemory, key: str) -> None:
    memory, queries = sharded(make_memory, key)
    live = memory.live()
    for k in (1, 60):
        whole = live.search(queries, k)
        for row in range(0, len(queries), 3):
            alone = live.search(queries[row : row + 1], k)
            np.testing.assert_array_equal(alone.ids_QK[0], whole.ids_QK[row])
            np.testing.assert_array_equal(alone.similarities_QK[0], whole.similarities_QK[row])
        for groups in (2, 3):
            shares = [Share(number, groups) for number in range(groups)]
            opened = [LiveEntries.open(memory.log.storage, memory.state(), share=share) for share in shares]
            assert sum(each.num_shards for each in opened) == 4
            found = merge_neighbors([neighbor_table(each, each.contenders(queries, k)) for each in opened], k)
            np.testing.assert_array_equal(found.ids_QK, whole.ids_QK)
            np.testing.assert_array_equal(found.similarities_QK, whole.similarities_QK)


@pytest.mark.parametrize("key", KEYS)
def test_lists_are_found_once_for_all_shards(
    make_memory: MakeMemory, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, labels = clustered(2_400)
    memory = make_memory(vectors, labels)
    memory.index(IndexOptions(key=key, shard_rows=640, target_recall=0.95))
    queries = clustered(60, seed=1)[0].astype(np.float32)
    live = memory.live()
    finders = [block.finder("live") for block in live.blocks]
    used = [finder.seat.place[0].quantizer for finder in finders if isinstance(finder, ListFinder)]
    assert len(used) == 4
    assert len({id(quantizer) for quantizer in used}) == 1
    asked: list[int] = []
    nearest = Quantizer.nearest

    def counted(self: Quantizer, queries_QD: np.ndarray, *rest: object) -> tuple[np.ndarray, np.ndarray]:
        asked.append(len(queries_QD))
        return nearest(self, queries_QD, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Quantizer, "nearest", counted)
    live.search(queries, 5)
    assert asked == [60]


def test_lists_about_as_near_are_told_apart_in_float64() -> None:
    centroids_CD = unit(np.random.default_rng(0).normal(size=(64, 32))).astype(np.float32)
    centroids_CD[40:] = centroids_CD[0]  # equal to each other: the lowest numbers come first
    quantizer = faiss.IndexFlatIP(32)
    quantizer.add(centroids_CD)
    index = faiss.IndexIVFFlat(quantizer, 32, 64, faiss.METRIC_INNER_PRODUCT)
    found = Quantizer(index)
    queries = np.repeat(centroids_CD[:1], 40, axis=0)
    for some in (queries[:1], queries):
        numbers_QP, _ = found.nearest(some, 3, None)
        assert {tuple(sorted(numbers)) for numbers in numbers_QP.tolist()} == {tuple(sorted(numbers_QP[0].tolist()))}


def test_similarities_are_the_same_beside_others() -> None:
    random = np.random.default_rng(0)
    matrices = [random.normal(size=(rows, 24)).astype(np.float16) for rows in (40, 90, 7)]
    queries = random.normal(size=(9, 24)).astype(np.float32)
    rows = [random.integers(-1, len(matrix), (9, width)) for matrix, width in zip(matrices, (5, 33, 2), strict=True)]
    together = similarities_together(queries, list(zip(matrices, rows, strict=True)))
    apart = [similarities(queries, *pair) for pair in zip(matrices, rows, strict=True)]
    np.testing.assert_array_equal(together, np.concatenate(apart, axis=1))
    for matrix, rows_QK, found_QK in zip(matrices, rows, apart, strict=True):
        products = np.einsum("qkd,qd->qk", matrix[rows_QK].astype(np.float64), queries.astype(np.float64))
        np.testing.assert_array_equal(found_QK, np.where(rows_QK >= 0, products, -np.inf).astype(np.float32))


def test_every_finite_float16_is_converted_exactly() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    np.testing.assert_array_equal(as_float32(halves).view(np.uint32), halves.astype(np.float32).view(np.uint32))


def test_a_shard_gives_more_candidates_for_more_neighbours() -> None:
    assert [rescored(50, k) for k in (1, 10, 20, 50)] == [50, 50, 90, 210]  # as releases before did
    assert [rescored(10, k) for k in (1, 10, 20, 50)] == [10, 10, 20, 50]


@pytest.mark.parametrize("key", ["IVF32,PQ16x4fs", "IVF32,SQ8", "IVF32_HNSW8,Flat"])
def test_what_is_freed_leaves_faiss_sound(tmp_path: Path, key: str) -> None:
    """SWIG forgets a class where Python deletes an object that C++ made: then `index_factory` returns no index."""
    vectors = clustered(1_000)[0].astype(np.float32)
    trained = faiss.index_factory(32, key, faiss.METRIC_INNER_PRODUCT)
    trained.train(vectors)
    faiss.write_index(trained, str(tmp_path / "trained"))
    trained.add(vectors)
    faiss.write_index(trained, str(tmp_path / "whole"))
    with quantizers.without_centroids(trained):
        faiss.write_index(trained, str(tmp_path / "lists"))
    for _ in range(3):
        shared = Quantizer(faiss.read_index(str(tmp_path / "trained")))
        for name in ("whole", "lists"):
            index = faiss.read_index(str(tmp_path / name))
            assert quantizers.has_centroids(index) == (name == "whole")
            assert shared.give_to(index)
            expected = trained.search(vectors[:5], 4)
            np.testing.assert_array_equal(index.search(vectors[:5], 4), expected)
            del index
        del shared
        assert isinstance(faiss.index_factory(32, key, faiss.METRIC_INNER_PRODUCT), faiss.IndexIVF)
    other = faiss.index_factory(32, key, faiss.METRIC_INNER_PRODUCT)
    other.train(-vectors)
    assert not Quantizer(other).give_to(faiss.read_index(str(tmp_path / "whole")))

"""Recall where a memory holds the same vectors many times: it is that of the vectors, each counted once."""

import faiss
import numpy as np
import pytest

from pipeline.index.build.distinct import vector_keys, without_copies
from pipeline.index.build.plan import IndexOptions
from pipeline.index.build.tune import MAX_QUERIES, MOST_COPIES, RecallEvaluator, query_sample
from tests.conftest import MakeMemory, unit


def photographs(rows: int, dimension: int = 48, seed: int = 0) -> np.ndarray:
    """Clustered vectors, as those of photographs are."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(200, dimension))
    return unit(centres[rng.integers(0, 200, rows)] + 0.9 * rng.normal(size=(rows, dimension)))


def measured_recall(memory, base_ND: np.ndarray, rows_ND: np.ndarray, k: int = 10) -> float:
    """recall@k of some of the distinct vectors among all rows but themselves, by searching the memory."""
    queries_QD = base_ND[1:801].astype(np.float32)
    exact = -np.sort(-(queries_QD @ rows_ND.astype(np.float32).T), axis=1)[:, 1 : k + 1]
    found = [[n.similarity for n in row][1 : k + 1] for row in memory.search(embeddings=queries_QD, k=k + 1)]
    return float((np.array(found) >= exact[:, -1:] - 1e-4).mean())


@pytest.mark.parametrize(
    "copies",
    [
        pytest.param([20_000], id="one vector", marks=pytest.mark.slow),  # three rows of four
        pytest.param([3_000] * 6, id="six vectors"),
        pytest.param([40] * 300, id="three hundred"),
        pytest.param([1] * 4_000, id="half of all, twice"),
    ],
)
def test_the_recall_published_is_that_of_distinct_rows(copies: list[int], make_memory: MakeMemory) -> None:
    base_ND = photographs(7_000)
    more_ND = np.repeat(base_ND[np.r_[0, 1_000 : 1_000 + len(copies) - 1]], copies, axis=0)
    rows_ND = np.random.default_rng(0).permutation(np.concatenate([base_ND, more_ND]))
    memory = make_memory(rows_ND, ["a"] * len(rows_ND))
    memory.index(IndexOptions(key="IVF64,Flat", target_recall=0.9))
    index = memory.state().index
    assert index is not None
    assert index.shards[0].quality is not None
    measured = measured_recall(memory, base_ND, rows_ND)
    assert measured == pytest.approx(index.shards[0].quality.recall_at_10, abs=0.025)
    assert measured >= 0.88


def test_queries_are_no_copies_of_each_other() -> None:
    base_ND = photographs(3_000)
    rows_ND = np.concatenate([base_ND, np.repeat(base_ND[:1], 50_000, axis=0), base_ND[:500]])
    keys_N = vector_keys(rows_ND)
    rows = query_sample(keys_N, seed=0)
    assert len(rows) == len(np.unique(keys_N[rows])) == MAX_QUERIES
    held_out = np.ones(len(rows_ND), bool)
    held_out[3_000:] = False  # the copies were trained on, so the vectors they are copies of were, too
    rows = query_sample(keys_N, seed=0, held_out=held_out)
    assert rows.min() >= 500
    assert rows.max() < 3_000


def test_without_copies_the_queries_are_as_they_were() -> None:
    keys_N = vector_keys(photographs(5_000))
    wanted = np.random.default_rng(3).choice(np.arange(5_000), MAX_QUERIES, replace=False)
    assert query_sample(keys_N, seed=3).tolist() == wanted.tolist()
    assert query_sample(keys_N[:300], seed=3).tolist() == np.random.default_rng(3).permutation(300).tolist()


@pytest.mark.parametrize("rows", [1, 2, 300, 2_000])
def test_a_memory_of_one_vector_has_a_recall(rows: int) -> None:
    rows_ND = np.repeat(photographs(1), rows, axis=0)
    judge = RecallEvaluator(rows_ND, query_sample(vector_keys(rows_ND), seed=0))
    index = faiss.IndexFlatIP(rows_ND.shape[1])
    index.add(rows_ND.astype(np.float32))
    assert judge.recall(index, {}, 10, refined=True) == 1.0


def test_copies_make_up_for_nothing_that_is_nearer() -> None:
    query = np.eye(8)[0]
    nearer = unit(np.stack([query + 0.1 * np.eye(8)[1 + i] for i in range(4)]))
    copied = np.repeat(unit(np.array([query + 0.9 * np.eye(8)[6]])), MOST_COPIES + 20, axis=0)
    rows_ND = np.concatenate([unit(query[None]), nearer, copied])
    missing_ND = rows_ND.astype(np.float32)
    missing_ND[1:3] = -missing_ND[1:3]  # two of the four that are nearer will not be found
    judge = RecallEvaluator(rows_ND, np.array([0]))
    assert judge.recall(one_list(missing_ND), {"nprobe": 1}, 10, refined=False) == pytest.approx(0.8)
    assert judge.recall(one_list(missing_ND), {"nprobe": 1}, 4, refined=False) == pytest.approx(0.5)
    assert judge.recall(one_list(rows_ND), {"nprobe": 1}, 10, refined=False) == 1.0


def test_finding_its_own_copies_earns_a_query_nothing() -> None:
    rows_ND = np.concatenate([photographs(400)] * 3)
    only_copies_ND = rows_ND.astype(np.float32)
    only_copies_ND[np.arange(1_200) % 400 != 0] *= -1  # the others are where the query does not look
    judge = RecallEvaluator(rows_ND, np.array([0]))
    assert judge.recall(one_list(rows_ND), {"nprobe": 1}, 10, refined=False) == 1.0
    assert judge.recall(one_list(only_copies_ND), {"nprobe": 1}, 1, refined=False) == 0.0


def one_list(vectors_ND: np.ndarray) -> faiss.Index:
    index = faiss.index_factory(vectors_ND.shape[1], "IVF1,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors_ND.astype(np.float32))
    index.add(vectors_ND.astype(np.float32))
    return index


def test_keys_are_equal_where_vectors_are() -> None:
    base_ND = photographs(20_000, dimension=7)
    rows_ND = np.concatenate([base_ND, base_ND[::-1]])
    keys_N = vector_keys(rows_ND)
    assert (keys_N[:20_000] == keys_N[20_000:][::-1]).all()
    distinct = len(np.unique(base_ND.view("V14")))
    assert len(np.unique(keys_N)) == distinct
    assert len(without_copies(rows_ND)) == distinct

"""Parameters are tuned for recall over all rows, on questions that may be no rows; copies count in no shard."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.index.build.distinct import vector_keys
from pipeline.index.build.joint_recall import JointRecall, Member
from pipeline.index.build.plan import IndexOptions
from pipeline.index.build.train import train_index
from pipeline.index.search import parameters
from pipeline.index.search.quantizer import Quantizer
from pipeline.index.search.stack import Seat, Stack
from pipeline.visual_memory import VisualMemory
from tests.conftest import MakeMemory, unit
from tests.index.test_choice import correlated

ROWS, QUERIES = 3_800, 400


def recall(memory: VisualMemory, queries_QD: np.ndarray) -> float:
    """recall@10 of a search, against products with all vectors."""
    live = memory.live()
    products = queries_QD.astype(np.float64) @ live.vectors_of(live.live_ids()).astype(np.float64).T
    tenth_Q = np.sort(products, axis=1)[:, -10]
    return float((live.search(queries_QD, 10).similarities_QK >= tenth_Q[:, None] - 1e-6).mean())


@pytest.mark.parametrize("asks", [True, False], ids=["queries", "stored rows"])
def test_shards_are_tuned_for_recall_over_all_rows(make_memory: MakeMemory, asks: bool) -> None:
    vectors_ND = correlated(ROWS + 2 * QUERIES)
    memory = make_memory(vectors_ND[:ROWS], ["a"] * ROWS)
    held_out_QD = vectors_ND[ROWS:].astype(np.float32)
    options = IndexOptions(key="IVF32,PQ32x4fs", target_recall=0.9, shard_rows=640)
    index = memory.index(options, queries=held_out_QD[:QUERIES] if asks else None).index
    assert index is not None
    assert len(index.shards) == 6
    measured = recall(memory, held_out_QD[QUERIES:])
    assert measured == pytest.approx(index.recall_at_10, abs=0.03)
    assert measured >= 0.88
    if asks:
        narrow = parameters.parse(index.parameters)
        one = memory.index(IndexOptions(key="IVF32,PQ32x4fs", target_recall=0.9, rebuild=True, shard_rows=640)).index
        assert one is not None
        assert parameters.parse(one.parameters)["nprobe"] >= narrow["nprobe"]  # a margin
    assert not [path for path in memory.log.storage.walk("index") if "questions" in path]
    assert not memory.verify().findings


def test_a_copy_of_a_question_counts_in_no_shard() -> None:
    rows_ND = correlated(900)
    trained = train_index("IVF8,Flat", rows_ND)
    members = []
    for shard_ND in (rows_ND[:300], np.concatenate([rows_ND[:100], rows_ND[300:]])):  # a hundred rows in both
        index = train_index("IVF8,Flat", rows_ND)
        index.add(shard_ND.astype(np.float32))
        quantizer = Quantizer(trained)
        assert quantizer.give_to(index)
        every = np.ones(len(shard_ND), bool)
        seat = Seat(Stack(index, quantizer, [len(shard_ND)]))
        members.append(Member(index, seat, shard_ND, vector_keys(shard_ND), every))
    judge = JointRecall(members, rows_ND[:50], 1_000)
    products = rows_ND[:50].astype(np.float64) @ np.concatenate([m.vectors_ND for m in members]).astype(np.float64).T
    same = vector_keys(rows_ND[:50])[:, None] == np.concatenate([m.keys_N for m in members])
    assert same.sum() == 100
    expected = -np.sort(-np.where(same, -np.inf, products), axis=1)[:, :10]
    np.testing.assert_allclose(judge._exact_QK[:, :10], expected, atol=1e-5)
    assert judge.recall(members[0].index, {"nprobe": 8}, 10, refined=True) == 1.0


def test_too_many_queries_are_refused(make_memory: MakeMemory) -> None:
    vectors_ND = unit(np.random.default_rng(0).normal(size=(5_000, 8)))
    memory = make_memory(vectors_ND[:300], ["a"] * 300)
    with pytest.raises(UsageError, match=r"more than 4,096 queries"):
        memory.index(IndexOptions(key="IVF4,Flat"), queries=vectors_ND)


def test_a_source_of_vectors_can_be_asked_about(make_memory: MakeMemory, tmp_path: Path) -> None:
    vectors_ND = correlated(1_200)
    memory = make_memory(vectors_ND[:1_000], ["a"] * 1_000)
    (tmp_path / "asked").mkdir()
    np.save(tmp_path / "asked" / "vectors.npy", vectors_ND[1_000:])
    found = memory.questions(tmp_path / "asked")
    np.testing.assert_allclose(found.astype(np.float32), vectors_ND[1_000:].astype(np.float32), atol=1e-3)
    index = memory.index(IndexOptions(key="IVF16,Flat", target_recall=0.8), queries=str(tmp_path / "asked")).index
    assert index is not None
    assert index.recall_at_10 >= 0.8

"""Choosing a key by measuring: what is proposed, what wins and why, and what is said when nothing will do."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import IndexBuildError
from pipeline.index.build import key_choice, tune
from pipeline.index.build.builder import build_index
from pipeline.index.build.distinct import vector_keys
from pipeline.index.build.key_candidates import expected_bytes, num_lists
from pipeline.index.build.key_choice import CHOSEN, TOO_LARGE, choose
from pipeline.index.build.plan import IndexOptions, measured_candidates, plan_index
from pipeline.index.build.train import train_index
from pipeline.index.build.tune import RecallEvaluator, cheapest_parameters, query_sample
from pipeline.index.search import parameters
from pipeline.progress import ignore_progress
from tests.conftest import MakeMemory, unit
from tests.index.test_search import clustered


def correlated(rows: int, dimension: int = 64, rank: int = 10, seed: int = 0) -> np.ndarray:
    """Vectors that lie near a few directions, as embeddings do; codes after a learned rotation suit them."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(rank, dimension))
    spread = generator.normal(size=(rows, rank)) @ mixing + 0.2 * generator.normal(size=(rows, dimension))
    return unit(spread).astype(np.float16)


def test_the_table_says_what_each_candidate_was() -> None:
    table = choose(correlated(4_000), 100_000, target_recall=0.9, max_memory_bytes=1 << 30, max_latency_ms=50.0)
    chosen, *others = table.candidates
    assert chosen.verdict == CHOSEN
    assert table.chosen == chosen
    able = [candidate for candidate in others if candidate.verdict.startswith("costs ")]
    assert [c.cost for c in able] == sorted(c.cost for c in able)
    assert all(candidate.cost >= chosen.cost for candidate in able)
    for candidate in (chosen, *able):
        assert candidate.quality is not None
        assert candidate.quality.recall_at_10 >= 0.9
        assert candidate.bytes_in_memory == expected_bytes(candidate.key, 100_000, 64)
    assert f"IVF{num_lists(100_000)}" in "".join(candidate.key for candidate in table.candidates)


@pytest.mark.slow
def test_in_little_memory_autofaisss_key_wins_and_its_tuner_sets_the_parameters(make_memory: MakeMemory) -> None:
    memory = make_memory(correlated(12_000, dimension=128), ["a"] * 12_000)
    # None of ours fits: our smallest codes are a bit a dimension, autofaiss goes on to product quantizers of few bytes.
    options = IndexOptions(max_memory_bytes=450_000, target_recall=0.8)
    built = memory.index(options).index
    table = memory.index_candidates()
    assert built is not None
    assert table is not None
    assert table.chosen.proposed_by == "autofaiss"
    assert built.key == table.chosen.key
    assert "OPQ" in built.key
    assert {c.verdict for c in table.candidates if c.proposed_by == "visual-memory"} == {TOO_LARGE}
    assert "ht" in parameters.parse(built.parameters)  # which nobody but its tuner sets
    assert built.recall_at_10 >= 0.8


def test_a_memory_bound_that_nothing_meets_says_what_the_least_is(make_memory: MakeMemory) -> None:
    memory = make_memory(*clustered(2_000))
    with pytest.raises(
        IndexBuildError, match=r"no index of 2,000 rows fits into 1,000 bytes: \S+ takes least, [\d,]+;"
    ):
        memory.index(IndexOptions(max_memory_bytes=1_000))
    assert memory.state().index is None
    assert not memory.log.storage.walk("index")


def test_a_latency_that_nothing_meets_says_what_would(make_memory: MakeMemory) -> None:
    memory = make_memory(*clustered(2_000))
    with pytest.raises(IndexBuildError, match=r"0\.0001 ms a query reaches .* bytes and \d+\.\d+ ms; allow that with"):
        memory.index(IndexOptions(max_latency_ms=1e-4))


def test_a_dry_run_measures_and_writes_nothing(make_memory: MakeMemory) -> None:
    memory = make_memory(*clustered(3_000))
    before = memory.log.storage.walk()
    plan = memory.plan_index()
    assert plan.table is not None
    assert plan.key == plan.table.chosen.key
    assert memory.log.storage.walk() == before


def test_one_row_and_few_rows(make_memory: MakeMemory) -> None:
    for rows in (1, 2, 30):
        memory = make_memory(*clustered(rows), name=str(rows))
        assert memory.index().index is not None
        assert len(memory.search(embeddings=clustered(1)[0], k=50)[0]) == rows


def test_a_sample_asks_for_codes_that_do_for_the_whole() -> None:
    sample = correlated(3_000, rank=40)
    index = train_index("IVF8,PQ16x4fs", sample)
    index.add(sample.astype(np.float32))
    work = []
    for rows in (3_000, 3_000_000):
        judge = RecallEvaluator(sample, query_sample(vector_keys(sample), seed=0), rows)
        work.append(cheapest_parameters(index, judge, 0.9, refined=True))
    assert work[0] is not None
    assert work[1] is not None
    assert work[1]["rerank"] > work[0]["rerank"]


def test_where_a_sample_promised_too_much_the_next_candidate_is_built(
    make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_choice, "QUICK", 0.0)
    monkeypatch.setattr(tune, "RERANKS", (10,))
    vectors_ND = correlated(6_000, rank=20)
    memory = make_memory(vectors_ND, ["a"] * 6_000)
    options = IndexOptions(target_recall=0.97, shard_rows=2_048)
    plan = plan_index(memory.state(), options)
    table = measured_candidates(vectors_ND, 6_000, options, plan.refine, ignore_progress)
    promising = table.chosen.model_copy(update={"key": "IVF16,PQ2x4fs", "bytes_in_memory": 1})
    said = (promising, *(c.model_copy(update={"verdict": c.verdict.replace(CHOSEN, "")}) for c in table.candidates))
    table = table.model_copy(update={"candidates": said})
    index = build_index(memory.log, memory.state(), replace(plan, table=table), options, "index").index
    kept = memory.index_candidates()
    assert index is not None
    assert kept is not None
    assert index.key == kept.chosen.key != promising.key
    assert index.recall_at_10 >= 0.97
    assert [c.key for c in kept.candidates if "at most on a shard" in c.verdict] == [promising.key]
    assert {shard.rows for shard in index.shards} == {2_048, 1_904}
    assert not memory.verify().findings

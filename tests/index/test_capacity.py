"""Sizing: what an index over more rows would take, from rates measured on the rows there are."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from jobs.cli import application
from pipeline.errors import IndexBuildError, UsageError
from pipeline.index.build.capacity import Rates, computed
from pipeline.index.build.key_candidates import expected_bytes
from pipeline.index.build.key_choice import Candidate
from pipeline.store.log.records import Quality
from tests.conftest import MakeMemory
from tests.index.test_choice import correlated
from tests.index.test_search import clustered

RATES = Rates(
    key="IVF1024,PQ32x4fs",
    dimension=64,
    rows=50_000,
    read_row=1e-6,
    side_bytes_a_row=200.0,
    train=2.0,
    train_row_list=1e-9,
    add_row=1e-6,
    add_row_list=1e-9,
    judge_row=1e-7,
    tune=3.0,
    choose=4.0,
)
QUALITY = Quality.measured(1.0, 0.97, 0.9, 1e-4, 2e-5)


def candidate(key: str) -> Candidate:
    return Candidate(key=key, proposed_by="user", bytes_in_memory=1, quality=QUALITY)


def test_what_grows_with_rows_and_what_with_lists() -> None:
    small = computed(RATES, candidate("IVF1024,PQ32x4fs"), 1_000_000, 64 << 30, 100.0)
    large = computed(RATES, candidate("IVF4096,PQ32x4fs"), 10_000_000, 64 << 30, 100.0)
    assert small.build_seconds["gathering"] == pytest.approx(1.0)
    assert large.build_seconds["gathering"] == pytest.approx(10.0)
    assert small.build_seconds["training"] == pytest.approx(2.0 + 1e-9 * 49_152 * 1_024, abs=0.01)
    assert large.build_seconds["populating"] == pytest.approx(10_000_000 * (1e-6 + 4_096e-9), abs=0.01)
    assert (small.shards, large.shards) == (1, 10)
    assert large.bytes_in_memory == 10 * expected_bytes("IVF4096,PQ32x4fs", 1_000_000, 64)


def test_nodes_hold_the_index_and_answer_the_queries() -> None:
    plan = computed(RATES, candidate("IVF4096,PQ32x4fs"), 10_000_000, 100 << 20, 1_000_000.0)
    assert plan.groups == int(np.ceil(plan.bytes_in_memory / (0.8 * (100 << 20))))
    assert plan.replicas == int(np.ceil(1_000_000.0 / plan.queries_per_second_a_node))
    assert plan.nodes == plan.groups * plan.replicas


def test_it_is_measured_on_the_memory_and_told(make_memory: MakeMemory) -> None:
    memory = make_memory(correlated(6_000), ["a"] * 6_000)
    before = memory.log.storage.walk()
    plan = memory.plan_capacity(1_000_000)
    assert memory.log.storage.walk() == before
    assert plan.rates.rows == 6_000
    assert 2 * 64 < plan.rates.side_bytes_a_row < 400
    assert all(seconds >= 0 for seconds in plan.build_seconds.values())
    arguments = ["plan-capacity", memory.uri, "--rows", "1000000", "--memory-per-node", "4G", "--json"]
    said = CliRunner().invoke(application(), arguments)
    assert said.exit_code == 0, said.output
    document = json.loads(said.stdout[said.stdout.index("{") :])
    assert document["rows"] == 1_000_000
    assert document["nodes"] == 1


def test_what_cannot_be_sized(make_memory: MakeMemory) -> None:
    memory = make_memory(*clustered(300))
    with pytest.raises(IndexBuildError, match="300 entries to measure rates on and 4,096 are needed"):
        memory.plan_capacity(10**6)
    for wishes, message in (
        ({"rows": 0}, "`rows` 0"),
        ({"rows": 10, "memory_per_node": 0}, "`memory_per_node` 0"),
        ({"rows": 10, "queries_per_second": 0.0}, "`queries_per_second` 0"),
    ):
        with pytest.raises(UsageError, match=message):
            memory.plan_capacity(**wishes)  # type: ignore[arg-type]

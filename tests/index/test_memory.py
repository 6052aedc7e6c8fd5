"""A step on a shard takes no more memory than its Ray task declares."""

import multiprocessing
import queue
from typing import Any

import numpy as np
import pytest

from pipeline.index.build.shard_steps import Gathered, Populated, ShardWork
from pipeline.index.build.train import train_index
from pipeline.index.search.shard_files import write_faiss
from pipeline.store.storage.interface import Storage
from tests.conftest import MakeMemory, unit
from tests.index.step_peak import measured

ROWS, DIMENSION = 200_000, 256


def peak(step: str, work: ShardWork, *arguments: object) -> tuple[Any, int]:
    """What a step returns, and the most memory a process of its own had for it."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measured, args=(step, work, arguments, results))
    process.start()
    while True:
        try:
            found = results.get(timeout=1)
        except queue.Empty:
            assert process.is_alive(), f"{step} failed"
        else:
            process.join()
            return found


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("key", ["IVF256,PQ64x4fs", "IVF256,SQ8"])
def test_steps_stay_within_what_they_declare(make_memory: MakeMemory, key: str) -> None:
    vectors_ND = unit(np.random.default_rng(0).standard_normal((ROWS, DIMENSION), np.float32))
    memory = make_memory(vectors_ND, ["a"] * ROWS)
    state, storage = memory.state(), memory.log.storage
    work = ShardWork(
        storage=storage,
        marks="index/begun-test",
        folder="index/000001-test",
        dimension=DIMENSION,
        first=0,
        shards=(tuple(state.entries_files()),),
        tombstones=(),
        rows=ROWS,
        sample_rows=20_000,
        key=key,
        target_recall=0.01,
        max_latency_ms=100.0,
        all_rows=ROWS,
    )
    gathered, took = peak("gather", work, 0)
    assert isinstance(gathered, Gathered)
    assert took <= work.memory_bytes(0)
    empty = _trained(storage, key, vectors_ND)
    populated, took = peak("populate", work, 0, gathered.side, empty)
    assert isinstance(populated, Populated)
    assert took <= work.memory_bytes(0, populated.index.num_bytes)
    _, took = peak("measure", work, [(0, gathered.side, populated.index)], empty, None)
    assert took <= work.memory_bytes(0, populated.index.num_bytes)


def _trained(storage: Storage, key: str, vectors_ND: np.ndarray) -> Any:
    return write_faiss(storage, "index/000001-test/trained.faiss", train_index(key, vectors_ND[:20_000]))

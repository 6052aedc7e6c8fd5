"""Four times the shards take at most four times the CPU time: no verb is quadratic in the size of a memory.

The exponent is taken from the CPU time of this process at 8 and 32 shards, each the least of several runs.
"""

import gc
import itertools
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import VisualMemory
from pipeline.index.build.plan import IndexOptions
from pipeline.store.tables.schemas import embedding_column
from tests.edits.given import vectors

SHARD_ROWS, PARTS_A_SHARD, DIMENSION, CLASSES = 8_192, 4, 4, 100
SMALL, LARGE = 8, 32
MOST = 1.1  # the exponent
RUNS, ENOUGH_SECONDS = 4, 3.0  # of CPU time
QUERY_1D = np.ones((1, DIMENSION))

Grown = dict[int, VisualMemory]


def grown(folder: Path, shards: int) -> VisualMemory:
    """A memory of so many shards, with a kept column and 100 classes in turn."""
    source = folder / "source"
    source.mkdir(parents=True)
    rows, step = shards * SHARD_ROWS, SHARD_ROWS // PARTS_A_SHARD
    vectors_ND = vectors(rows, DIMENSION)
    for start in range(0, rows, step):
        numbers = range(start, start + step)
        columns = {
            "embedding": embedding_column(vectors_ND[start : start + step]),
            "uri": [f"/{number}.png" for number in numbers],
            "label": [f"label {number % CLASSES}" for number in numbers],
            "sha256": [f"{number:064x}" for number in numbers],
            "width": pa.array([1] * step, pa.int32()),
            "height": pa.array([1] * step, pa.int32()),
            "number": pa.array(numbers, pa.int64()),
        }
        pq.write_table(pa.table(columns), source / f"{start:08d}.parquet")
    memory = VisualMemory(folder / "memory")
    memory.add(source, labels="column:label", keep=["number"])
    memory.index(IndexOptions(key="Flat", shard_rows=SHARD_ROWS, rebuild=True))
    memory.expire(keep=1)
    assert memory.status()["shards"] == shards
    return memory


@pytest.fixture(scope="module")
def memories(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    return {shards: grown(tmp_path_factory.mktemp(f"shards{shards}"), shards) for shards in (SMALL, LARGE)}


_new = itertools.count()


def anew(memory: VisualMemory) -> VisualMemory:
    return VisualMemory(memory.uri)


def forget_one_in_a_thousand(memory: VisualMemory) -> None:
    memory.forget(ids=memory.live().live_ids()[next(_new) % 7 :: 1_000].tolist())


def relabel_one_in_a_thousand(memory: VisualMemory) -> None:
    memory.relabel(ids=memory.live().live_ids()[::1_000].tolist(), label=f"new {next(_new)}")


def forget_a_uri(memory: VisualMemory) -> None:
    assert anew(memory).forget(uris=[f"/{next(_new) + 1_000}.png"]).forgotten


def erase_an_entry(memory: VisualMemory) -> None:
    assert anew(memory).forget(ids=[int(memory.live().live_ids()[5])], erase=True, verify=True).receipt


def relabel_a_file_of_lines(memory: VisualMemory) -> None:
    """As many lines as there are shards times ten, over all of them."""
    path = Path(tempfile.mkstemp(suffix=".csv")[1])
    ids_N = memory.live().live_ids()
    lines = [f"{entry_id},new {next(_new)}" for entry_id in ids_N[:: SHARD_ROWS // 10].tolist()]
    path.write_text("\n".join(["id,label", *lines]))
    anew(memory).relabel(file=path)
    path.unlink()


def _beside(memory: VisualMemory) -> Path:
    return Path(memory.uri).parent / f"made {next(_new)}"


def follow_a_version(memory: VisualMemory) -> None:
    """What a group of a server does when one entry was forgotten."""
    memory.forget(ids=[int(memory.live().live_ids()[7])])
    memory.live()


def make_a_label_set(memory: VisualMemory) -> None:
    mapped = {f"label {number}": f"big {number % 5}" for number in range(CLASSES)}
    memory.relabel(label_set=f"set {next(_new)}", map=mapped)


VERBS: dict[str, Callable[[VisualMemory], object]] = {
    "open": lambda memory: anew(memory).live(),
    "status": lambda memory: anew(memory).status(),
    "ids": lambda memory: memory.live().codes_of(memory.live().live_ids()),
    "vectors": lambda memory: memory.live().vectors_of(memory.live().live_ids()),
    "where": lambda memory: memory.classify(embeddings=QUERY_1D, where=f"number > {next(_new)}"),
    "where by label": lambda memory: memory.classify(embeddings=QUERY_1D, where=f"label != '{next(_new)}'"),
    "balance auto": lambda memory: anew(memory).classify(embeddings=QUERY_1D, balance="auto"),
    "label set by map": make_a_label_set,
    "relabel by ids": relabel_one_in_a_thousand,
    "forget by ids": forget_one_in_a_thousand,
    "forget by label": lambda memory: memory.forget(labels=[memory.live().labels[next(_new) % CLASSES]]),
    "forget by uri": forget_a_uri,
    "follow a version": follow_a_version,
    "relabel by a file": relabel_a_file_of_lines,
    "leave one out": lambda memory: anew(memory).evaluate_leave_one_out(sample=100),
    "history": lambda memory: anew(memory).history(),
    "rollback": lambda memory: memory.rollback(memory.state().version - 1),
    "copy": lambda memory: anew(memory).copy(_beside(memory)),
    "export": lambda memory: anew(memory).export(_beside(memory)),
    "erase": erase_an_entry,
    "verify": lambda memory: anew(memory).verify(),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("verb", VERBS)
def test_cpu_time_grows_with_the_shards(memories: Grown, verb: str) -> None:
    took = {shards: _least_seconds(VERBS[verb], memory) for shards, memory in memories.items()}
    for _ in range(2):  # what runs beside it on the machine takes CPU time too, by the caches they share
        if _exponent(took) > MOST:
            took = {shards: min(took[shards], _least_seconds(VERBS[verb], memories[shards])) for shards in took}
    exponent = _exponent(took)
    assert exponent <= MOST, f"{verb}: {took[SMALL]:.4f} s at {SMALL} shards, {took[LARGE]:.4f} s at {LARGE}"


def _exponent(took: dict[int, float]) -> float:
    return math.log(took[LARGE] / took[SMALL]) / math.log(LARGE / SMALL)


def _least_seconds(verb: Callable[[VisualMemory], object], memory: VisualMemory) -> float:
    memory.live()
    runs: list[float] = []
    while len(runs) < RUNS and sum(runs) < ENOUGH_SECONDS:
        gc.collect()
        began = time.process_time()
        verb(memory)
        runs.append(time.process_time() - began)
    return min(runs)

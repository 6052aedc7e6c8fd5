"""The balance that `auto` stands for, chosen over several groups as the library chooses it alone."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import VisualMemory
from pipeline.index.build.plan import IndexOptions
from pipeline.index.search import sampling
from tests.conftest import unit
from tests.serving.serving import served


@pytest.fixture
def memory(tmp_path: Path) -> VisualMemory:
    """Clusters of very different sizes, a third of it twice: copies lie in other shards, and among what is fresh."""
    rng = np.random.default_rng(0)
    sizes = rng.geometric(0.05, 40) + 1
    labels = np.repeat(np.arange(40), sizes)
    vectors_ND = unit(rng.normal(size=(40, 16))[labels] + 1.1 * rng.normal(size=(len(labels), 16)))
    order = rng.permutation(len(labels))
    memory = VisualMemory(tmp_path / "memory")
    for name, rows in (("a", order), ("b", order[::3]), ("c", order[::7])):
        source = tmp_path / name
        source.mkdir()
        np.save(source / "x.npy", vectors_ND[rows])
        pq.write_table(pa.table({"label": [f"class {label}" for label in labels[rows]]}), source / "x.parquet")
        memory.add(source)
        if name == "b":
            memory.index(IndexOptions(key="Flat", shard_rows=100))
    return memory


@pytest.mark.parametrize("queries", [2_000, 25], ids=["every class", "some classes"])
@pytest.mark.parametrize("groups", [1, 3])
def test_groups_choose_what_the_library_chooses(
    memory: VisualMemory, groups: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "QUERIES", queries)
    embedding = np.random.default_rng(1).normal(size=16)
    with served(memory.uri, groups) as server:
        for k in (3, 10, 50):
            [expected] = memory.classify(embeddings=embedding[None], k=k, balance="auto")
            body = {"embedding": embedding.tolist(), "k": k, "balance": "auto"}
            wanted = json.loads(json.dumps(expected.to_json())) | {"partial": False}
            assert server.post("/v1/classify", body).json() == wanted

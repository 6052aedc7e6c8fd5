"""An index whose shards keep no vectors: smaller on disk, and similarities are those of its codes."""

import numpy as np
import pytest

from pipeline.errors import IndexBuildError, UsageError
from pipeline.index.build import key_choice, tune
from pipeline.index.build.plan import IndexOptions
from pipeline.visual_memory import VisualMemory
from tests.conftest import MakeMemory, add_vectors
from tests.index.test_search import clustered

WITHOUT = IndexOptions(key="IVF16,SQ8", refine="none", target_recall=0.9, shard_rows=1_024)


def vectors_on_disk(memory: VisualMemory) -> list[str]:
    return [path for path in memory.log.storage.walk("index") if path.endswith((".f16", "sample.f16"))]


@pytest.fixture
def memory(make_memory: MakeMemory) -> VisualMemory:
    made = make_memory(*clustered(3_000))
    index = made.index(WITHOUT).index
    assert index is not None
    assert index.recall_at_10 >= 0.9
    return made


def test_no_vectors_are_kept_beside_the_codes(memory: VisualMemory, make_memory: MakeMemory) -> None:
    assert not vectors_on_disk(memory)
    vectors, labels = clustered(3_000)
    exact = make_memory(vectors, labels, "exact")
    queries = vectors[:100].astype(np.float32)
    overlaps, differences = [], []
    for ours, theirs in zip(memory.search(embeddings=queries), exact.search(embeddings=queries), strict=True):
        assert [n.similarity for n in ours] == sorted((n.similarity for n in ours), reverse=True)
        true = {n.uri: n.similarity for n in theirs}
        overlaps.append(len(true.keys() & {n.uri for n in ours}) / 10)
        differences += [abs(true[n.uri] - n.similarity) for n in ours if n.uri in true]
    assert np.mean(overlaps) >= 0.85
    assert 0 < max(differences) < 0.02  # eight bits a number: near, and not the same
    about = memory.status()["index"]
    assert (about["refine"], about["refine_bytes"]) == ("none", 0)
    assert not memory.verify().findings


def test_vectors_are_read_from_the_entries_where_they_are_wanted(memory: VisualMemory) -> None:
    live = memory.live()
    ids = live.live_ids()[[5, 2_500, 17, 1_203]]
    stored = clustered(3_000)[0].astype(np.float16).astype(np.float32)
    assert np.abs(live.vectors_of(ids) - stored[[5, 2_500, 17, 1_203]]).max() < 1e-3
    [decision] = memory.classify(embeddings=stored[:1], k=10, balance="auto")
    assert decision.label is not None


def test_forgotten_and_erased_entries_do_not_come_back(memory: VisualMemory) -> None:
    ids = memory.live().live_ids()
    stored = memory.live().vectors_of(ids[:40])
    memory.forget(ids=ids[:20].tolist())
    report = memory.forget(ids=ids[20:40].tolist(), erase=True, verify=True)
    assert report.receipt is not None
    found = {n.id for neighbors in memory.search(embeddings=stored, k=50) for n in neighbors}
    assert not found & set(ids[:40].tolist())
    assert not vectors_on_disk(memory)
    assert not VisualMemory(memory.uri).verify().findings
    left = memory.live().live_ids()
    nearest = memory.search(embeddings=memory.live().vectors_of(left[:50]), k=1)
    assert np.mean([neighbors[0].id == own for neighbors, own in zip(nearest, left[:50], strict=True)]) > 0.9


def test_an_index_grows_as_it_is(memory: VisualMemory) -> None:
    vectors, labels = clustered(500, seed=1)
    add_vectors(memory.log, vectors.astype(np.float16), labels, name="b")
    with pytest.raises(IndexBuildError, match="`rebuild` to build one with `refine` float16"):
        memory.index(IndexOptions(refine="float16"))
    index = memory.index().index
    assert index is not None
    assert index.refine == "none"
    assert len(index.shards) == 4
    assert not vectors_on_disk(memory)
    index = memory.index(IndexOptions(key="IVF16,SQ8", rebuild=True)).index
    assert index is not None
    assert index.refine == "float16"
    assert all(shard.vectors for shard in index.shards)


def test_what_would_reach_the_target_is_said(make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make_memory(*clustered(3_000))
    with pytest.raises(IndexBuildError, match=r"`refine` float16 reaches \d\.\d+ with 64 bytes a vector on disk"):
        memory.index(IndexOptions(key="IVF16,PQ8x4fs", refine="none", target_recall=0.95))
    monkeypatch.setattr(key_choice, "QUICK", 0.0)
    monkeypatch.setattr(tune, "RERANKS", (10,))
    with pytest.raises(IndexBuildError, match=r"`key` \S+ reaches 0\.999 on a sample"):
        memory.index(IndexOptions(key="IVF16,PQ2x4fs", target_recall=0.999))
    assert memory.state().index is None


def test_an_unknown_refinement() -> None:
    with pytest.raises(UsageError, match="`refine` float32 is unknown: give float16 or none"):
        IndexOptions(refine="float32")  # type: ignore[arg-type]

"""Search over all that is live: shards and fresh entries as one, forgotten and excluded entries as none."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import VisualMemory
from pipeline.index.build.plan import IndexOptions
from pipeline.index.search.ann import ListFinder, approximate_finder
from pipeline.index.search.exact import ExactFinder, similarities
from pipeline.index.search.live_entries import LiveEntries, Restrictions
from pipeline.store.log.state import State
from tests.conftest import MakeMemory, add_vectors, unit

DIMENSION = 32


def clustered(num_rows: int, seed: int = 0, dimension: int = DIMENSION) -> tuple[np.ndarray, list[str | None]]:
    """Vectors around ten centres, the centre as label."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(10, dimension))
    of = generator.integers(0, 10, num_rows)
    return unit(centres[of] + 0.7 * generator.normal(size=(num_rows, dimension))), [str(c) for c in of]


def answers(memory: VisualMemory, queries: np.ndarray, k: int = 20) -> list:
    """Everything a decision says but for the version and the number of shards."""
    decisions = memory.classify(embeddings=queries, k=k)
    return [(d.label, d.confidence, d.margin, d.votes, d.neighbors) for d in decisions]


def test_an_exact_index_in_any_sharding_answers_to_the_last_digit(make_memory: MakeMemory) -> None:
    vectors, labels = clustered(1_500)
    vectors[700:760] = vectors[700]  # duplicates across a border of parts
    memory = make_memory(vectors, labels)
    queries = np.concatenate([clustered(40, seed=1)[0], vectors[695:705]])
    expected = answers(memory, queries)
    alone = [answers(memory, queries[query : query + 1])[0] for query in range(len(queries))]
    assert alone == expected
    for shard_rows in (200, 700, 10_000):
        state = memory.index(IndexOptions(key="Flat", shard_rows=shard_rows, rebuild=True))
        assert state.index is not None
        assert len(state.index.shards) == {200: 12, 700: 3, 10_000: 1}[shard_rows]
        assert answers(memory, queries) == expected
    add_vectors(memory.log, *clustered(300, seed=5), name="more")
    both = answers(memory, queries)
    memory.index(IndexOptions(key="Flat", shard_rows=400, rebuild=True))
    assert answers(memory, queries) == both != expected


def test_forgotten_entries_never_come_back(make_memory: MakeMemory) -> None:
    vectors, labels = clustered(1_000)
    memory = make_memory(vectors, labels)
    ids = memory.live().live_ids()
    for key in (None, "Flat", "IVF16,Flat", "IVF16,PQ16x4fs", "IVF8,SQ8"):
        if key:
            memory.index(IndexOptions(key=key, rebuild=True, target_recall=0.2))
        forgotten = memory.live().live_ids()[::7]
        memory.forget(ids=forgotten.tolist())
        found = memory.live().search(vectors[:50].astype(np.float32), 900)
        assert not np.isin(found.ids_QK, forgotten).any()
        assert (found.ids_QK >= 0).sum(axis=1).min() == min(len(memory.live()), 900)
    assert len(memory.live()) < len(ids)


@pytest.mark.parametrize("key", ["IVF64,Flat", "IVF64,SQ8", "IVF64,PQ16x4fs", "HNSW16"])
def test_k_live_neighbours_come_back_when_most_are_masked(make_memory: MakeMemory, key: str) -> None:
    vectors, labels = clustered(2_000)
    memory = make_memory(vectors, labels)
    memory.index(IndexOptions(key=key, target_recall=0.2))
    memory.forget(labels=[str(label) for label in range(1, 10)])
    found = memory.search(embeddings=vectors[:20], k=30)
    assert {len(neighbors) for neighbors in found} == {30}
    assert {neighbor.label for neighbors in found for neighbor in neighbors} == {"0"}


def test_exclusions_take_up_no_rank_and_keep_similarities_aligned(make_memory: MakeMemory) -> None:
    vectors, labels = clustered(400)
    memory = make_memory(vectors, labels)
    query = vectors[:1]
    [before] = memory.classify(embeddings=query, k=15)
    excluded = [before.neighbors[i].id for i in (0, 3, 4)]
    [after] = memory.classify(embeddings=query, k=15, exclude=excluded)
    longer = memory.classify(embeddings=query, k=18)[0].neighbors
    expected = [n for n in longer if n.id not in excluded]
    assert [(n.id, n.similarity, n.label) for n in after.neighbors] == [(n.id, n.similarity, n.label) for n in expected]
    assert [n.rank for n in after.neighbors] == list(range(15))


def test_weigh_stays_with_its_entry_when_others_are_excluded(make_memory: MakeMemory) -> None:
    vectors, labels = clustered(200)
    memory = make_memory(vectors, labels)
    [before] = memory.classify(embeddings=vectors[:1], k=6, voting="plurality")
    heavy = before.neighbors[3].id
    [after] = memory.classify(
        embeddings=vectors[:1], k=6, voting="plurality", exclude=[before.neighbors[1].id], weigh={heavy: 3.0}
    )
    weights = {n.id: n.weight for n in after.neighbors}
    assert weights[heavy] == pytest.approx(3 / 8)
    assert after.neighbors[2].id == heavy
    assert after.neighbors[2].reliability == 3.0
    assert sum(w for w in weights.values() if w) == pytest.approx(1.0)


def test_entries_without_a_label_take_up_no_rank(make_memory: MakeMemory) -> None:
    vectors, labels = clustered(300)
    mixed = [label if row % 3 else None for row, label in enumerate(labels)]
    memory = make_memory(vectors, mixed)
    for _ in range(2):
        [decision] = memory.classify(embeddings=vectors[:1], k=50)
        assert len(decision.neighbors) == 50
        assert all(neighbor.label is not None for neighbor in decision.neighbors)
        assert memory.search(embeddings=vectors[:1], k=1)[0][0].label is None
        memory.index(IndexOptions(key="IVF8,Flat"))


def test_what_if_a_label_were_another(make_memory: MakeMemory) -> None:
    memory = make_memory(unit(np.eye(4)), ["a", "b", "b", None])
    query = unit(np.array([[1.0, 0.9, 0.8, 0.95]]))
    ids = {n.label: n.id for n in memory.search(embeddings=query, k=4)[0]}
    assert memory.classify(embeddings=query, k=3, voting="plurality")[0].label == "b"
    [decision] = memory.classify(embeddings=query, k=4, voting="plurality", assume={ids[None]: "a"})
    assert decision.label == "a"
    assert decision.votes == {"a": 0.5, "b": 0.5}
    [decision] = memory.classify(embeddings=query, k=1, voting="plurality", assume={ids["a"]: "new"})
    assert decision.votes == {"new": 1.0}
    assert memory.status()["entries_by_label"] == {"a": 1, "b": 2}


def test_fewer_entries_than_k(make_memory: MakeMemory) -> None:
    memory = make_memory(unit(np.eye(3)), ["a", "b", "b"])
    [decision] = memory.classify(embeddings=unit(np.ones((1, 3))), k=50)
    assert len(decision.neighbors) == 3
    assert decision.k == 50


@pytest.mark.parametrize(
    ("labels", "options", "reason"),
    [
        ([None, None], {}, "no entry of the memory has a label"),
        (["a", "b"], {"exclude": "all"}, "every entry with a label is excluded"),
        (["a", "b"], {"weigh": "zero"}, "all neighbours have weight zero"),
        (["a", "b"], {"abstain_below": 0.9}, "is below 0.9"),
        (["a", "b"], {"forget": True}, "the memory holds no entries"),
    ],
)
def test_abstentions_say_why(make_memory: MakeMemory, labels: list, options: dict, reason: str) -> None:
    memory = make_memory(unit(np.eye(2)), labels)
    ids = memory.live().live_ids().tolist()
    asked: dict = {"abstain_below": options.get("abstain_below", 0.0)}
    if "exclude" in options:
        asked["exclude"] = ids
    if "weigh" in options:
        asked["weigh"] = dict.fromkeys(ids, 0.0)
    if "forget" in options:
        memory.forget(ids=ids)
    [decision] = memory.classify(embeddings=unit(np.ones((1, 2))), k=2, **asked)
    assert decision.abstained
    assert decision.label is None
    assert decision.reason is not None
    assert reason in decision.reason
    if "abstain_below" in options:
        assert decision.votes == pytest.approx({"a": 0.6, "b": 0.4})
    else:
        assert (decision.votes, decision.confidence, decision.margin) == ({}, 0.0, 0.0)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_restrictions_equal_a_filtered_sort(data: st.DataObject) -> None:
    """Search under any restriction equals filtering a full ranking, over blocks of any size."""
    seed = data.draw(st.integers(0, 99))
    vectors, labels = clustered(120, seed, dimension=8)
    live = _live_of(vectors, [label if i % 4 else None for i, label in enumerate(labels)], data)
    ids = live.live_ids()
    exclude = frozenset(data.draw(st.lists(st.sampled_from(ids.tolist()), max_size=20)))
    own = data.draw(st.booleans())
    scope = data.draw(st.sampled_from(["live", "labelled"]))
    k = data.draw(st.integers(1, 140))
    queries = live.vectors_of(ids[:5])
    found = live.search(queries, k, Restrictions(scope, exclude, ids[:5] if own else None))
    everything = live.vectors_of(ids).astype(np.float64)
    codes = live.codes_of(ids)
    for query in range(5):
        scores = np.float32(np.einsum("nd,d->n", everything, queries[query].astype(np.float64)))
        allowed = [
            i
            for i, entry_id in enumerate(ids.tolist())
            if entry_id not in exclude
            and not (own and entry_id == ids[query])
            and not (scope == "labelled" and codes[i] < 0)
        ]
        expected = sorted(allowed, key=lambda i, s=scores: (-s[i], ids[i]))[:k]
        got = found.ids_QK[query][found.ids_QK[query] >= 0]
        assert got.tolist() == ids[expected].tolist()


def _live_of(vectors: np.ndarray, labels: list, data: st.DataObject) -> LiveEntries:
    """Live entries in one to three blocks, some rows dead, without touching a disk."""
    import pyarrow as pa

    from pipeline.index.search.blocks import Block

    names = sorted({label for label in labels if label is not None})
    codes = np.array([names.index(label) if label is not None else -1 for label in labels], np.int32)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(labels)), max_size=2)))
    live = np.random.default_rng(0).random(len(labels)) < 0.8
    live[:8] = True
    blocks = []
    for start, end in zip([0, *cuts], [*cuts, len(labels)], strict=True):
        part = vectors[start:end]
        blocks.append(
            Block(
                ids_N=np.arange(start, end, dtype=np.int64) * 3,
                codes_N=codes[start:end],
                vectors_ND=part,
                live_N=live[start:end],
                uris=pa.chunked_array([pa.array([f"/{i}" for i in range(start, end)], pa.string())]),
                datasets=pa.chunked_array([pa.array(["d"] * (end - start), pa.string())]),
                make_finder=lambda rows_N, part=part: ExactFinder(part, rows_N),
            )
        )
    return LiveEntries(vectors.shape[1], names, blocks, 0)


def test_a_state_without_entries_is_empty(make_memory: MakeMemory) -> None:
    memory = make_memory(unit(np.eye(2)), ["a", "b"])
    empty = LiveEntries.open(memory.log.storage, State())
    assert len(empty) == 0
    assert empty.search(np.zeros((1, 0), np.float32), 5).ids_QK.shape == (1, 0)


@pytest.mark.parametrize("key", ["IVF4,Flat", "IVF4,SQfp16", "IVF4_HNSW8,Flat", "IVF4,SQ8", "IVF4,PQ16x4fs"])
def test_an_index_searched_wholly_is_exact_and_says_how_far_off_it_may_be(make_memory: MakeMemory, key: str) -> None:
    vectors, labels = clustered(800)
    vectors[300:420] = vectors[300]  # more equals than k
    memory = make_memory(vectors[:700], labels[:700])
    queries = np.concatenate([clustered(40, seed=1)[0], vectors[295:305]]).astype(np.float32)
    memory.index(IndexOptions(key=key, target_recall=0.1))
    add_vectors(memory.log, vectors[700:], labels[700:], name="fresh")
    exact = ExactFinder(vectors[:700], np.arange(700))
    block, *_ = memory.live().blocks
    finder = block.finder("live")
    assert isinstance(finder, ListFinder)
    values = {"nprobe": 4, "efSearch": 64}
    wide = approximate_finder(finder.seat.place[0].index, values, np.arange(len(block.ids_N)), block.vectors_ND)
    found = wide.find(queries, 10)
    known = found.rows_QK >= 0
    true_QK = similarities(queries, block.vectors_ND, found.rows_QK)
    off = np.abs(found.similarities_QK[known] - true_QK[known])
    assert off.max() <= found.error
    if "Flat" not in key and "fp16" not in key:
        assert np.isinf(found.error)  # similarities of codes: all candidates are scored again
    else:
        assert found.error < 1e-4
        searched = []
        for finder in (exact, wide):
            block._finders["live"] = finder
            searched.append(memory.live().search(queries, 10))
        for one, other in zip(*(asdict(retrieved).values() for retrieved in searched), strict=True):
            np.testing.assert_array_equal(one, other)

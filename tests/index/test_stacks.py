"""The lists of the shards of a process are merged: answers stay the same, and only new shards are read."""

import shutil
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest

from pipeline.decisions.neighbor_table import merge_neighbors, nearest_ids
from pipeline.decisions.rivals import Rivals, borders, shared_borders
from pipeline.errors import DamagedFile
from pipeline.index.build.plan import IndexOptions
from pipeline.index.search import merging, open_blocks
from pipeline.index.search.ann import ListFinder
from pipeline.index.search.live_entries import LiveEntries, Restrictions, Retrieved
from pipeline.index.search.open_blocks import ALL, Share
from pipeline.index.search.quantizer import Quantizer
from pipeline.index.search.together import contenders
from pipeline.questions.answering import neighbor_table
from pipeline.serving.service.group import Answer, Asked, Group, Subject
from pipeline.store.lookup.digests import Digests
from pipeline.visual_memory import VisualMemory
from tests.conftest import add_vectors
from tests.index.test_search import clustered

KEY = "IVF32,PQ16x4fs"
QUERIES = clustered(40, seed=1)[0].astype(np.float32)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory with four shards of fast scan, which takes seconds to build."""
    folder = tmp_path_factory.mktemp("stacks") / "memory"
    memory = VisualMemory(folder)
    add_vectors(memory.log, *clustered(2_400))
    memory.index(IndexOptions(key=KEY, shard_rows=640, target_recall=0.3))
    return folder


@pytest.fixture
def memory(built: Path, tmp_path: Path) -> VisualMemory:
    """A copy of it."""
    return VisualMemory(shutil.copytree(built, tmp_path / "memory"))


def stacks(live: LiveEntries) -> list[tuple[int, ...]]:
    """The rows of the members of each stack that the shards are searched in."""
    found = {}
    for block in live.blocks:
        finder = block.finder("live")
        if isinstance(finder, ListFinder):
            stack, _ = finder.seat.place
            found[id(stack)] = stack.num_rows
    return sorted(found.values(), key=sum)


def opened(memory: VisualMemory, before: LiveEntries | None = None, share: Share = ALL) -> LiveEntries:
    """The newest version, with merged lists."""
    return LiveEntries.open(memory.log.storage, memory.log.latest(), before, share, merged=True)


def separately(memory: VisualMemory) -> LiveEntries:
    """The newest version, with each shard in a stack of its own."""
    return LiveEntries.open(memory.log.storage, memory.log.latest())


def assert_equal(one: Retrieved, other: Retrieved) -> None:
    for name in ("ids_QK", "similarities_QK"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def masked(memory: VisualMemory) -> None:
    """Forget a class, a tenth of another shard and all of a third."""
    ids = memory.live().live_ids()
    memory.forget(ids=ids[700:1_200:10].tolist() + ids[1_300:1_900].tolist())
    memory.forget(labels=["3"])


@pytest.mark.parametrize("change", [None, masked], ids=["all rows", "masked"])
@pytest.mark.parametrize("where", [None, "label != '5'", "label = '5'"])
def test_merged_lists_answer_as_separate_ones(
    memory: VisualMemory,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[VisualMemory], None] | None,
    where: str | None,
) -> None:
    monkeypatch.setattr("pipeline.index.search.ann.EXACT_UP_TO", 0)  # search through masks however few rows are left
    monkeypatch.setattr("pipeline.index.search.live_entries.FEW_ROWS", 0)
    if change is not None:
        change(memory)
    storage, state = memory.log.storage, memory.state()
    merged, separate = opened(memory), separately(memory)
    assert [len(stack) for stack in stacks(merged)] == [4]
    assert [len(stack) for stack in stacks(separate)] == [1, 1, 1, 1]
    shares = [opened(memory, share=Share(number, 3)) for number in range(3)]
    if where is not None:
        merged, separate, *shares = (each.satisfying(storage, state, where) for each in (merged, separate, *shares))
    excluded = frozenset(merged.live_ids()[:300:7].tolist())
    for k in (1, 10, 150):
        for restrictions in (Restrictions(), Restrictions("labelled", excluded)):
            found = merged.search(QUERIES, k, restrictions)
            assert_equal(found, separate.search(QUERIES, k, restrictions))
            assert (found.ids_QK >= 0).sum(axis=1).min() == min(
                k, len(merged) - len(excluded & {*restrictions.exclude})
            )
            for row in range(0, len(QUERIES), 9):
                alone = merged.search(QUERIES[row : row + 1], k, restrictions)
                np.testing.assert_array_equal(alone.ids_QK[0], found.ids_QK[row])
                np.testing.assert_array_equal(alone.similarities_QK[0], found.similarities_QK[row])
            tables = [neighbor_table(each, each.contenders(QUERIES, k, restrictions)) for each in shares]
            together = merge_neighbors(tables, k)
            np.testing.assert_array_equal(together.ids_QK, found.ids_QK)
            np.testing.assert_array_equal(together.similarities_QK, found.similarities_QK)


def test_groups_answer_as_one(memory: VisualMemory) -> None:
    """Also where each leaves out the query's own entry, and where a question asks for kept columns and labels."""
    live, version = memory.live(), memory.state().version
    ids = live.live_ids()[::97]
    vectors = live.vectors_of(ids)
    digests = Digests(memory.log.storage, memory.state()).of(ids)
    groups = [Group(memory.log.storage, Share(number, 3)) for number in range(3)]
    for scope, own in (("live", False), ("labelled", False), ("labelled", True)):
        more = {"own_Q": ids, "own_digests_Q": digests} if own else {}
        asked = Asked(Subject(version), vectors, 12, scope, tuple(ids[:3].tolist()), **more)  # type: ignore[arg-type]
        [whole], *answers = ([*group.answer([asked])] for group in (Group(memory.log.storage, ALL), *groups))
        assert isinstance(whole, Answer)
        tables = [answer.found for [answer] in answers if isinstance(answer, Answer)]
        assert len(tables) == 3
        together = merge_neighbors(tables, 12)
        assert nearest_ids(tables, 12) == {*together.ids_QK[together.ids_QK >= 0].tolist()}
        np.testing.assert_array_equal(together.ids_QK, whole.found.ids_QK)
        np.testing.assert_array_equal(together.similarities_QK, whole.found.similarities_QK)
        assert (together.uris, together.kept) == (whole.found.uris, whole.found.kept)


def test_each_query_leaves_out_its_own_entry(memory: VisualMemory) -> None:
    live = opened(memory)
    ids = live.live_ids()[::60]
    vectors = live.vectors_of(ids)
    with_own = live.search(vectors, 6)
    without = live.search(vectors, 5, Restrictions(own_Q=ids))
    assert (with_own.ids_QK[:, 0] == ids).all()
    np.testing.assert_array_equal(without.ids_QK, with_own.ids_QK[:, 1:])


def test_a_damaged_shard_is_left_out_of_the_merged_lists(memory: VisualMemory) -> None:
    state = memory.state()
    assert state.index is not None
    damaged = state.index.shards[1]
    assert damaged.index is not None
    path = Path(memory.log.storage.uri) / damaged.index.path
    path.write_bytes(path.read_bytes()[:-100])
    live = opened(memory)
    assert (live.num_shards, live.shards_total) == (3, 4)
    assert [len(stack) for stack in stacks(live)] == [3]
    whole = set(np.load(Path(memory.log.storage.uri) / damaged.ids.path).tolist())
    assert not whole & set(live.search(QUERIES, 200).ids_QK.ravel().tolist())


def test_a_shard_that_is_damaged_while_it_is_merged_is_left_out(
    memory: VisualMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[merging.ShardLists] = []
    merge = merging.merge

    def spoiled(shards: list[merging.ShardLists]) -> dict:
        made.extend(shards)

        def read() -> faiss.Index:
            raise DamagedFile("it changed")

        shards[2].read = read
        return merge(shards)

    monkeypatch.setattr(open_blocks, "merge", spoiled)
    live = opened(memory)
    assert (live.num_shards, live.shards_total) == (3, 4)
    assert str(live.damaged[0]) == "it changed"
    assert [len(stack) for stack in stacks(live)] == [3]
    assert (live.search(QUERIES, 200).ids_QK >= 0).all()


def test_a_new_shard_is_not_merged_with_much_larger_ones(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(memory)
    read: list[str] = []
    read_faiss = merging._read
    monkeypatch.setattr(merging, "_read", lambda shard: read.append("shard") or read_faiss(shard))
    add_vectors(memory.log, *clustered(300, seed=5), name="more")
    memory.index(IndexOptions(shard_rows=300, target_recall=0.3))
    second = opened(memory, first)
    assert [sum(stack) for stack in stacks(second)] == [300, 2_400]
    assert read == ["shard"]
    assert_equal(second.search(QUERIES, 30), separately(memory).search(QUERIES, 30))
    before = first.search(QUERIES, 30)
    add_vectors(memory.log, *clustered(1_280, seed=6), name="yet more")
    memory.index(IndexOptions(shard_rows=640, target_recall=0.3))
    third = opened(memory, second)
    assert len(stacks(third)) <= 2
    assert_equal(third.search(QUERIES, 30), separately(memory).search(QUERIES, 30))
    assert_equal(first.search(QUERIES, 30), before)


def test_an_erased_shard_leaves_the_merged_lists(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    before = opened(memory)
    gone = before.live_ids()[:640:2]
    memory.forget(ids=gone.tolist(), erase=True)
    live = opened(memory, before)
    assert sum(sum(stack) for stack in stacks(live)) == 2_400 - len(gone)
    found = live.search(QUERIES, 100)
    assert not np.isin(found.ids_QK, gone).any()
    assert_equal(found, separately(memory).search(QUERIES, 100))


@pytest.mark.parametrize("rows", [(1, 31, 32), (33, 64, 95, 1), (500, 700)])
def test_merged_codes_are_those_of_one_index(rows: tuple[int, ...], tmp_path: Path) -> None:
    vectors = clustered(2_000)[0].astype(np.float32)
    trained = faiss.index_factory(32, "IVF4,PQ16x4fs", faiss.METRIC_INNER_PRODUCT)
    trained.train(vectors)
    faiss.write_index(trained, str(tmp_path / "trained"))
    quantizer = Quantizer(trained)

    def index_of(start: int, end: int) -> faiss.Index:
        index = faiss.read_index(str(tmp_path / "trained"))
        index.add(vectors[start:end])
        assert quantizer.give_to(index)
        assert merging.can_be_merged(index, quantizer)
        return index

    ends = np.cumsum(rows).tolist()
    spans = [*zip([0, *ends[:-1]], ends, strict=True)]
    shards = [
        merging.ShardLists(lambda span=span: index_of(*span), quantizer, count, merging.sizes_of(index_of(*span)))  # type: ignore[misc]
        for span, count in zip(spans, rows, strict=True)
    ]
    assert not merging.merge(shards)
    places = [shard.seat.place for shard in shards if shard.seat is not None]
    [stack] = {id(stack): stack for stack, _ in places}.values()
    assert [member for _, member in places] == [*range(len(rows))]
    whole = index_of(0, ends[-1])
    similarities, found = whole.search(vectors[-50:], 20)
    merged, numbers = stack.inverted.search(vectors[-50:], 20)
    np.testing.assert_array_equal(merged, similarities)
    rows_of = np.concatenate(
        [start + np.arange(count) for start, count in zip(stack.starts.tolist(), rows, strict=False)]
    )
    known = np.where(found >= 0, rows_of[found], -1)
    assert [set(one) for one in known.tolist()] == [set(one) for one in numbers.tolist()]


def test_the_border_is_that_of_all_places() -> None:
    random = np.random.default_rng(0)
    codes_QR = random.normal(size=(5, 60)) * 0.1
    parts = [Rivals(part, -np.sort(-part, axis=1)[:, :12], 12, 4) for part in (codes_QR[:, :25], codes_QR[:, 25:])]
    np.testing.assert_array_equal(shared_borders(parts), -np.sort(-codes_QR, axis=1)[:, 11])
    further = np.where(np.arange(60) < 3, codes_QR, codes_QR - 8.0)  # three rows were found at once, the others later
    border_Q = borders(further, 100, 4)
    assert ((further >= border_Q[:, None]).all(axis=1)).all()
    border_Q = borders(further, 100, 3)
    assert ((further >= border_Q[:, None]).sum(axis=1) == 3).all()


def test_contenders_are_the_nearest_behind_every_border() -> None:
    random = np.random.default_rng(0)
    codes_QK = np.round(random.normal(size=(20, 90)), 1)  # with ties
    similarities_QK = (codes_QK + random.normal(size=codes_QK.shape)).astype(np.float32)
    can_QK = contenders(codes_QK, similarities_QK, 7)
    assert can_QK.mean() < 0.6
    for query in range(20):
        for border in np.unique(codes_QK[query]):
            behind = np.flatnonzero(codes_QK[query] >= border)
            nearest = behind[np.argsort(-similarities_QK[query, behind])[:7]]
            assert can_QK[query, nearest].all()

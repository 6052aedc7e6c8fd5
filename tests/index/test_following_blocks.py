"""A version that changes one block leaves the others as they are, with what was found out about them."""

import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from pipeline import VisualMemory
from pipeline.index.build.plan import IndexOptions
from pipeline.index.search import live_entries
from pipeline.index.search.blocks import Block
from pipeline.index.search.live_entries import LiveEntries
from pipeline.index.search.overlay import Overlay
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.tables.labels import label_rows, newest_labels
from tests.conftest import MakeMemory
from tests.edits.given import add_given, vectors

ROWS, SHARDS = 512, 4
WHERE = "label != 'none' and id > 7"


@pytest.fixture
def memory(make_memory: MakeMemory) -> VisualMemory:
    memory = make_memory(vectors(ROWS * SHARDS), [f"label {row % 10}" for row in range(ROWS * SHARDS)])
    memory.index(IndexOptions(key="Flat", shard_rows=ROWS))
    memory.relabel(label_set="coarse", map={f"label {number}": f"big {number % 2}" for number in range(10)})
    return memory


def asked(memory: VisualMemory, before: LiveEntries | None = None) -> tuple[LiveEntries, list[LiveEntries]]:
    """The newest version, and all of its entries as stored, in a label set, and those that satisfy an expression."""
    storage, state = memory.log.storage, memory.log.latest()
    live = LiveEntries.open(storage, state, before)
    in_set = live.in_label_set(storage, state, "coarse")
    views = [live, in_set, *(each.satisfying(storage, state, WHERE) for each in (live, in_set))]
    for view in views:
        view.label_counts(), view.dataset_counts(), len(view)
    return live, views


def forget_one(memory: VisualMemory) -> None:
    memory.forget(ids=[int(memory.live().blocks[1].ids_N[3])])


def relabel_one(memory: VisualMemory) -> None:
    memory.relabel(ids=[int(memory.live().blocks[1].ids_N[3])], label="another")


def relabel_one_in_the_set(memory: VisualMemory) -> None:
    memory.relabel(ids=[int(memory.live().blocks[1].ids_N[3])], label="another", label_set="coarse")


def add_one(memory: VisualMemory) -> None:
    add_given(memory.log, vectors(1), ["label 3"])


@pytest.mark.parametrize(
    ("change", "in_place"),
    [(forget_one, {1}), (relabel_one, {1}), (relabel_one_in_the_set, {1}), (add_one, {SHARDS})],
)
def test_only_the_block_that_changed_is_looked_at_again(
    memory: VisualMemory,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[VisualMemory], None],
    in_place: set[int],
) -> None:
    before, views_before = asked(memory)
    change(memory)
    masked: list[Block] = []
    masks = live_entries.masks
    monkeypatch.setattr(
        live_entries, "masks", lambda s, t, blocks, *more: masked.extend(blocks) or masks(s, t, blocks, *more)
    )
    now, views = asked(memory, before)
    for view, view_before in zip(views, views_before, strict=True):
        same = {
            number
            for number, (block, known) in enumerate(zip(view.blocks[:SHARDS], view_before.blocks, strict=True))
            if block is known
        }
        changes = set() if change is relabel_one_in_the_set and view.label_set is None else in_place
        assert same == set(range(SHARDS)) - changes
    assert len(masked) == (1 if change is relabel_one_in_the_set else 2)
    anew, views_anew = asked(memory)
    for view, other in zip(views, views_anew, strict=True):
        assert dict(zip(view.labels, view.label_counts(), strict=True)) == dict(
            zip(other.labels, other.label_counts(), strict=True)
        )
        assert (view.dataset_counts(), len(view)) == (other.dataset_counts(), len(other))
    assert len(now) == len(anew)


def test_blocks_that_are_gone_are_not_held(memory: VisualMemory) -> None:
    before, _ = asked(memory)
    memory.index(IndexOptions(key="Flat", shard_rows=ROWS, rebuild=True))
    live = LiveEntries.open(memory.log.storage, memory.log.latest(), before)
    assert not live._restricted.items()
    assert not any(of.of for of in live._label_set_blocks.values())


def test_ten_million_tombstones_elsewhere_add_little_to_a_block() -> None:
    generator = np.random.default_rng(0)
    ids = np.arange(1 << 40, (1 << 40) + 200_000, dtype=np.int64)
    none = pa.chunked_array([pa.nulls(len(ids), pa.string())])
    block = Block(ids, np.zeros(len(ids), np.int32), None, np.ones(len(ids), bool), none, none, lambda rows_N: None)  # type: ignore[arg-type, return-value]
    forgotten = np.unique(np.concatenate([generator.integers(0, 1 << 40, 10_000_000), ids[::100], ids[-1:] + 5]))
    took = []
    for _ in range(5):
        began = time.process_time()
        assert block.rows_of(forgotten).tolist() == list(range(0, len(ids), 100))
        took.append(time.process_time() - began)
    assert min(took) < 0.005


def test_layers_of_own_labels_are_their_newest_rows() -> None:
    """Whatever was folded, the layers have the label that the last row of an id gives in the set."""
    generator = np.random.default_rng(0)
    overlay, rows = Overlay(), label_rows(np.empty(0, np.int64), [], None)
    for version in range(40):
        ids = np.unique(generator.integers(0, 200, generator.integers(1, 60)))
        names = [None if i % 7 == 0 else f"{version} {i}" for i in ids.tolist()]
        rows = pa.concat_tables([rows, label_rows(ids, names, "set" if version % 3 == 0 else None)])
        files = (*overlay.labels, FileRef(path=f"{version}", num_bytes=1, sha256="0" * 64))
        overlay = Overlay(labels=files, own_labels=rows, _layers=dict(overlay._layers))
        for name in (None, "set"):
            wanted, own = newest_labels(rows, name), overlay.own(name)
            assert own.flat().ids_N.tolist() == wanted.ids_N.tolist()
            assert own.flat().labels.to_pylist() == wanted.labels.to_pylist()
            assert len(own.layers) <= 8
            inside = (wanted.ids_N >= 50) & (wanted.ids_N <= 99)
            assert own.of(50, 99).ids_N.tolist() == wanted.ids_N[inside].tolist()
            assert own.of(50, 99).labels.to_pylist() == wanted.labels.filter(pa.array(inside)).to_pylist()


def test_forgetting_again_takes_back_nothing(memory: VisualMemory) -> None:
    """A rollback is followed too: tombstones that are gone make their rows live again."""
    before, _ = asked(memory)
    version = memory.log.latest().version
    forget_one(memory)
    without, _ = asked(memory, before)
    assert len(without) == len(before) - 1
    memory.rollback(version)
    again, _ = asked(memory, without)
    assert np.array_equal(again.live_ids(), before.live_ids())

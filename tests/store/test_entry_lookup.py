"""Looking entries up in their files finds what an opened memory finds, and versions count what is there."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import VisualMemory
from pipeline.index.build.plan import IndexOptions
from pipeline.index.search.live_entries import LiveEntries
from pipeline.store.log import label_counts
from pipeline.store.log.single_adds import FOLD_EVERY
from pipeline.store.lookup.entry_lookup import EntryLookup, num_live_fresh
from pipeline.store.tables import counts, digest_files, labels, parquet_columns, tombstones
from pipeline.store.tables.ids import SEGMENT_SHIFT
from tests.conftest import MakeMemory, add_vectors, unit
from tests.edits.given import add_given
from tests.store.counting import counted

SEEDS = range(6)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files, and few rows of each read at once."""
    for module in (parquet_columns, tombstones, labels):
        monkeypatch.setattr(module, "READ_WHOLE", 8)
    monkeypatch.setattr(parquet_columns, "SEARCHED_FROM", 1)
    monkeypatch.setattr(parquet_columns, "FILES_BESIDE", 0)
    monkeypatch.setattr(digest_files, "FILE_ROWS", 16)
    monkeypatch.setattr(label_counts, "FOLD_EVERY", 4)


def changed(memory: VisualMemory, random: np.random.Generator, name: str, file: Path) -> None:
    """One change of a memory, drawn at random. `file` may be written for it."""
    if random.random() < 0.4:
        changed_by_name(memory, random, name, file)
        return
    live = memory.live()
    some = some_ids(live, random)
    match int(random.integers(0, 9)):
        case 0:
            rows = int(random.integers(1, 40))
            names = [str(random.choice(["cat", "dog", "eel"])) for _ in range(rows)]
            vectors_ND = unit(random.normal(size=(rows, live.dimension)))
            add_vectors(memory.log, vectors_ND, names, dataset=name, name=name)
        case 1 | 2:
            vectors_ND = unit(random.normal(size=(5, live.dimension)))
            for row in range(5):
                add_given(memory.log, vectors_ND[row : row + 1], name=f"{name} {row % 2}")
        case 3:
            memory.forget(ids=some)
        case 4 | 5:
            memory.relabel(ids=some, label=str(random.choice(["cat", "new", name])))
        case 6:
            memory.relabel(ids=some, label=name, label_set="view")
            memory.relabel(label_set="view", map={"cat": "pet", "dog": "pet"})
        case 7:
            memory.compact() if random.random() < 0.5 else grow_index(memory)
        case 8:
            memory.rollback(int(random.choice(memory.log.retained()[-5:-1])))


def grow_index(memory: VisualMemory) -> None:
    index = memory.state().index
    memory.index(IndexOptions(key=index.key if index else "Flat", target_recall=0.1))


def changed_by_name(memory: VisualMemory, random: np.random.Generator, name: str, file: Path) -> None:
    """One change of the entries that have some uris, a label or a dataset."""
    live = memory.live()
    ids_N = np.array(some_ids(live, random))
    uris = [*dict.fromkeys(EntryLookup(memory.log.storage, memory.state()).fields(ids_N, ["uri"])["uri"].to_pylist())]
    match int(random.integers(0, 4)):
        case 0:
            file.write_text("uri,label\n" + "".join(f"{uri},{name}\n" for uri in uris))
            assert memory.relabel(file=file).relabelled == sum(len(live.matching(uri=uri)) for uri in uris)
        case 1:
            gone = np.concatenate([live.matching(uri=uri) for uri in uris[:2]])
            assert memory.forget(uris=uris[:2]).forgotten == len(gone)
        case 2:
            label = str(random.choice([label for label in live.labels if len(live.matching(label=label))]))
            gone = live.matching(label=label)
            if len(gone) < len(live) / 2:
                assert memory.forget(labels=[label]).forgotten == len(gone)
        case 3:
            dataset = str(random.choice([*live.dataset_counts()]))
            gone = live.matching(dataset=dataset)
            if len(gone) < len(live) / 2:
                assert memory.forget(datasets=[dataset]).forgotten == len(gone)


def some_ids(live: LiveEntries, random: np.random.Generator) -> list[int]:
    ids_N = live.live_ids()
    return random.choice(ids_N, min(len(ids_N), int(random.integers(1, 9))), replace=False).tolist()


def check(memory: VisualMemory) -> None:
    state, live = memory.state(), memory.live()
    lookup = EntryLookup(memory.log.storage, state)
    ids_N = np.sort(live.live_ids())
    asked = np.unique(np.concatenate([ids_N, ids_N + 1, [0, 1 << 60]]))
    assert lookup.contains(asked).tolist() == live.contains(asked).tolist()
    codes_N = live.codes_of(ids_N)
    assert lookup.labels(ids_N).to_pylist() == [live.labels[code] if code >= 0 else None for code in codes_N]
    for label in {*live.labels, "none such"}:
        assert lookup.matching(label=label).tolist() == sorted(live.matching(label=label))
    by_dataset = live.dataset_counts()
    for dataset in by_dataset:
        assert lookup.matching(dataset=dataset).tolist() == sorted(live.matching(dataset=dataset))
    uris = pa.concat_arrays([chunk for block in live.blocks for chunk in _chunks(block.uris)]).unique().to_pylist()
    found = sorted(zip(*(column.tolist() for column in lookup.with_uris(uris)), strict=True))
    assert found == sorted(zip(*(column.tolist() for column in live.with_uris(uris)), strict=True))
    status = memory.status()
    numbers = {label: int(n) for label, n in zip(live.labels, live.label_counts(), strict=True) if n}
    assert status["entries_by_label"] == dict(sorted(numbers.items()))
    assert (status["datasets"], status["entries"]) == (by_dataset, len(live))
    for name, number in status["label_sets"].items():
        in_set = live.in_label_set(memory.log.storage, state, name)
        assert number == int((in_set.label_counts() > 0).sum())
        seen = [in_set.labels[code] if code >= 0 else None for code in in_set.codes_of(ids_N)]
        assert lookup.labels_in(name, ids_N) == seen
    fresh = sum(int(block.live_N.sum()) for block in live.blocks[live.num_shards :])
    assert num_live_fresh(memory.log.storage, state) == fresh


def _chunks(column: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return column.chunks if isinstance(column, pa.ChunkedArray) else [column]


@pytest.mark.parametrize("seed", SEEDS)
def test_it_finds_what_an_opened_memory_finds(make_memory: MakeMemory, seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    memory = make_memory(unit(random.normal(size=(60, 8))), ["cat", "dog", "eel"] * 20)
    for turn in range(FOLD_EVERY // 3):
        changed(memory, random, f"turn {turn}", tmp_path / "named.csv")
        if turn % 4 == 0:
            check(memory)
    check(memory)
    assert memory.verify().sound
    counted = memory.state().counts
    assert counted is not None
    erased = [int(i) for i in random.choice(memory.live().live_ids(), 5, replace=False)]
    assert memory.forget(ids=erased, erase=True, verify=True).receipt.proven
    check(memory)
    assert memory.verify().sound
    for turn in range(6):  # the counts after an erasure, which older versions have no longer
        changed(memory, random, f"after {turn}", tmp_path / "named.csv")
        check(memory)
    assert memory.verify().sound


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_what_is_in_a_memory_of_the_release_before(tmp_path: Path, seed: int) -> None:
    memory = VisualMemory(shutil.copytree(Path(__file__).parents[1] / "old_release/memory", tmp_path / "memory"))
    check(memory)
    assert memory.state().counts is None
    random = np.random.default_rng(seed)
    for turn in range(12):
        changed(memory, random, f"turn {turn}", tmp_path / "named.csv")
        check(memory)
    assert memory.verify().sound


def test_a_copy_is_found_by_its_bytes(make_memory: MakeMemory) -> None:
    memory = make_memory(unit(np.random.default_rng(0).normal(size=(40, 8))), ["cat"] * 40)
    lookup = EntryLookup(memory.log.storage, memory.state())
    ids_N = memory.live().live_ids()
    hashes = lookup.fields(ids_N, ["sha256"])["sha256"].to_pylist()
    at_N, found_N = lookup.with_sha256s([*hashes, "0" * 64])
    assert sorted(zip(at_N.tolist(), found_N.tolist(), strict=True)) == [*enumerate(ids_N.tolist())]


def test_counts_that_do_not_add_up_are_found(make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make_memory(unit(np.random.default_rng(0).normal(size=(40, 8))), ["cat"] * 40)
    monkeypatch.setattr("pipeline.edits.forget.changed_counts", _one_too_many)
    memory.forget(ids=[int(memory.live().live_ids()[0])])
    assert any("counts 38 live entries by label where 39 are live" in f.what for f in memory.verify().findings)


def _one_too_many(storage, lease, version, state, changes):
    wrong = counts.added([changes, counts.counted(pa.array(["given"]), pa.array(["cat"]), -1)])
    return label_counts.changed_counts(storage, lease, version, state, wrong)


def test_a_memory_of_an_older_release_is_counted_at_the_next_add(tmp_path: Path, make_memory: MakeMemory) -> None:
    memory = make_memory(unit(np.random.default_rng(0).normal(size=(40, 8))), ["cat"] * 40)
    state = memory.state()
    memory.log.rewrite_checkpoint(state.model_copy(update={"counts": None}))
    for number in range(1, state.version + 1):
        [commit] = memory.log.commits([number])
        actions = tuple(a.model_copy(update={"counts": None}) if hasattr(a, "counts") else a for a in commit.actions)
        memory.log.rewrite(commit.model_copy(update={"actions": actions}))
    memory.log.remove_rollup()
    memory = VisualMemory(memory.uri)
    assert memory.state().counts is None
    assert memory.status()["entries_by_label"] == {"cat": 40}
    memory.forget(ids=[int(memory.live().live_ids()[0])])
    assert (memory.state().counts, memory.status()["entries_by_label"]) == (None, {"cat": 39})
    add_vectors(memory.log, unit(np.random.default_rng(1).normal(size=(3, 8))), ["dog"] * 3, name="b")
    assert memory.state().counts is not None
    check(memory)


def test_a_label_is_looked_for_where_it_can_be(make_memory: MakeMemory) -> None:
    """Of files whose entries have other labels the footer is read, and of other datasets nothing."""
    vectors_ND = unit(np.random.default_rng(0).normal(size=(30_000, 8)))
    memory = make_memory(vectors_ND, [f"class {row // 300:03d}" for row in range(30_000)])
    add_vectors(memory.log, vectors_ND[:5_000], ["other"] * 5_000, dataset="b", name="b")
    asked = counted(memory)
    assert memory.plan_forget(labels=["other"]).labels == {"other": 5_000}
    others = [file.path for file in memory.state().entries_files() if file.first_id >> SEGMENT_SHIFT == 1]
    assert not {*others} & {*asked.fetched}
    assert memory.plan_forget(datasets=["b"]).forgotten == 5_000
    assert not {*others} & {*asked.fetched}
    held = EntryLookup(memory.log.storage, memory.state()).matching(label="class 041")
    assert len(held) == 300


@pytest.mark.parametrize("num_rows", [8_000, 32_000])
def test_a_label_of_folders_costs_a_few_files_of_any_number(
    make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    monkeypatch.undo()
    vectors_ND = unit(np.random.default_rng(0).normal(size=(num_rows, 8)))
    memory = make_memory(vectors_ND, [f"class {row // 100:04d}" for row in range(num_rows)])
    assert len(memory.state().entries_files()) >= 60
    for label in ("class 0000", "class 0041", f"class {num_rows // 100 - 1:04d}"):
        assert 0 < len(entries_read(memory, label, 100)) <= 16
    memory.forget(ids=EntryLookup(memory.log.storage, memory.state()).matching(label="class 0041")[:10].tolist())
    memory.relabel(
        ids=EntryLookup(memory.log.storage, memory.state()).matching(label="class 0043")[:7].tolist(),
        label="class 0041",
    )
    assert len(entries_read(memory, "class 0041", 97)) <= 22
    assert len(entries_read(memory, "class 0043", 93)) <= 20
    memory.relabel(
        ids=EntryLookup(memory.log.storage, memory.state()).matching(label="class 0051")[:5].tolist(), label="new"
    )
    assert entries_read(memory, "new", 5) <= {file.path for file in memory.state().entries_files()[: num_rows // 1_000]}


def entries_read(memory: VisualMemory, label: str, expected: int) -> set[str]:
    """The files of entries that are opened to find the entries with a label."""
    other = VisualMemory(memory.uri)
    asked = counted(other)
    assert len(EntryLookup(other.log.storage, other.state()).matching(label=label)) == expected
    return {path for path in asked.fetched if "/entries/" in path}

"""What an erasure asks about all versions: every entry once, whatever files hold it, and never all names at once."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import VisualMemory
from pipeline.edits.compact import compact
from pipeline.edits.erasure.all_versions import Catalogue
from pipeline.edits.erasure.values import Values, in_batches
from pipeline.edits.singles import fold_singles
from pipeline.store.log.label_counts import by_dataset, by_label, num_unlabelled
from pipeline.store.storage.file_refs import FileRef, describe
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.row_groups import chosen_row_groups, write_some_rows
from pipeline.store.tables.schemas import PLAN, read_table, write_rows, write_table
from tests.edits.erasing import ids_of, item, items, remember, teach


@pytest.fixture
def memory(tmp_path: Path) -> VisualMemory:
    """Entries that lie in up to three files each: as added, folded and packed."""
    memory = VisualMemory(tmp_path / "memory")
    remember(memory, items("first", 20), "first")
    remember(memory, items("second", 9, ("fox",)), "second")
    teach(memory, items("single", 6))
    fold_singles(memory.log, memory.log.latest())
    teach(memory, [item("/alone/a.png"), item("/single/0.png", "late")])
    compact(memory.log)
    memory.relabel(ids=ids_of(memory, items("second", 9)[:2]), label="wolf")
    memory.forget(ids=ids_of(memory, items("first", 3)))
    teach(memory, [item("/last/a.png", "cat")])
    return memory


def catalogue(memory: VisualMemory) -> Catalogue:
    return Catalogue(memory.log, memory.log.latest())


def test_every_entry_counts_once(memory: VisualMemory) -> None:
    all_ids = catalogue(memory).with_uris([each.uri for each in items("first", 20)])[1]
    assert len(all_ids) == 20
    known = catalogue(memory)
    assert known.known_datasets() == ["first", "second", "single"]
    assert known.known_labels() == ["cat", "dog", "eel", "fox", "late", "wolf"]
    whole = np.concatenate([known.matching(dataset=name) for name in ("first", "second", "single")])
    assert len(np.unique(whole)) == len(whole) == 38
    counts = known.counts_of(whole)
    assert by_dataset(counts) == {"first": 20, "second": 9, "single": 9}
    assert by_label(counts) == {
        "cat": 7 + 2 + 1,
        "dog": 7 + 2,
        "eel": 6 + 2,
        "fox": 7,
        "late": 1,
        "wolf": 2,
    }
    assert num_unlabelled(counts) == 1
    assert by_dataset(known.counts_of(whole[:5])) == {"first": 5}


def test_names_given_at_the_start_are_found_in_one_pass(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[list[str]] = []
    rows = Catalogue._rows

    def counted(self: Catalogue, columns: list[str], files: object = None) -> object:
        passes.append(columns)
        return rows(self, columns, files)  # type: ignore[arg-type]

    monkeypatch.setattr(Catalogue, "_rows", counted)
    known = Catalogue(memory.log, memory.log.latest(), labels=["fox", "wolf", "cat"])
    assert [len(known.matching(label=name)) for name in ("fox", "wolf", "cat")] == [7, 2, 10]
    assert len(known.known_labels()) == 6
    assert passes == [["id", "label"]]
    assert len(known.matching(label="late")) == 1
    assert len(known.matching(label="nobody")) == 0


def test_ids_and_uris(memory: VisualMemory) -> None:
    known = catalogue(memory)
    places, ids = known.with_uris(["/single/0.png", "/nowhere.png", "/first/19.png"])
    assert sorted(places.tolist()) == [0, 0, 2]
    assert set(ids[places == 0].tolist()) == set(ids_of(memory, [item("/single/0.png")]))
    assert known.unknown(ids.tolist()) is None
    assert known.unknown([int(ids[0]), 5, 6]) == 5
    assert known.unknown([]) is None
    assert len(known.with_uris([])[1]) == 0
    assert known.matching(uri="/first/19.png").tolist() == ids[places == 2].tolist()


@pytest.mark.parametrize("num_values", [0, 1, 2, 3_000])
def test_values_are_found_whatever_their_number(num_values: int) -> None:
    texts = [f"/{number}.png" for number in range(num_values)]
    values = Values(texts)
    column = pa.chunked_array([["/1.png", None, "x"], ["/0.png", "/1.png"]], pa.string())
    found = values.found_in(column).to_pylist()
    assert found == [text in texts for text in column.to_pylist()]


def test_batches_hold_as_many_rows_as_there_are_values() -> None:
    table = pa.table({"id": pa.array(range(50_000))})
    tables = [table.replace_schema_metadata({"of": str(number)}) for number in range(5)]
    assert [batch.num_rows for batch in in_batches(tables, 3)] == [100_000, 100_000, 50_000]
    assert [batch.num_rows for batch in in_batches(tables, 160_000)] == [200_000, 50_000]


def plan_of(storage: Storage, rows: int, rows_per_group: int) -> FileRef:
    table = pa.table(
        [
            pa.array(range(rows), pa.int64()),
            pa.array([f"/{number:05d}.png" for number in range(rows)]),
            pa.nulls(rows, pa.string()),
            pa.nulls(rows, pa.int64()),
            pa.nulls(rows, pa.timestamp("us", tz="UTC")),
        ],
        schema=PLAN,
    )
    with storage.publishing("segments/00000001/plan/a.parquet") as local:
        write_table(table, local, rows_per_group)
        return describe("segments/00000001/plan/a.parquet", local, rows)


def test_a_plan_is_read_and_written_by_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = VisualMemory(tmp_path / "memory").log.storage
    plan = plan_of(storage, 1_000, 100)
    wanted = {"id": [205], "uri": ["/00810.png", "/00899.png"]}
    read = [table.column("id").to_pylist() for table in chosen_row_groups(storage, plan, ["id", "uri"], wanted=wanted)]
    assert [ids[0] for ids in read] == [200, 800]
    largest = 0

    def chosen(table: pa.Table) -> pa.Array:
        nonlocal largest
        largest = max(largest, table.num_rows)
        return pa.array([number not in (205, 810) and not 300 <= number < 400 for number in table["id"].to_pylist()])

    kept = write_some_rows(storage, plan, "segments/00000001/plan/b.parquet", chosen)
    assert kept is not None
    assert largest == 100
    assert kept.rows == 898
    left = read_table(storage, kept)
    assert left.schema.equals(PLAN)
    assert set(range(1_000)) - set(left.column("id").to_pylist()) == {205, 810, *range(300, 400)}
    nothing = write_some_rows(storage, plan, "segments/00000001/plan/c.parquet", lambda t: pa.array([False] * len(t)))
    assert nothing is None
    assert not storage.exists("segments/00000001/plan/c.parquet")
    file = write_rows(storage, "segments/00000001/entries/a.parquet", read_table(storage, plan))
    path = "segments/00000001/entries/b.parquet"
    cut = write_some_rows(storage, file, path, lambda t: pa.array([entry >= 7 for entry in t["id"].to_pylist()]))
    assert (cut.first_id, cut.last_id, cut.rows) == (7, 999, 993)  # type: ignore[union-attr]

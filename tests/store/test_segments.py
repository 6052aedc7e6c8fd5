"""Segments in the making: numbers never shared, the first completion mark wins, plans read part by part."""

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import DamagedFile
from pipeline.store.segments import part_marks, reservations
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.local import LocalStorage
from pipeline.store.tables.schemas import REJECTED, embedding_column, entries_schema
from tests.conftest import identity_of

IDENTITY = identity_of(4)


def images(num_rows: int) -> pa.Table:
    return pa.table(
        {
            "uri": [f"/{row:06d}.png" for row in range(num_rows)],
            "label": pa.array([None] * num_rows, pa.string()),
            "num_bytes": pa.array([1] * num_rows, pa.int64()),
            "modified": pa.array([None] * num_rows, pa.timestamp("us", tz="UTC")),
        }
    )


def reserve(storage: LocalStorage, num_rows: int = 300, fingerprint: str = "f") -> reservations.Reservation:
    with Lease(storage, "test") as lease:
        spec = reservations.SegmentSpec(fingerprint=fingerprint, source="/", dataset="d", identity=IDENTITY)
        return reservations.reserve(storage, spec, images(num_rows), lease=lease)


def entries_of(plan: pa.Table, value: float) -> pa.Table:
    rows = plan.num_rows
    return pa.table(
        [
            plan.column("id"),
            plan.column("uri"),
            plan.column("label"),
            pa.array(["d"] * rows),
            embedding_column(np.full((rows, 4), value, np.float16)),
            pa.array(["0"] * rows),
            pa.array([1] * rows, pa.int32()),
            pa.array([1] * rows, pa.int32()),
        ],
        schema=entries_schema(IDENTITY),
    )


def test_numbers_are_reserved_once_each(tmp_path: Path) -> None:
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda: numbers.append(reserve(LocalStorage(tmp_path)).number)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))


def test_a_part_reads_its_own_rows_of_the_plan(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    reservation = reserve(storage, 300)
    assert reservation.num_parts == 3
    parts = [reservations.read_plan(storage, reservation, part) for part in range(3)]
    assert [part.num_rows for part in parts] == [128, 128, 44]
    assert pa.concat_tables(parts).column("uri").to_pylist() == images(300).column("uri").to_pylist()


def test_the_first_mark_wins_and_names_one_attempt(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    reservation = reserve(storage)
    plan = reservations.read_plan(storage, reservation, 0)
    first = part_marks.publish_part(storage, reservation, 0, entries_of(plan, 0.5), REJECTED.empty_table())
    zombie = part_marks.publish_part(storage, reservation, 0, entries_of(plan, 0.25), REJECTED.empty_table())
    assert zombie == first
    assert part_marks.read_marks(storage, reservation) == {0: first}


def test_a_part_must_account_for_every_planned_row(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    reservation = reserve(storage)
    plan = reservations.read_plan(storage, reservation, 0)
    with pytest.raises(AssertionError):
        part_marks.publish_part(storage, reservation, 0, entries_of(plan.slice(1), 0.5), REJECTED.empty_table())


def test_unfinished_work_is_found_by_its_fingerprint(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    ours = reserve(storage, fingerprint="ours")
    reserve(storage, fingerprint="theirs")
    assert reservations.find_unfinished(storage, "ours", committed=[]) == ours
    assert reservations.find_unfinished(storage, "ours", committed=[ours.number]) is None
    reservations.give_up(storage, ours.number)
    assert reservations.find_unfinished(storage, "ours", committed=[]) is None


def test_a_damaged_mark_is_named(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    reservation = reserve(storage)
    storage.create(f"segments/{reservation.number:08d}/done/000000.json", b"{")
    with pytest.raises(DamagedFile, match=r"done/000000\.json.*run the same `add` again"):
        part_marks.read_marks(storage, reservation)

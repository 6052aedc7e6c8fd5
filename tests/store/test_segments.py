"""Segments in the making: numbers never shared, the first completion mark wins, plans read part by part."""

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import DamagedFile
from pipeline.store.segments import part_marks, reservations
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.local import LocalStorage
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.schemas import CONTAINERS, REJECTED, embedding_column, entries_schema
from tests.conftest import identity_of
from tests.store.counting import CountingStorage

IDENTITY = identity_of(4)

Marks = dict[int, part_marks.PartMark]


def images(num_rows: int) -> pa.Table:
    return pa.table(
        {
            "uri": [f"/{row:06d}.png" for row in range(num_rows)],
            "label": pa.array([None] * num_rows, pa.string()),
            "num_bytes": pa.array([1] * num_rows, pa.int64()),
            "modified": pa.array([None] * num_rows, pa.timestamp("us", tz="UTC")),
        }
    )


def reserve(storage: Storage, num_rows: int = 300, fingerprint: str = "f") -> reservations.Reservation:
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


def finished(
    storage: Storage, num_rows: int = 1_280
) -> tuple[reservations.Reservation, dict[int, part_marks.PartMark]]:
    """A segment whose parts are all done, and their marks."""
    reservation = reserve(storage, num_rows)
    marks = {}
    for part in range(reservation.num_parts):
        plan = reservations.read_plan(storage, reservation, part)
        entries = entries_of(plan.slice(1), 0.5)
        rejected = pa.table([plan["id"][:1], plan["uri"][:1], pa.array(["read"]), pa.array(["no"])], schema=REJECTED)
        marks[part] = part_marks.publish_part(storage, reservation, part, entries, rejected)
    return reservation, marks


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_marks_are_checked_without_reading_a_file_of_a_part(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    uri = str(tmp_path) if kind == "local" else request.getfixturevalue("s3").uri()
    reservation, marks = finished(open_storage(uri))
    storage = CountingStorage(open_storage(uri))
    assert part_marks.read_marks(storage, reservation) == marks
    assert storage.counts.requests == {"list": 1, "read": 10, "walk": 2}
    assert storage.counts.fetched_of("/done/") == storage.counts.bytes_fetched


@pytest.mark.parametrize("kind", ["entries", "rejected"])
@pytest.mark.parametrize("damage", ["missing", "cut", "longer"])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_finished_part_without_its_bytes_is_noticed(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, damage: str, place: str
) -> None:
    storage = open_storage(str(tmp_path) if place == "local" else request.getfixturevalue("s3").uri())
    reservation, marks = finished(storage, 300)
    file = getattr(marks[1], kind)
    data = storage.read(file.path)
    if damage == "missing":
        storage.delete([file.path])
    else:
        storage.replace(file.path, data[:-1] if damage == "cut" else data + b"x")
    with pytest.raises(DamagedFile, match=r"done/000001\.json.*run the same `add` again"):
        part_marks.read_marks(storage, reservation)


def test_a_list_of_containers_is_read_once_for_neighbouring_parts(tmp_path: Path) -> None:
    storage = CountingStorage(LocalStorage(tmp_path))
    rows = [{"uri": f"/{number:05d}.tar", "kind": "tar"} for number in range(40_000)]
    containers = pa.Table.from_pylist(rows, schema=CONTAINERS)
    with Lease(storage, "test") as lease:
        spec = reservations.SegmentSpec(fingerprint="f", source="/", dataset="d", identity=IDENTITY)
        reservation = reservations.reserve(storage, spec, images(300), containers, lease=lease)
    storage.counts.reset()
    for row in (0, 1, 16_383, 16_384, 39_999):
        [found] = reservations.read_containers(storage, reservation, reservation.containers_from + row)
        assert found["uri"] == f"/{row:05d}.tar"
    assert storage.counts.requests == {"read_range": 1 + 3}  # the footer, and each row group once

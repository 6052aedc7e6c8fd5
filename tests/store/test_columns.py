"""Columns of Parquet files read without the rest, from a folder and from an object store."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import VisualMemory
from pipeline.errors import DamagedFile
from pipeline.recent import Recent
from pipeline.store.log.version_log import VersionLog
from pipeline.store.lookup.digests import live_rows
from pipeline.store.storage.file_refs import describe
from pipeline.store.storage.object_store import ObjectStorage
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables import parquet_ranges
from pipeline.store.tables.parquet_columns import (
    FILES_AHEAD,
    read_columns,
    read_columns_of,
    read_row_group,
    read_row_groups,
)
from pipeline.store.tables.schemas import embedding_column, read_table, write_rows, write_table
from tests.conftest import add_vectors, sha256_of, unit
from tests.store.counting import CountingStorage
from tests.store.seaweed import SeaweedFS


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "memory")
    return str(request.getfixturevalue("s3").uri())


def test_columns_are_those_of_the_whole_file(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, read = open_storage(uri), list[int]()
    read_range = ObjectStorage.read_range

    def counted(self: ObjectStorage, path: str, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return read_range(self, path, start, stop)

    monkeypatch.setattr(ObjectStorage, "read_range", counted)
    for rows in (100, 40_000):
        vectors_ND = unit(np.random.default_rng(0).normal(size=(rows, 256)))
        table = pa.table(
            {
                "id": np.arange(rows),
                "embedding": embedding_column(vectors_ND),
                "sha256": [sha256_of(vector_D) for vector_D in vectors_ND],
            }
        )
        file = write_rows(storage, f"entries/{rows}.parquet", table)
        columns = read_columns(open_storage(uri), file, ["id", "sha256"])
        assert columns.equals(read_table(storage, file, ["id", "sha256"]))
    if uri.startswith("s3"):
        assert 0 < sum(read) < 0.2 * file.num_bytes  # of the larger file
        assert len(read) <= 12


def test_many_files_come_in_their_order(uri: str) -> None:
    log = VersionLog(open_storage(uri))
    for number in range(6):
        state = add_vectors(log, unit(np.random.default_rng(number).normal(size=(20, 8))), ["a"] * 20, name=str(number))
    files = state.entries_files() * (FILES_AHEAD // 4)
    found = [table["id"][0].as_py() for table in read_columns_of(open_storage(uri), files, ["id"])]
    assert found == [file.first_id for file in files]
    ids = [entry_id for ids_N, _ in live_rows(open_storage(uri), state) for entry_id in ids_N.tolist()]
    assert ids == VisualMemory(uri).live().live_ids().tolist()


@pytest.mark.parametrize("damage", ["cut", "altered", "gone"])
def test_a_damaged_file_is_named(uri: str, damage: str) -> None:
    log = VersionLog(open_storage(uri))
    state = add_vectors(log, unit(np.random.default_rng(0).normal(size=(500, 8))), ["a"] * 500)
    file = state.entries_files()[0]
    data = bytearray(log.storage.read(file.path))
    if damage == "altered":
        data[100] ^= 0xFF  # within the ids, which come first
    if damage == "gone":
        log.storage.delete([file.path])
    else:
        log.storage.replace(file.path, bytes(data[:-10] if damage == "cut" else data))
    with pytest.raises(DamagedFile, match=file.path):
        read_columns(open_storage(uri), file, ["id", "sha256"])


def test_duplicates_are_left_out_of_a_memory_in_a_bucket(s3: SeaweedFS, tmp_path: Path) -> None:
    vectors_ND = unit(np.random.default_rng(0).normal(size=(600, 8)))
    for name, rows in (("first", vectors_ND[:400]), ("second", vectors_ND[300:])):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", rows)
    memory = VisualMemory(s3.uri())
    memory.add(tmp_path / "first")
    report = memory.add(tmp_path / "second", duplicates="skip")
    assert (report.entries, report.duplicates) == (200, 100)
    assert memory.verify().sound
    assert memory.add(tmp_path / "second", dataset="again").duplicates == 300


def test_one_of_128_row_groups_costs_its_own_bytes(uri: str) -> None:
    rows = 2_000
    images = pa.table(
        {
            "uri": [f"s3://bucket/images/photo-{row * 7_919 % 1_000_003:09d}.jpg" for row in range(128 * rows)],
            "label": [f"class-{row % 7}" for row in range(128 * rows)],
        }
    )
    storage = CountingStorage(open_storage(uri))
    with storage.publishing("plan/plan.parquet") as local:
        write_table(images, local, row_group_rows=rows)
        file = describe("plan/plan.parquet", local, images.num_rows)
    storage.counts.reset()
    for group in (0, 77, 127):
        found = read_row_group(storage, file, group)
        assert found.equals(images.slice(group * rows, rows))
    footer = parquet_ranges.footer_of(storage, file).serialized_size  # fetched once
    assert storage.counts.bytes_fetched < 3.5 / 128 * file.num_bytes + footer + 100
    assert storage.counts.requests == {"read_range": 5}
    storage.counts.reset()
    assert pa.concat_tables(read_row_groups(storage, file, ["uri"])).equals(images.select(["uri"]))
    assert storage.counts.requests == {"read_range": 128}


def test_footers_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_ranges, "_footers", Recent(5_000 * parquet_ranges.BYTES_IN_RAM))
    storage = open_storage(str(tmp_path))
    for number in range(40):
        file = write_rows(storage, f"entries/{number}.parquet", pa.table({"id": [number], "sha256": ["0" * 64]}))
        assert read_row_group(storage, file, 0)["id"].to_pylist() == [number]
    assert 1 < len(parquet_ranges._footers) < 20


@pytest.mark.parametrize("damage", ["cut", "altered", "gone", "empty"])
def test_a_damaged_row_group_is_named(uri: str, damage: str) -> None:
    storage = open_storage(uri)
    file = write_rows(storage, "entries/a.parquet", pa.table({"id": np.arange(50_000), "sha256": ["0" * 64] * 50_000}))
    data = bytearray(storage.read(file.path))
    if damage == "altered":
        data[100] ^= 0xFF
    if damage == "gone":
        storage.delete([file.path])
    else:
        storage.replace(file.path, {"cut": bytes(data[:-10]), "altered": bytes(data), "empty": b""}[damage])
    with pytest.raises(DamagedFile, match=file.path):
        read_row_group(open_storage(uri), file, 0)

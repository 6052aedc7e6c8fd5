"""What is read of neighbours that were found: the row groups of the columns asked for, not their files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.seaweed import SeaweedFS
from pipeline import VisualMemory
from pipeline.store.lookup.kept_values import read_facts, read_kept
from pipeline.store.lookup.originals import read_originals
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.parquet_columns import files_with, read_rows, read_rows_of
from pipeline.store.tables.schemas import embedding_column, write_rows
from tests.conftest import unit
from tests.store.counting import CountingStorage, counted

ROWS, DIMENSION = 40_000, 256


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    vectors_ND = unit(np.random.default_rng(0).normal(size=(ROWS, DIMENSION)))
    table = pa.table(
        {
            "embedding": embedding_column(vectors_ND),
            "label": [f"class {row % 10}" for row in range(ROWS)],
            "camera": [f"camera {row % 7}" for row in range(ROWS)],
            "year": pa.array(range(ROWS), pa.int64()),
        }
    )
    pq.write_table(table, folder / "vectors.parquet")
    return folder


def test_the_kept_columns_of_neighbours_are_read_by_ranges(source: Path, s3: SeaweedFS) -> None:
    memory = VisualMemory(s3.uri())
    memory.add(source, labels="column:label", keep=("camera", "year"))
    [file, *_] = memory.state().entries_files()
    queries_QD = np.random.default_rng(1).normal(size=(2, DIMENSION))
    counts = counted(memory)
    memory.search(embeddings=queries_QD[:1])  # opens the entries
    counts.reset()
    [neighbors] = memory.search(embeddings=queries_QD[1:], k=10)
    assert len(neighbors) == 10
    for neighbor in neighbors:
        row = int(neighbor.kept["year"])
        assert (neighbor.label, neighbor.kept["camera"]) == (f"class {row % 10}", f"camera {row % 7}")
    assert counts.requests["local_path"] == 0
    files = {file.path for file, _ in files_with(memory.state().entries_files(), [n.id for n in neighbors])}
    assert counts.fetched_of("entries/") <= len(files) * 200_000 < 0.2 * file.num_bytes * len(files)
    counts.reset()
    assert read_facts(memory.log.storage, memory.state(), neighbors[0].id)[1:] == (0, 0)
    read_originals(memory.log.storage, memory.state(), [neighbors[0].id])
    assert counts.bytes_fetched < 3_000_000 < file.num_bytes


def test_a_thumbnail_is_read_without_the_others(s3: SeaweedFS) -> None:
    storage = CountingStorage(open_storage(s3.uri()))
    rng = np.random.default_rng(0)
    table = pa.table({"id": np.arange(16_384), "jpeg": [rng.bytes(3_000) for _ in range(16_384)]})
    file = write_rows(storage, "thumbnails.parquet", table)
    storage.counts.reset()
    found = read_rows(storage, file, [9_000], ["id", "jpeg"])
    assert found.to_pylist() == table.slice(9_000, 1).to_pylist()
    assert file.num_bytes > 49_000_000
    assert storage.counts.bytes_fetched < 500_000
    assert storage.counts.num_requests <= 4


def test_rows_of_several_files_come_in_order(s3: SeaweedFS) -> None:
    storage = open_storage(s3.uri())
    files = [
        write_rows(storage, f"{number}.parquet", pa.table({"id": np.arange(number * 100, number * 100 + 50)}))
        for number in range(20)
    ]
    wanted = files_with(files, [1_949, 3, 705, 49, 50, 1_950, 700])
    assert [(file.path, ids) for file, ids in wanted] == [
        ("0.parquet", [3, 49]),
        ("7.parquet", [700, 705]),
        ("19.parquet", [1_949]),
    ]
    tables = read_rows_of(storage, [(file, ids, ["id"]) for file, ids in wanted])
    assert [table["id"].to_pylist() for table in tables] == [[3, 49], [700, 705], [1_949]]


def test_nothing_is_read_of_segments_that_keep_nothing(source: Path, s3: SeaweedFS) -> None:
    memory = VisualMemory(s3.uri())
    memory.add(source, labels="column:label")
    counts = counted(memory)
    assert read_kept(memory.log.storage, memory.state(), [memory.state().entries_files()[0].first_id]) == {}
    assert counts.fetched_of("entries/") == 0

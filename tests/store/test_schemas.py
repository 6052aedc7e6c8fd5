"""Entries files: stored for speed, readable by anyone, and never silently wrong."""

from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow.parquet as pq
import pytest

from pipeline import VisualMemory
from pipeline.errors import DamagedFile
from pipeline.store.log.state import State
from pipeline.store.tables.schemas import embedding_matrix, read_table
from tests.conftest import MakeMemory, unit


def entries_path(memory: VisualMemory, state: State | None = None) -> Path:
    return memory.log.storage.local_path((state or memory.state()).segments[0].entries[0].path)


def test_duckdb_and_polars_read_entries_as_a_plain_table(digits_memory: VisualMemory) -> None:
    path = entries_path(digits_memory)
    ours = pq.read_table(path)
    rows = duckdb.sql(f"select id, uri, label, dataset, embedding, sha256, width, height from '{path}' order by id")
    first = rows.fetchall()[0]
    assert first[0] == ours.column("id")[0].as_py()
    assert first[2] == "0"
    assert np.array(first[4], np.float16).tolist() == ours.column("embedding")[0].as_py()
    counts = dict(duckdb.sql(f"select label, count(*) from '{path}' group by label").fetchall())
    assert counts == {str(digit): 20 for digit in range(5)}
    frame = polars.read_parquet(path)
    assert frame["uri"].to_list() == ours.column("uri").to_pylist()
    assert np.array(frame["embedding"].to_list()).shape == (100, 1280)


def test_the_embedding_column_is_stored_as_the_design_says(digits_memory: VisualMemory) -> None:
    parquet = pq.ParquetFile(entries_path(digits_memory))
    field = parquet.schema_arrow.field("embedding")
    assert not field.nullable
    assert not field.type.value_field.nullable
    group = parquet.metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    embedding = columns["embedding.list.element"]
    assert embedding.compression == "UNCOMPRESSED"
    assert "PLAIN" in embedding.encodings
    assert not any("DICTIONARY" in encoding for encoding in embedding.encodings)
    assert embedding.statistics is None
    assert columns["id"].statistics.min == parquet.read(["id"]).column("id")[0].as_py()
    metadata = parquet.schema_arrow.metadata
    identity = digits_memory.state().identity
    assert identity is not None
    assert metadata[b"visual_memory.encoder_fingerprint"].decode() == identity.fingerprint


def test_embeddings_are_float16_of_unit_length(digits_memory: VisualMemory) -> None:
    vectors = embedding_matrix(pq.read_table(entries_path(digits_memory)).column("embedding"))
    assert vectors.dtype == np.float16
    assert np.linalg.norm(vectors.astype(np.float64), axis=1) == pytest.approx(np.ones(100), abs=1e-3)


def test_a_changed_byte_is_found(make_memory: MakeMemory) -> None:
    memory = make_memory(unit(np.random.default_rng(0).normal(size=(300, 64))), ["a"] * 300)
    path = entries_path(memory)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    file = memory.state().segments[0].entries[0]
    with pytest.raises(DamagedFile, match=r"entries/.* cannot be read"):
        read_table(memory.log.storage, file)


def test_a_file_cut_short_is_found(make_memory: MakeMemory) -> None:
    memory = make_memory(unit(np.random.default_rng(0).normal(size=(20, 8))), ["a"] * 20)
    path = entries_path(memory)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedFile, match="bytes where .* were written"):
        memory.live()

"""Rows of .npy files and embedding columns: what they are taken for, and what is refused."""

import hashlib
import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.images.containers.container import Container, vectors_in
from pipeline.images.containers.npy import read_header
from pipeline.images.containers.npy_pairs import beside, possible_pairs, unpaired
from pipeline.images.containers.vectors import RowFacts, inspect_npy, unit
from pipeline.images.decoding.decode import Rejected
from pipeline.images.entry_pictures import read_image
from pipeline.images.labels.labels import Labels
from pipeline.images.sources.listing import Listing, containers_of_vectors, list_source
from pipeline.store.tables.schemas import ENCODER_KEY, FINGERPRINT_KEY

URI = "/a/b.npy"


def npy_of(array: np.ndarray, *, pickled: bool = False) -> io.BytesIO:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=pickled)
    return stream


def rows_of(listing: Listing, labels: str = "folder", dimension: int = 3) -> list[tuple]:
    """uri, label, facts and vector of every row."""
    return [
        (item.uri, item.label, facts, vector)
        for container in containers_of_vectors(listing)
        for batch in vectors_in(container, Labels(labels), dimension)
        for item, facts, vector in zip(batch.items, batch.facts, batch.vectors_BD, strict=True)
    ]


def write_pair(folder: Path, columns: dict, rows: int = 3, **options: object) -> Path:
    np.save(folder / "v.npy", np.eye(rows, 3, dtype=np.float32) + 1)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, folder / "v.parquet", **options)
    return folder


# Heads


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
def test_floats_of_any_size_and_order_give_the_same_directions(dtype: str, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(5_000, 3)).astype(np.float16)
    np.save(tmp_path / "v.npy", vectors.astype(dtype))
    found = rows_of(list_source(str(tmp_path / "v.npy"), Labels()))
    assert [row[0] for row in found[::4_999]] == [f"{tmp_path}/v.npy#row=0", f"{tmp_path}/v.npy#row=4999"]
    stacked = np.stack([row[3] for row in found])
    wanted = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    assert stacked.dtype == np.float32
    assert np.allclose(stacked, wanted, atol=1e-6 if dtype[1:] != "f2" else 1e-3)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.array([[None]]), "holds Python objects, which are never unpickled"),
        (np.zeros((2, 3), "c8"), "holds complex64 of shape"),
        (np.zeros((2, 3), bool), "holds bool of shape"),
        (np.zeros((2, 3, 4), "f4"), "of shape .2, 3, 4. and no embeddings"),
        (np.zeros((2, 0), "f4"), "vectors of 0 dimensions"),
        (np.asfortranarray(np.zeros((2, 3))), "column by column"),
        (np.zeros((1 << 10, 1 << 17), "f2")[:1], "vectors of 131,072 dimensions"),
    ],
)
def test_other_arrays_are_named(array: np.ndarray, sentence: str) -> None:
    with pytest.raises(SourceError, match=sentence):
        read_header(npy_of(array, pickled=True), URI)


def test_cut_anywhere_it_is_refused_in_a_sentence() -> None:
    content = npy_of(np.ones((50, 7), np.float32)).getvalue()
    for length in [*range(140), *range(140, len(content), 97), len(content) - 1]:
        with pytest.raises(SourceError, match=r"b.npy is (no .npy file, or is )?cut short"):
            read_header(io.BytesIO(content[:length]), URI)
    assert read_header(io.BytesIO(content + b"more"), URI).rows == 50


def test_damaged_anywhere_a_head_is_refused_or_believed() -> None:
    content, rng = npy_of(np.ones((50, 7), np.float32)).getvalue(), random.Random(0)
    num_refused = 0
    for _ in range(500):
        damaged = bytearray(content)
        damaged[rng.randrange(128)] = rng.randrange(256)
        try:
            header = read_header(io.BytesIO(damaged), URI)
        except SourceError:
            num_refused += 1
        else:
            assert header.rows * header.dimension * header.dtype.itemsize <= len(content) - header.offset
    assert num_refused > 300


def test_who_made_them_is_read_from_the_file_beside(tmp_path: Path) -> None:
    said = {ENCODER_KEY: "x", FINGERPRINT_KEY: "f" * 64}
    table = pa.table({"key": ["a", "b", "c"]}).replace_schema_metadata(said)
    listing = list_source(str(write_pair(tmp_path, table)), Labels())
    assert listing.given is not None
    [maker] = listing.given.makers
    assert (maker.uri, maker.encoder, maker.fingerprint) == (f"{tmp_path}/v.parquet", "x", "f" * 64)
    assert (listing.planned, listing.skipped, listing.holds_images) == (3, 0, False)


def test_label_columns_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    write_pair(tmp_path, {"key": ["a", "b", "c"], "breed": ["x", None, "z"]})
    listing = list_source(str(tmp_path), Labels("column:breed"))
    assert [row[1] for row in rows_of(listing, "column:breed")] == ["x", None, "z"]
    with pytest.raises(SourceError, match="no column breeds"):
        list_source(str(tmp_path), Labels("column:breeds"))
    (tmp_path / "l.csv").write_text("uri,label\nb,second\n")
    assert [row[1] for row in rows_of(listing, f"file:{tmp_path / 'l.csv'}")] == [None, "second", None]
    assert [row[1] for row in rows_of(listing, "none")] == [None, None, None]


# Rows


@pytest.mark.parametrize(
    ("columns", "uris"),
    [
        ({"path": ["/a/1#.png", "file:///b%.png", "c/3.png"]}, ["/a/1%23.png", "/b%25.png", "c/3.png"]),
        ({"uri": ["/a/1%23.png", "s3://b/k", ""], "url": ["x"] * 3}, ["/a/1%23.png", "s3://b/k", "{npy}#row=2"]),
        ({"key": pa.array(["k", None, "m"]).dictionary_encode()}, ["k", "{npy}#row=1", "m"]),
        ({"url": [1, 2, 3], "filename": ["a", "b", "c"]}, ["a", "b", "c"]),
        ({"caption": ["a", "b", "c"]}, ["{npy}#row=0", "{npy}#row=1", "{npy}#row=2"]),
    ],
)
def test_the_uri_of_a_row(columns: dict, uris: list[str], tmp_path: Path) -> None:
    found = rows_of(list_source(str(write_pair(tmp_path, columns)), Labels()))
    assert [row[0] for row in found] == [uri.replace("{npy}", f"{tmp_path}/v.npy") for uri in uris]


def test_what_is_kept_of_an_image(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"image").hexdigest()
    columns = {
        "sha256": [digest.upper(), "none", None],
        "width": [640.0, float("nan"), 1e12],
        "height": [480, None, -1],
    }
    found = rows_of(list_source(str(write_pair(tmp_path, columns)), Labels()))
    own = [hashlib.sha256(vector.astype("<f2").tobytes()).hexdigest() for *_, vector in found]
    assert [row[2] for row in found] == [RowFacts(digest, 640, 480), RowFacts(own[1], 0, 0), RowFacts(own[2], 0, 0)]


def test_names_of_a_class_label_stand_for_its_numbers(tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    vectors = pa.array([[1.0, 2.0, 3.0]] * 3, pa.list_(pa.float32()))
    table = pa.table({"embeddings": vectors, "label": [1, 0, None]}).replace_schema_metadata(about)
    pq.write_table(table, tmp_path / "t.parquet")
    assert [row[1] for row in rows_of(list_source(str(tmp_path), Labels()))] == ["dog", "cat", None]


@pytest.mark.parametrize("value", [pa.float16(), pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_every_type_of_embedding_column(kind: object, value: pa.DataType, tmp_path: Path) -> None:
    column = pa.array([[3.0, 0.0, 4.0], None, [0.0, 5.0, 12.0]], kind(value))  # type: ignore[operator]
    pq.write_table(pa.table({"image_embedding": column}), tmp_path / "t.parquet")
    (*_, facts, first), (*_, none, _), (*_, last) = rows_of(list_source(str(tmp_path), Labels()))
    assert isinstance(facts, RowFacts)
    assert isinstance(none, Rejected)
    assert none.reason == "there is no vector in the row"
    assert np.allclose(first, [0.6, 0, 0.8])
    assert np.allclose(last, [0, 5 / 13, 12 / 13])


@pytest.mark.parametrize("value", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_lists_of_fixed_size(value: pa.DataType, tmp_path: Path) -> None:
    """pyarrow (25) writes such a column with a null in it, and then cannot read it."""
    rows = [[3.0, 0.0, 4.0], [0.0, 5.0, 12.0]]
    pq.write_table(pa.table({"vector": pa.array(rows, pa.list_(value, 3))}), tmp_path / "t.parquet")
    (*_, first), (*_, last) = rows_of(list_source(str(tmp_path), Labels()))
    assert np.allclose([first, last], [[0.6, 0, 0.8], [0, 5 / 13, 12 / 13]])
    pq.write_table(pa.table({"vector": pa.array([*rows, None], pa.list_(value, 3))}), tmp_path / "t.parquet")
    found = rows_of(list_source(str(tmp_path), Labels()))
    assert len(found) == 3
    assert isinstance(found[2][2], Rejected)


def test_image_bytes_come_before_a_column_of_embeddings(tmp_path: Path) -> None:
    table = {"image": [b"png"], "embedding": pa.array([[1.0, 2.0]], pa.list_(pa.float32()))}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    listing = list_source(str(tmp_path), Labels())
    assert (listing.given, listing.holds_images) == (None, True)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 60),
    slice_rows=st.integers(1, 25),
    group_rows=st.integers(1, 25),
    batch_rows=st.integers(1, 25),
)
def test_rows_stay_aligned_however_they_are_cut(
    rows: int, slice_rows: int, group_rows: int, batch_rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.images.containers.container.SLICE_VECTORS", slice_rows)
        patch.setattr("pipeline.images.containers.container.LARGE_VECTORS", 2 * slice_rows)
        patch.setattr("pipeline.images.containers.vectors.BATCH_ROWS", batch_rows)
        patch.setattr("pipeline.images.containers.vectors.READ_BYTES", 24 * batch_rows + slice_rows)
        angles = np.linspace(0, 3, rows)
        vectors = np.stack([np.cos(angles), np.sin(angles), np.zeros(rows)], axis=1)
        np.save(folder / "v.npy", vectors)
        keys = pa.table({"key": [str(row) for row in range(rows)]})
        pq.write_table(keys, folder / "v.parquet", row_group_size=group_rows)
        column = pa.array(vectors.tolist(), pa.list_(pa.float64()))
        pq.write_table(keys.append_column("emb", column), folder / "w.parquet", row_group_size=group_rows)
        listing = list_source(str(folder), Labels())
        assert listing.planned == 2 * rows
        assert max(listing.containers["images"].to_pylist()) <= 2 * slice_rows
        found = rows_of(listing)
        assert [row[0] for row in found] == [str(row) for row in range(rows)] * 2
        assert np.allclose(np.stack([row[3] for row in found]), np.concatenate([vectors, vectors]), atol=1e-6)
    shutil.rmtree(folder)


def test_vectors_of_float16_that_have_unit_length_stay_as_they_are() -> None:
    vectors = np.random.default_rng(0).normal(size=(1_000, 32))
    halves = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    kept, reasons = unit(halves)
    assert np.array_equal(kept.astype(np.float16), halves)
    assert set(reasons) == {None}
    scaled, _ = unit((halves * 3).astype(np.float16))
    assert np.allclose(np.linalg.norm(scaled, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("value", [1e-300, 1e-40, 1e30, 1e150])
def test_very_short_and_very_long_vectors_have_a_direction(value: float) -> None:
    vectors, reasons = unit(np.array([[value, 0.0], [0.0, -value]]))
    assert reasons == ([None, None] if value > 1e-200 else [reasons[0]] * 2)
    if reasons[0] is None:
        assert vectors.tolist() == [[1, 0], [0, -1]]


def test_damaged_columns_lose_no_row_silently(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 64))
    column = pa.array(vectors.tolist(), pa.list_(pa.float32()))
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"embedding": column}), path, row_group_size=100, write_page_checksum=True)
    content, rng = path.read_bytes(), random.Random(0)
    listing = list_source(str(tmp_path), Labels())
    num_rejected = 0
    for _ in range(30):
        damaged = bytearray(content)
        start = rng.randrange(4, len(damaged) - 5_000)
        damaged[start : start + 40] = rng.randbytes(40)
        path.write_bytes(damaged)
        found = rows_of(listing, dimension=64)
        assert len(found) == 300
        num_rejected += sum(isinstance(row[2], Rejected) for row in found)
    assert num_rejected > 0


# Names


def test_which_file_lies_beside() -> None:
    assert beside("s3://b/img_emb/img_emb_07.npy", "npy+metadata") == "s3://b/metadata/metadata_07.parquet"
    assert beside("/a/img_emb/img_emb_0.npy", "npy+parquet") == "/a/img_emb/img_emb_0.parquet"
    assert beside("/a/x.npy", "npy") is None
    assert possible_pairs("/a/x.npy") == [("npy+parquet", "/a/x.parquet")]
    is_passed_over = unpaired(["/a/img_emb/img_emb_0.npy", "/b/text_emb/text_emb_0.npy"])
    assert is_passed_over("/a/text_emb/text_emb_0.npy")
    assert is_passed_over("/a/metadata/metadata_9.parquet")
    assert not is_passed_over("/b/text_emb/text_emb_0.npy")
    assert not is_passed_over("/b/metadata/metadata_0.parquet")


def test_there_is_no_image_at_the_uri_of_a_vector(tmp_path: Path) -> None:
    column = pa.array([[1.0, 2.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"embedding": column}), tmp_path / "t.parquet")
    for uri in (f"{tmp_path}/v.npy#row=0", f"{tmp_path}/t.parquet#row=0"):
        with pytest.raises(Rejected, match="without an image|no column of image bytes"):
            read_image(uri)


def test_an_error_of_the_stream_is_the_callers() -> None:
    class Lost(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        inspect_npy(Lost(b"x"), URI, None, "", "none")


def test_a_vanished_file_is_as_many_rejected_rows_as_were_planned() -> None:
    gone = Container("/nowhere/a.npy", "npy", 1, None, 0, 5_000, 5_000)
    batches = list(vectors_in(gone, Labels(), 8))
    assert [len(batch.items) for batch in batches] == [2_048, 2_048, 904]
    assert {str(reject) for batch in batches for reject in batch.facts} == {"there is no such file"}


@pytest.mark.parametrize(
    "uri", ["../x#row=zz", "a.parquet#row=zz", "/a.parquet#row=-1", "k0", "what://x/y.jpg", "#", ""]
)
def test_the_uri_of_a_vector_may_be_anything(uri: str) -> None:
    """It is its source's own, and a page of neighbours looks for an image there."""
    with pytest.raises((Rejected, SourceError)):
        read_image(uri)

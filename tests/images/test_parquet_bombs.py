"""Parquet files of some hundred bytes that would take gigabytes: their rows are rejected, a few are read at a time."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SourceError
from pipeline.images.containers.items import Item
from pipeline.images.containers.parquet import inspect, read_parquet
from pipeline.images.containers.vectors import inspect_column, read_column
from pipeline.images.decoding.decode import Rejected
from pipeline.images.entry_pictures import read_image
from pipeline.images.labels.label_files import read_rows
from pipeline.images.reading import parquet_pages
from pipeline.store.tables.kept_columns import KeptColumn

MOST = 700 << 20  # of Arrow's memory: a batch, a page, and what is copied of them


def repeated(value: Any, rows: int, kind: pa.DataType) -> pa.Array:
    """One value and many rows of it, which a file holds once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value], kind))


def file_of(columns: dict[str, Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, **{"compression": "zstd", "store_schema": False, **options})
    return stream.getvalue()


def read(content: bytes, kept: tuple[KeptColumn, ...] = ()) -> tuple[list[Item], int]:
    """The items without their bytes, and the most of Arrow's memory that was taken."""
    layout = inspect(io.BytesIO(content), "/f.parquet", "folder")
    before, most, found = pa.total_allocated_bytes(), 0, []
    for item in read_parquet(io.BytesIO(content), "/f.parquet", layout, 0, len(layout.rows), kept):
        most = max(most, pa.total_allocated_bytes() - before)
        found.append(Item(item.uri, None, item.content if isinstance(item.content, Rejected) else b""))
    return found, most


BIG = bytes(4 << 20)
SMALL_PAGES = {"data_page_size": 1, "write_batch_size": 1}


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"image": repeated(BIG, 500, pa.binary())}, {}),
        ({"image": repeated(BIG, 500, pa.binary())}, {"compression": "none", "data_page_version": "2.0"}),
        ({"image": repeated(BIG, 500, pa.binary())}, {"compression": "gzip", "row_group_size": 50}),
        ({"image": pa.array([BIG] * 100, pa.binary())}, {"use_dictionary": False}),
        (
            {"image": pa.array([BIG] * 100, pa.binary())},
            {"use_dictionary": False, "data_page_size": 1, "write_batch_size": 1},
        ),
        ({"image": pa.array([{"bytes": BIG}] * 100, pa.struct({"bytes": pa.binary()}))}, {"compression": "brotli"}),
        ({"image": [b"x"] * 500, "label": repeated("a" * len(BIG), 500, pa.string())}, {}),
        ({"image": [b"x"] * 500, "label": repeated(BIG, 500, pa.binary())}, {"compression": "snappy"}),
    ],
    ids=["dictionary", "v2", "row groups", "one page", "many pages", "struct", "label", "label bytes"],
)
def test_rows_of_a_bomb_are_rejected(columns: dict[str, Any], options: dict[str, Any]) -> None:
    content = file_of(columns, **options)
    found, most = read(content)
    rows = len(next(iter(columns.values())))
    assert [item.uri for item in found] == [f"/f.parquet#row={row}" for row in range(rows)]
    last = found[-1].content
    assert isinstance(last, Rejected)
    assert last.reason.startswith("the row group is not read: ")
    assert most < MOST


def test_kept_columns_are_bounded_too() -> None:
    content = file_of({"image": [b"x"] * 500, "note": repeated("a" * len(BIG), 500, pa.string())})
    found, most = read(content, (KeptColumn(name="note", type="string"),))
    assert isinstance(found[-1].content, Rejected)
    assert most < MOST


def test_one_row_of_a_bomb_is_read_alone(tmp_path: Path) -> None:
    """As a page asks for the picture of an entry."""
    place = tmp_path / "x.parquet"
    place.write_bytes(file_of({"image": repeated(BIG, 500, pa.binary())}))
    assert read_image(f"{place}#row=0") == BIG
    assert read_image(f"{place}#row=499") == BIG  # the page of the row is unpacked, and no other value


def test_a_label_of_a_book_is_none() -> None:
    content = file_of({"image": [b"x"] * 3, "label": ["a", "b" * 20_000, "c" * 10_000]})
    layout = inspect(io.BytesIO(content), "/f.parquet", "folder")
    items = list(read_parquet(io.BytesIO(content), "/f.parquet", layout, 0, 1))
    assert [item.label for item in items] == ["a", None, "c" * 10_000]
    assert items[1].no_label == "the column label holds a text of 20,000 characters, more than 10,000"


@pytest.mark.parametrize("name", ["uri", "label"])
def test_vectors_beside_bombs_are_not_read(name: str) -> None:
    columns = {
        "embedding": pa.array([[1.0, 0.0]] * 3_000, pa.list_(pa.float32())),
        name: repeated("a" * len(BIG), 3_000, pa.string()),
    }
    content = file_of(columns)
    assert inspect_column(io.BytesIO(content), "/v.parquet", "folder").dimension == 2
    before = pa.total_allocated_bytes()
    batches = read_column(io.BytesIO(content), "/v.parquet", "folder", 2, 0, 3_000)
    with pytest.raises(SourceError, match=r"/v\.parquet is not read: "):
        assert all(pa.total_allocated_bytes() - before < MOST for _ in batches)


def test_a_table_of_labels_that_is_a_bomb_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "labels.parquet"
    place.write_bytes(file_of({"uri": ["a"] * 1_000, "label": repeated("a" * len(BIG), 1_000, pa.string())}))
    with pytest.raises(SourceError, match="cannot be read"):
        read_rows(place)


def test_a_table_of_labels_comes_whole(tmp_path: Path) -> None:
    names = [f"{row}.png" for row in range(200_000)]
    table = pa.table({"uri": names, "label": [name[0] for name in names]})
    pq.write_table(table, tmp_path / "labels.parquet", row_group_size=70_000)
    assert read_rows(tmp_path / "labels.parquet").equals(table)


def test_honest_pictures_are_read_as_before() -> None:
    """Large ones, equal ones, and ones whose pages hold hundreds of them."""
    images = [bytes([row % 250]) * 100_000 + row.to_bytes(4, "big") for row in range(300)]
    for options in (
        {"compression": "none"},
        {"use_dictionary": False, "compression": "none"},
        {"compression": "snappy"},
    ):
        content = file_of({"image": images + images}, **options)
        layout = inspect(io.BytesIO(content), "/f.parquet", "folder")
        found = [item.content for item in read_parquet(io.BytesIO(content), "/f.parquet", layout, 0, 1)]
        assert found == images + images
    placeholder = file_of({"image": repeated(b"x" * 5_000, 20_000, pa.binary())})
    assert not [item for item in read(placeholder)[0] if isinstance(item.content, Rejected)]


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_fewer_rows_at_once_are_the_same_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Reading begins anew with fewer at once, and gives none twice."""
    images = [bytes([row]) * 2_000 for row in range(100)]
    content = file_of(
        {"image": images, "label": [str(row) for row in range(100)]}, row_group_size=40, data_page_size=3_000
    )
    layout = inspect(io.BytesIO(content), "/f.parquet", "folder")
    begin = parquet_pages.Pages.begin

    def with_less(pages: parquet_pages.Pages, rows_at_once: int, _: int) -> None:
        begin(pages, rows_at_once, 2_000 * rows)

    monkeypatch.setattr(parquet_pages.Pages, "begin", with_less)
    found = list(read_parquet(io.BytesIO(content), "/f.parquet", layout, 0, 3))
    assert [item.content for item in found] == images
    assert [item.label for item in found] == [str(row) for row in range(100)]


@pytest.mark.parametrize("column", ["image", "embedding"])
def test_rows_that_a_footer_only_claims_are_not_planned(column: str, tmp_path: Path) -> None:
    """Each of them would become a rejected row."""
    values = pa.array([b"x"], pa.binary()) if column == "image" else pa.array([[1.0]], pa.list_(pa.float32()))
    content = file_of({column: values}, row_group_size=1)
    schema = pq.read_schema(io.BytesIO(content))
    stream = io.BytesIO()
    with pq.ParquetWriter(stream, schema, compression="none", store_schema=False) as writer:
        for _ in range(3):
            writer.write_table(pa.table({column: pa.nulls(900_000, values.type)}, schema=schema), 1 << 20)
    content = stream.getvalue()
    assert len(content) < 1 << 20
    look = inspect if column == "image" else inspect_column
    with pytest.raises(SourceError, match=r"claims 2,700,000 rows in [0-9,]+ bytes"):
        look(io.BytesIO(content), "/f.parquet", "none")

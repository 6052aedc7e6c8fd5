"""Parquet files of images: the columns are found, and every row of the footer becomes an image or a reject."""

import datetime
import decimal
import io
import json
import random
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.images.containers import parquet
from pipeline.images.containers.items import Item
from pipeline.images.containers.parquet import FileLabel, ImageColumns, Layout, inspect, read_parquet, slices
from pipeline.images.decoding.decode import Rejected, decode
from tests.images.archives import Lost
from tests.images.pictures import encoded, gradient

URI = "s3://bucket/a.parquet"
HUGGING_FACE = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", ""], "_type": "ClassLabel"}}


def file_of(columns: dict[str, Any] | pa.Table, **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), stream, **options)
    return stream.getvalue()


def noise(num_rows: int, num_bytes: int = 300) -> list[bytes]:
    return [random.Random(row).randbytes(num_bytes) for row in range(num_rows)]


def items_of(content: bytes, labels: str = "folder") -> list[Item]:
    layout = inspect(io.BytesIO(content), URI, labels)
    return list(read_parquet(io.BytesIO(content), URI, layout, 0, len(layout.rows)))


def labels_of(labels: Any, option: str = "folder", name: str = "label") -> list[str | None]:
    return [item.label for item in items_of(file_of({"image": [b"x"] * len(labels), name: labels}), option)]


def columns_of(columns: dict[str, Any] | pa.Table, labels: str = "folder") -> ImageColumns:
    return inspect(io.BytesIO(file_of(columns)), URI, labels).columns


def reason_of(item: Item) -> str:
    assert isinstance(item.content, Rejected)
    assert item.content.stage == "read"
    return item.content.reason


def of_hugging_face(labels: list[int | None], features: Any = HUGGING_FACE) -> pa.Table:
    images = [{"bytes": b"%d" % row, "path": f"{row}.jpg"} for row in range(len(labels))]
    table = pa.table({"image": pa.array(images), "label": pa.array(labels, pa.int64())})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


# What is read


def test_images_come_back_whole_with_the_number_of_their_row() -> None:
    jpeg, png = encoded(gradient(), "JPEG"), encoded(gradient(), "PNG")
    found = items_of(file_of({"image": [jpeg, png], "label": ["a", "b"], "more": [1, 2]}))
    assert found == [Item(f"{URI}#row=0", "a", jpeg), Item(f"{URI}#row=1", "b", png)]
    assert decode(jpeg).image.size == (60, 40)


def test_any_run_of_row_groups_has_its_own_rows() -> None:
    images = noise(250)
    content = file_of({"image": images, "label": list(range(250))}, row_group_size=70)
    layout = inspect(io.BytesIO(content), URI, "folder")
    assert layout == Layout(URI, ImageColumns("image", False, FileLabel("label")), (70, 70, 70, 40))
    found = list(read_parquet(io.BytesIO(content), URI, layout, 1, 2))
    assert found == [Item(f"{URI}#row={row}", str(row), images[row]) for row in range(70, 210)]
    assert list(read_parquet(io.BytesIO(content), URI, layout, 1, 0)) == []


def test_hugging_face_struct_and_class_label() -> None:
    found = items_of(file_of(of_hugging_face([1, 0, 2, None, -1, 7])))
    assert [item.content for item in found] == [b"0", b"1", b"2", b"3", b"4", b"5"]
    assert [item.label for item in found] == ["dog", "cat", None, None, None, "7"]
    numbers = pa.array([1.0, float("nan"), None, 0.0, -1.0], pa.float64())  # as pandas writes them
    floats = of_hugging_face([0] * 5)
    floats = floats.set_column(floats.schema.get_field_index("label"), "label", numbers)
    assert [item.label for item in items_of(file_of(floats))] == ["dog", None, None, "cat", None]


@pytest.mark.parametrize(
    "features", [None, [], {}, {"label": None}, {"label": {"names": "ab"}}, {"label": {"names": [1]}}]
)
def test_metadata_that_names_no_classes(features: Any) -> None:
    assert [item.label for item in items_of(file_of(of_hugging_face([1, 0], features)))] == ["1", "0"]


def test_metadata_that_is_no_json() -> None:
    table = pa.table({"image": [b"x"], "label": [3]}).replace_schema_metadata({"huggingface": "{"})
    assert [item.label for item in items_of(file_of(table))] == ["3"]


def test_rows_without_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_FILE_BYTES", 1_000)
    binary = pa.array([b"x", None, b"", b"x" * 1_001], pa.large_binary())
    structs = pa.array([{"bytes": b"x"}, None, {"bytes": b""}, {"bytes": b"x" * 1_001}, {"bytes": None}])
    for images in (binary, structs):
        found = items_of(file_of({"image": images}))
        assert found[0].content == b"x"
        reasons = [reason_of(item) for item in found[1:]]
        none = "there are no bytes in the row"
        assert reasons == [none, "the file is empty", "1,001 bytes is more than 1,000", none][: len(reasons)]


def test_a_null_struct_hides_the_bytes_below_it() -> None:
    images = pa.StructArray.from_arrays([pa.array([b"x", b"y"])], ["bytes"], mask=pa.array([True, False]))
    found = items_of(file_of({"image": images}))
    assert reason_of(found[0]) == "there are no bytes in the row"
    assert found[1].content == b"y"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["a", None, "", "  b "], ["a", None, None, "  b "]),
        (pa.array(["a", None], pa.large_string()), ["a", None]),
        (pa.array(["b", None, "a", "b", ""]).dictionary_encode(), ["b", None, "a", "b", None]),
        (pa.array([7, None]).dictionary_encode(), ["7", None]),
        ([0, -3, None, 2**40], ["0", "-3", None, str(2**40)]),
        (pa.array([1, 200], pa.uint8()), ["1", "200"]),
        ([1.0, 2.5, None, float("nan"), float("inf")], ["1", "2.5", None, None, "inf"]),
        (pa.array([1.0, 0.5], pa.float32()), ["1", "0.5"]),
        (pa.array([1.0, 0.5], pa.float16()), ["1", "0.5"]),
        ([True, False, None], ["true", "false", None]),
        ([decimal.Decimal("1.50")], ["1.50"]),
        ([datetime.date(2026, 11, 3)], ["2026-11-03"]),
        (pa.nulls(2), [None, None]),
        (pa.array([b"caf\xe9"]).view(pa.string()), ["caf\ufffd"]),
    ],
    ids=str,
)
def test_labels_are_text(labels: Any, expected: list[str | None]) -> None:
    assert labels_of(labels) == expected
    assert labels_of(labels, "none") == [None] * len(expected)


# Which columns


def test_the_image_column_is_found_by_looking() -> None:
    struct = pa.array([{"bytes": b"x", "path": "p"}])
    assert columns_of({"image": struct}) == ImageColumns("image", True)
    assert columns_of({"picture": [b"x"], "path": ["p"]}) == ImageColumns("picture", False)
    assert columns_of({"picture": struct, "n": [1]}).image == "picture"
    assert columns_of({"mask": struct, "data": [b"x"], "png": [b"x"], "z": [b"x"]}).image == "png"
    assert columns_of({"bytes": ["text"], "img": [3], "z": pa.array([b"x"], pa.large_binary())}).image == "z"
    assert columns_of({"with.dot": [b"x"], "class.label": ["a"]}, "column:class.label").label.column == "class.label"


def test_a_name_with_a_dot_is_read() -> None:
    found = items_of(file_of({"a": [{"b": 1}], "a.b": [b"x"], "the.label": ["l"]}), "column:the.label")
    assert found == [Item(f"{URI}#row=0", "l", b"x")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"path": ["p"], "n": [1]},
            r"a.parquet has no column of image bytes, only path \(string\), n \(int64\): write",
        ),
        ({"image": [[b"x"]]}, "has no column of image bytes"),
        ({"image": [{"path": "p"}]}, "has no column of image bytes"),
        ({"a": [b"x"], "b": [b"x"]}, r"several columns .*, a \(binary\), b \(binary\): name the right one image"),
        (pa.table([[b"x"], [b"y"]], names=["image", "image"]), "has several columns"),
        (pa.table({}), "only no columns"),
    ],
    ids=["text", "list", "struct", "two", "twice", "none"],
)
def test_no_image_column_or_several(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        columns_of(columns)


def test_the_label_column_is_found_by_its_name() -> None:
    image = {"image": [b"x"]}
    assert columns_of(image | {"target": ["a"], "class": ["b"], "caption": ["c"]}).label.column == "class"
    assert columns_of(image | {"labels": [["a"]], "target": ["b"]}).label.column == "target"
    assert columns_of(image | {"label": [{"a": 1}], "cls": [b"b"]}).label.column == "cls"
    assert columns_of(image | {"caption": ["c"]}).label.column is None
    assert columns_of(image | {"label": ["a"]}, "none").label.column is None
    assert columns_of(image | {"label": ["a"], "caption": ["c"]}, "column:caption").label.column == "caption"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("column:absent", r"has no column absent, it has image \(binary\), .*: name one in `labels` column:NAME"),
        ("column:", "has no column , it has"),
        ("column:image", "column image of s3://bucket/a.parquet is binary and no label"),
        ("column:list", "column list .* is list.* and no label"),
        ("column:struct", "column struct .* and no label"),
        ("column:time", "column time .* and no label"),
    ],
)
def test_label_columns_that_do_not_fit(labels: str, message: str) -> None:
    columns = {"image": [b"x"], "list": [["a"]], "struct": [{"a": 1}], "time": [datetime.datetime(2026, 1, 1)]}
    with pytest.raises(SourceError, match=message):
        columns_of(columns, labels)


# Files that are none, changed or damaged


@pytest.mark.parametrize(
    "content", [b"", b"short", b"PAR1PAR1", b"not parquet" * 1_000, b"PAR1" + b"\xff" * 99 + b"PAR1"]
)
def test_no_parquet(content: bytes) -> None:
    with pytest.raises(SourceError, match="a.parquet is not a Parquet file, or is cut short"):
        inspect(io.BytesIO(content), URI, "none")


def test_cut_short_anywhere() -> None:
    content = file_of({"image": noise(3, 30)})
    for size in range(len(content)):
        with pytest.raises(SourceError, match="cut short"):
            inspect(io.BytesIO(content[:size]), URI, "none")


def test_a_file_that_has_changed() -> None:
    layout = inspect(io.BytesIO(file_of({"image": noise(3), "label": [1, 2, 3]})), URI, "folder")
    for columns in ({"image": noise(4), "label": [1, 2, 3, 4]}, {"image": [{"bytes": b"x"}] * 3, "label": [1, 2, 3]}):
        with pytest.raises(SourceError, match="a.parquet has changed since it was listed"):
            list(read_parquet(io.BytesIO(file_of(columns)), URI, layout, 0, 1))
    with pytest.raises(SourceError, match="has changed since it was listed"):
        list(read_parquet(io.BytesIO(file_of({"image": noise(3)})), URI, layout, 0, 1))


def paged(num_rows: int, **options: Any) -> tuple[list[bytes], bytes]:
    """Images and a file of them in row groups of 100 rows, in pages of about 20."""
    images = noise(num_rows)
    columns = {"image": images, "label": [str(row) for row in range(num_rows)]}
    return images, file_of(
        columns, row_group_size=100, data_page_size=6_000, write_batch_size=10, use_dictionary=False, **options
    )


def test_a_damaged_page_costs_the_rest_of_its_row_group_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BATCH_ROWS", 16)
    images, content = paged(300, write_page_checksum=True)
    damaged = bytearray(content)
    damaged[damaged.index(images[160])] ^= 1
    found = items_of(bytes(damaged))
    assert [item.uri for item in found] == [f"{URI}#row={row}" for row in range(300)]
    assert [item.content for item in found[:132]] == images[:132]
    assert [item.content for item in found[200:]] == images[200:]
    bad = [item for item in found if isinstance(item.content, Rejected)]
    assert 40 <= len(bad) <= 68
    assert bad == found[200 - len(bad) : 200]
    assert reason_of(bad[0]).startswith("the row group is damaged: could not verify page integrity")
    assert all(item.label is None for item in bad)


@pytest.mark.parametrize("compression", ["NONE", "SNAPPY", "ZSTD"])
def test_damaged_anywhere_the_counts_match_the_footer(compression: str) -> None:
    _, content = paged(300, compression=compression)
    layout = inspect(io.BytesIO(content), URI, "folder")
    rng = random.Random(0)
    num_rejected = 0
    for _ in range(150):
        damaged = bytearray(content)
        start = rng.randrange(4, len(damaged) - 5_000)
        damaged[start : start + 40] = rng.randbytes(40)
        found = list(read_parquet(io.BytesIO(bytes(damaged)), URI, layout, 0, 3))
        assert [item.uri for item in found] == [f"{URI}#row={row}" for row in range(300)]
        num_rejected += sum(isinstance(item.content, Rejected) for item in found)
    assert num_rejected > 0


def test_a_damaged_footer_is_refused_or_believed() -> None:
    _, content = paged(300)
    rng = random.Random(0)
    num_refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[len(damaged) - rng.randrange(9, 2_000)] = rng.randrange(256)
        try:
            layout = inspect(io.BytesIO(damaged), URI, "folder")
        except SourceError:
            num_refused += 1
            continue
        assert min(layout.rows) >= 0
        if sum(layout.rows) < 10_000:
            assert len(list(read_parquet(io.BytesIO(damaged), URI, layout, 0, 3))) == sum(layout.rows)
    assert num_refused > 0


# Slices


@given(rows=st.lists(st.integers(0, 50), max_size=30), most=st.integers(1, 100))
def test_slices_cover_all_row_groups_once(rows: list[int], most: int) -> None:
    runs = slices(Layout(URI, ImageColumns("image", False), tuple(rows)), most)
    assert [group for first, count in runs for group in range(first, first + count)] == list(range(len(rows)))
    for first, count in runs:
        assert count >= 1
        assert count == 1 or sum(rows[first : first + count]) <= most


def test_slices_are_as_few_as_can_be_and_refuse_giants() -> None:
    layout = Layout(URI, ImageColumns("image", False), (10, 0, 10, 30, 5, 5, 0))
    assert slices(layout, 20) == [(0, 3), (3, 1), (4, 3)]
    assert slices(layout, 1_000) == [(0, 7)]
    giant = Layout(URI, layout.columns, (3, (1 << 20) + 1))
    with pytest.raises(SourceError, match=r"a.parquet has a row group of 1,048,577 rows.*smaller row groups"):
        slices(giant, 1 << 20)
    assert slices(Layout(URI, layout.columns, (1 << 20,)), 100) == [(0, 1)]


def test_empty_row_groups_and_files() -> None:
    stream = io.BytesIO()
    schema = pa.schema({"image": pa.binary(), "label": pa.string()})
    with pq.ParquetWriter(stream, schema) as writer:
        for images in ([b"a"], [], [b"b"]):
            writer.write_table(pa.table({"image": images, "label": ["l"] * len(images)}, schema=schema))
    assert [item.content for item in items_of(stream.getvalue())] == [b"a", b"b"]
    assert items_of(file_of(schema.empty_table())) == []


# Streams


class Recorded(io.BytesIO):
    """A stream that gives at most 1,000 bytes a read and counts them."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(min(size, 1_000) if size is not None and size >= 0 else 1_000)
        self.taken += len(found)
        return found


def test_short_reads_are_not_damage_and_only_the_footer_is_inspected() -> None:
    images = noise(100, 10_000)
    stream = Recorded(file_of({"image": images, "label": list(range(100))}, row_group_size=10))
    layout = inspect(stream, URI, "folder")
    assert stream.taken < 100_000
    stream.taken = 0
    found = list(read_parquet(stream, URI, layout, 3, 2))
    assert [item.content for item in found] == images[30:50]
    assert stream.taken < 400_000
    assert not stream.closed


def test_large_images_are_read_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file with small pages: pyarrow decodes a page as a whole, and a row group is no smaller than its pages."""
    monkeypatch.setattr(parquet, "BATCH_BYTES", 1 << 20)
    images = noise(60, 200_000)
    content = file_of({"image": images}, use_dictionary=False, data_page_size=1 << 18, write_batch_size=1)
    layout = inspect(io.BytesIO(content), URI, "none")
    assert layout.rows == (60,)
    before, most = pa.total_allocated_bytes(), 0
    for row, item in enumerate(read_parquet(io.BytesIO(content), URI, layout, 0, 1)):
        assert item.content == images[row]
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 6 << 20


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), OSError("gone"), RuntimeError("gone")], ids=repr)
def test_an_error_of_the_stream_is_the_callers(error: Exception) -> None:
    images, content = paged(300)
    layout = inspect(io.BytesIO(content), URI, "folder")
    with pytest.raises(type(error)) as raised:
        inspect(Lost(content, 0, error), URI, "folder")
    assert raised.value is error
    footer = len(content) - content.rindex(images[-1])
    for good in (0, footer + 70_000, footer + 100_000, 2 * footer + 130_000):
        found: list[Item] = []
        with pytest.raises(type(error)) as raised:
            found.extend(read_parquet(cast("BinaryIO", Lost(content, good, error)), URI, layout, 0, 3))
        assert raised.value is error
        assert not [item for item in found if isinstance(item.content, Rejected)]

"""One image out of a Parquet file: the right bytes however it was written, from few bytes, and never a crash."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.images.containers.parquet_rows import PAGE_BYTES, read_row
from pipeline.images.decoding.decode import Rejected
from pipeline.images.entry_pictures import READ_BYTES, read_image
from pipeline.images.reading.bounded import Bound, BoundedFile

ROWS = 300


def images(seed: int = 0) -> list[bytes | None]:
    generator = np.random.default_rng(seed)
    found: list[bytes | None] = [generator.bytes(int(size)) for size in generator.integers(1, 3_000, ROWS)]
    found[7] = found[250] = None
    found[9] = b""
    found[20:60] = [found[20]] * 40
    return found


def table_of(kind: str, values: list[bytes | None]) -> pa.Table:
    labels = pa.array([f"l{row % 3}" for row in range(len(values))])
    if kind == "struct":
        structs = [None if v is None else {"bytes": v, "path": f"{row}.jpg"} for row, v in enumerate(values)]
        column = pa.array(structs, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    elif kind == "required":
        column = pa.array([value or b"x" for value in values], pa.binary())
        field = pa.field("image", pa.binary(), nullable=False)
        lists = pa.array([[row, row] for row in range(len(values))], pa.list_(pa.int64()))
        return pa.table([lists, column, labels], pa.schema([pa.field("n", lists.type), field, ("label", pa.string())]))
    else:
        column = pa.array(values, pa.large_binary() if kind == "large" else pa.binary())
    return pa.table({"image": column, "label": labels})


@pytest.mark.parametrize("kind", ["plain", "struct", "required", "large"])
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_every_row_is_the_one_that_pyarrow_reads(tmp_path: Path, kind: str, codec: str, version: str) -> None:
    values = images()
    path = tmp_path / "a.parquet"
    for dictionary, index in itertools.product([False, True], [False, True]):
        options = {"use_dictionary": dictionary, "write_page_index": index, "data_page_version": version}
        pq.write_table(
            table_of(kind, values), path, row_group_size=130, data_page_size=20_000, compression=codec, **options
        )
        for row in (*range(0, ROWS, 17), 7, 9, 20, 59, 129, 130, 250, ROWS - 1):
            wanted = (values[row] or b"x") if kind == "required" else values[row]
            if wanted:
                assert read_image(f"{path}#row={row}") == wanted
            else:
                with pytest.raises(Rejected, match="no bytes in the row"):
                    read_image(f"{path}#row={row}")


def test_an_encoding_that_few_writers_use_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    encoding = {"image": "DELTA_LENGTH_BYTE_ARRAY"}
    pq.write_table(table_of("plain", images()), path, use_dictionary=False, column_encoding=encoding)
    with pytest.raises(Rejected, match="--thumbnails"):
        read_image(f"{path}#row=3")


@pytest.mark.parametrize(
    "row", ["-1", "1" + "0" * 30, "300", "01", "1.0", "+1", " 1", "1 ", "0x1", "\u0661", "", "1#row=2"]
)
def test_there_is_no_row_of_another_name(tmp_path: Path, row: str) -> None:
    pq.write_table(table_of("plain", images()), tmp_path / "a.parquet")
    with pytest.raises(Rejected, match="no such member"):
        read_image(f"{tmp_path}/a.parquet#row={row}")


def test_a_row_far_in_a_large_row_group_costs_little_more_than_its_page(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    one = np.random.default_rng(1).bytes(100_000)
    pq.write_table(pa.table({"image": [one] * 400}), path, use_dictionary=False, write_batch_size=10)
    assert path.stat().st_size > 39_000_000
    bound = Bound(READ_BYTES, 60)
    with BoundedFile(str(path), bound) as file:
        assert read_row(file, str(path), "row=399") == one
    assert bound.read < 3_000_000


def test_a_page_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [bytes(PAGE_BYTES + 1)]}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    with pytest.raises(Rejected, match="too many for a picture"):
        read_image(f"{path}#row=0")


def test_whatever_is_altered_ends_in_a_reject_or_in_bytes(tmp_path: Path) -> None:
    """2,000 files with altered bytes, most of them in the footer and in headers of pages."""
    path, altered = tmp_path / "a.parquet", tmp_path / "b.parquet"
    generator = np.random.default_rng(2)
    whole = []
    for dictionary in (False, True):
        small = [value and value[:40] for value in images()]
        pq.write_table(table_of("plain", small), path, use_dictionary=dictionary, data_page_size=500)
        whole.append(path.read_bytes())
    for attempt in range(2_000):
        data = bytearray(whole[attempt % 2])
        for _ in range(int(generator.integers(1, 6))):
            within = (0, len(data)) if generator.random() < 0.5 else (len(data) - 900, len(data))
            data[int(generator.integers(*within))] = int(generator.integers(256))
        altered.write_bytes(data)
        try:
            found = read_image(f"{altered}#row={attempt % ROWS}", Bound(4 << 20, 20))
        except Rejected:
            continue
        assert isinstance(found, bytes)

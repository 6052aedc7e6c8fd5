"""Batches in the order of their uris: as one stable sort gives them, however they come and however little is held."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.images.sources.gathering import IMAGES
from pipeline.images.sources.ordering import SortSizes, in_order

ROOT = Path(__file__).parents[2]
TINY = SortSizes(batch_rows=4, run_rows=8, open_runs=2, sampled_every=2)


def batch_of(uris: list[str], start: int) -> pa.RecordBatch:
    """Rows that their numbers tell apart, as a listing has them."""
    rows = range(start, start + len(uris))
    return pa.record_batch([uris, [str(row) for row in rows], [*rows], [None] * len(uris)], schema=IMAGES)


def batches_of(pieces: list[list[str]]) -> list[pa.RecordBatch]:
    starts = [sum(map(len, pieces[:number])) for number in range(len(pieces))]
    return [batch_of(uris, start) for uris, start in zip(pieces, starts, strict=True)]


def sorted_at_once(batches: list[pa.RecordBatch]) -> list[dict]:
    rows = pa.Table.from_batches(batches, schema=IMAGES).to_pylist()
    return sorted(rows, key=lambda row: row["uri"].encode())


uris = st.text(st.sampled_from("ab-/#é\U0001f600"), max_size=4)
sizes_of_all = st.builds(
    SortSizes,
    batch_rows=st.integers(1, 5),
    run_rows=st.integers(1, 20),
    run_bytes=st.sampled_from([1, 500, 1 << 20]),
    open_runs=st.integers(1, 4),
    sampled_every=st.integers(1, 5),
)


@given(st.lists(st.lists(uris, max_size=9), max_size=12), sizes_of_all)
def test_any_batches_come_in_the_order_of_one_stable_sort(pieces: list[list[str]], sizes: SortSizes) -> None:
    batches = batches_of(pieces)
    found = in_order(iter(batches), IMAGES, sizes)
    assert found.schema == IMAGES
    assert found.to_pylist() == sorted_at_once(batches)
    found.validate(full=True)


@given(st.lists(st.lists(uris, min_size=1, max_size=9).map(sorted), max_size=12), sizes_of_all)
def test_sorted_batches_too(pieces: list[list[str]], sizes: SortSizes) -> None:
    batches = batches_of(pieces)
    assert in_order(iter(batches), IMAGES, sizes).to_pylist() == sorted_at_once(batches)


def test_what_does_not_overlap_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that are listed at the same time come as batches that are only permuted."""
    written: list[int] = []
    real = pa.ipc.new_file

    class Counting:
        def __init__(self, path: str, schema: pa.Schema) -> None:
            self._writer = real(path, schema)

        def write_batch(self, batch: pa.RecordBatch) -> None:
            written.append(batch.num_rows)
            self._writer.write_batch(batch)

        def __enter__(self) -> "Counting":
            return self

        def __exit__(self, *_: object) -> None:
            self._writer.close()

    monkeypatch.setattr("pipeline.images.sources.ordering.pa.ipc.new_file", Counting)
    folders = [[f"{folder}/{row}" for row in range(4)] for folder in "badcfe"]
    alternating = [[f"{folder}/{half}{row}" for row in range(4)] for half in range(3) for folder in "ab"]
    for pieces in (folders, alternating):
        batches = batches_of(pieces)
        written.clear()
        assert in_order(iter(batches), IMAGES, TINY).to_pylist() == sorted_at_once(batches)
        assert sum(written) == sum(map(len, pieces))
    two_that_overlap = batches_of([*folders, ["c/1", "c/11"]])
    written.clear()
    assert in_order(iter(two_that_overlap), IMAGES, TINY).to_pylist() == sorted_at_once(two_that_overlap)
    assert sum(written) == 26 + 6, "only they are written again"


def test_one_uri_a_thousand_times_is_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    real = pc.sort_indices

    def sort_indices(values: pa.Array) -> pa.Array:
        nonlocal largest
        largest = max(largest, len(values))
        return real(values)

    monkeypatch.setattr("pipeline.images.sources.ordering.pc.sort_indices", sort_indices)
    batches = batches_of([["a", "b", "b", "z"][: 2 + row % 3] for row in range(500)])
    assert in_order(iter(batches), IMAGES, TINY).to_pylist() == sorted_at_once(batches)
    some = dataclasses.replace(TINY, run_rows=64)
    assert in_order(iter(batches), IMAGES, some).to_pylist() == sorted_at_once(batches)
    assert largest <= 1_000, "samples, and rows between two bounds"


LIMITED = """
import resource
from pipeline.errors import StorageError
from tests.images.test_ordering import IMAGES, in_order, shuffled_beyond_2_gib
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    in_order(shuffled_beyond_2_gib(1_000_000), IMAGES)
except StorageError as error:
    print(error)
"""


def test_a_full_temporary_folder_is_told() -> None:
    """In a process of its own, which may write no file above 1 MiB."""
    done = subprocess.run([sys.executable, "-c", LIMITED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "there is no room for the list of the source in" in done.stdout
    assert "set TMPDIR" in done.stdout


LONG = "s3://a-bucket-of-somebody/photographs/of/a/long/path/that/takes/ninety/bytes/in/all/{}/{:010d}.jpg"
ROWS = 27_000_000


def shuffled_beyond_2_gib(rows: int = ROWS) -> Iterator[pa.RecordBatch]:
    """Two folders listed in turn where their uris alternate: no batch is behind the one before."""
    numbers = pa.array(range(1 << 16), pa.int64())
    for start in range(0, rows, 1 << 16):
        rows_here = numbers.slice(0, min(1 << 16, rows - start))
        shifted = pc.multiply(
            pc.add(rows_here, start), 7_919
        )  # a permutation: 7,919 is prime and divides no power of 10
        names = pc.utf8_lpad(
            pc.cast(pc.subtract(shifted, pc.multiply(pc.divide(shifted, 10**8), 10**8)), pa.string()), 10, "0"
        )
        uris = pc.binary_join_element_wise(LONG.partition("{}")[0], names, ".jpg", "")
        yield pa.record_batch(
            [
                uris,
                pa.nulls(len(names), pa.string()),
                pc.add(rows_here, start),
                pa.nulls(len(names), IMAGES.field(3).type),
            ],
            schema=IMAGES,
        )


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_more_than_2_gib_of_uris_in_bounded_memory() -> None:
    """Arrow's own `take` fails there: a column `string` counts its bytes in 32 bits."""
    code = "from tests.images.test_ordering import sort_many; sort_many()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    megabytes, num_bytes = map(int, done.stdout.split())
    assert num_bytes > 1 << 31
    assert megabytes < 1_500


def sort_many() -> None:
    """Sort and check; print the peak of Arrow's memory in MB, mapped files not counted, and the bytes of uris."""
    table = in_order(shuffled_beyond_2_gib(), IMAGES)
    assert table.num_rows == ROWS
    last, seen, num_bytes = "", 0, 0
    for batch in table.to_batches():
        found = batch.column("uri")
        assert not pc.any(pc.less_equal(found[1:], found[:-1])).as_py()
        assert last < found[0].as_py()
        last = found[-1].as_py()
        seen += pc.sum(batch.column("num_bytes")).as_py()
        num_bytes += pc.sum(pc.binary_length(found)).as_py()
    assert seen == ROWS * (ROWS - 1) // 2
    print(pa.default_memory_pool().max_memory() >> 20, num_bytes)

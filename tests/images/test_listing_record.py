"""A listing that was killed goes on where it was: recorded pages are not asked for again, and nothing else changes."""

import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.cli import main
from pipeline import VisualMemory
from pipeline.images.labels.labels import Labels
from pipeline.images.reading import files
from pipeline.images.sources import keys as keys_module
from pipeline.images.sources import listing_record
from pipeline.images.sources.keys import KeyWalk, Page
from pipeline.images.sources.listing import Listing, list_source
from pipeline.images.sources.listing_record import ListingRecord
from pipeline.images.sources.recorded_pages import RecordedPages
from pipeline.progress import Progress, ignore_progress
from pipeline.store.layout import LEASES
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import read_leases
from pipeline.store.storage.local import LocalStorage
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.schemas import embedding_column
from tests.conftest import unit
from tests.images.test_keys import Bucket, trees
from tests.store.counting import CountingStorage
from tests.store.dying import bury
from tests.store.seaweed import SeaweedFS

ROOT = Path(__file__).parents[2]
PAGE, KEYS_A_FILE = 7, 20

ADD = """
import json, os, signal, sys, threading
from jobs.cli import main
from pipeline.images.reading import files
from pipeline.images.sources import keys, listing_record

page, keys_a_file, dies_at, prefix, *arguments = sys.argv[1:]
keys.LARGE_FOLDER, listing_record.KEYS_A_FILE = 2, int(keys_a_file)
there = files._file_system(("s3", os.getpid()))
real, asked, counting = there.call_s3, [], threading.Lock()
write, is_recorded = listing_record.ListingRecord._write, threading.Event()

def writing(record, pages):
    write(record, pages)
    is_recorded.set()

def in_small_pages(method, **options):
    if method == "list_objects_v2" and options["Prefix"].startswith(prefix):
        options["MaxKeys"] = int(page)
        with counting:
            asked.append(options)
            if len(asked) >= int(dies_at) and is_recorded.is_set():
                os.kill(os.getpid(), signal.SIGKILL)
    return real(method, **options)

there.call_s3, listing_record.ListingRecord._write = in_small_pages, writing
main(arguments)
"""

IMAGES = {
    "flat": [f"{row:03d}.jpg" for row in range(150)],
    "folders": [f"{label}/{row:03d}.jpg" for label in ("cat", "c#t", "dog") for row in range(40)] + ["z.jpg", "a.txt"],
    "small folders": [f"{number:02d}/{size}.jpg" for number in range(60) for size in ("large", "small")],
}


NOON = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)
SOURCE = "s3://made/up"


@pytest.fixture(autouse=True)
def server(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[SeaweedFS]:
    for name, value in s3.admin.items():
        monkeypatch.setenv(name, value)
    files._file_system.cache_clear()
    monkeypatch.setattr(keys_module, "LARGE_FOLDER", 2)
    monkeypatch.setattr(listing_record, "KEYS_A_FILE", KEYS_A_FILE)
    yield s3
    files._file_system.cache_clear()


@pytest.fixture
def asked(server: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The lists that sources of this process ask for, in pages of PAGE keys."""
    there = files._file_system(("s3", os.getpid()))
    real, asked = there.call_s3, list[dict]()

    def in_small_pages(method: str, **options: object) -> dict:
        asked.append(options)
        return real(method, **options, MaxKeys=PAGE)

    monkeypatch.setattr(there, "call_s3", in_small_pages)
    return asked


def fill(uri: str, names: list[str], data: bytes = b"x") -> None:
    there = fsspec.filesystem("s3", skip_instance_cache=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: there.pipe_file(f"{uri}/{name}", data), names))


def killed(memory: str, source: str, request: int) -> None:
    """An add that is killed with its n-th list request under way, or the next after the first file of its record."""
    prefix = source.partition("://")[2].partition("/")[2]
    numbers = map(str, (PAGE, KEYS_A_FILE, request))
    command = [sys.executable, "-c", ADD, *numbers, prefix, "add", memory, source]
    assert subprocess.run(command, check=False, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL


def going_on(memory: str, source: str, *, anew: bool = False) -> tuple[Listing, ListingRecord]:
    with ListingRecord(open_storage(memory), source) as record:
        record.open(anew=anew)
        return list_source(source, Labels(), record=record), record


def record_files(storage: Storage) -> list[str]:
    return [path for path in storage.walk(LEASES) if path.endswith(".parquet")]


def num_recorded(storage: Storage) -> int:
    """The pages in the files of records."""
    schemas = [pq.read_schema(storage.local_path(path)) for path in record_files(storage)]
    return sum(len(json.loads(schema.metadata[listing_record._PAGES])) for schema in schemas)


# A real server


@pytest.mark.parametrize("layout", IMAGES)
@pytest.mark.parametrize("request_number", [9, 17])
def test_a_killed_listing_asks_only_for_pages_that_are_not_recorded(
    s3: SeaweedFS, tmp_path: Path, asked: list[dict], layout: str, request_number: int
) -> None:
    source, memory = s3.uri(), str(tmp_path / "memory")
    fill(source, IMAGES[layout])
    whole = list_source(source, Labels())
    num_whole = len(asked)
    killed(memory, source, request_number)
    recorded = num_recorded(open_storage(memory))
    asked.clear()
    listing, record = going_on(memory, source)
    assert record.begun is not None
    assert (recorded > 0, len(asked)) == (True, num_whole - recorded)
    assert listing.images.equals(whole.images)
    assert listing.passed_over.to_json() == whole.passed_over.to_json()
    assert sum("StartAfter" in options for options in asked) > 0


def test_a_record_in_a_bucket_serves_any_machine(s3: SeaweedFS, asked: list[dict]) -> None:
    source, memory = s3.uri(), s3.uri()
    fill(source, IMAGES["flat"])
    killed(memory, source, 12)
    recorded = num_recorded(open_storage(memory))
    going_on(memory, source)
    assert (recorded > 0, len(asked)) == (True, -(-150 // PAGE) - recorded)


def test_what_came_or_went_since_is_as_in_a_listing_that_took_that_long(
    s3: SeaweedFS, tmp_path: Path, asked: list[dict]
) -> None:
    source, memory = s3.uri(), str(tmp_path / "memory")
    names = IMAGES["flat"]
    fill(source, names)
    killed(memory, source, 12)
    num_keys = num_recorded(open_storage(memory)) * PAGE
    assert 0 < num_keys < 100
    there = fsspec.filesystem("s3", skip_instance_cache=True)
    last = names[num_keys - 1]  # behind which it goes on
    there.rm([f"{source}/{name}" for name in ("003.jpg", last, "120.jpg")])
    fill(source, ["003a.jpg", "120a.jpg", "zz.jpg"])
    listing, _ = going_on(memory, source)
    found = [uri.removeprefix(f"{source}/") for uri in listing.images["uri"].to_pylist()]
    assert found == sorted({*names, "120a.jpg", "zz.jpg"} - {"120.jpg"}), "pages before the kill stay as they were"


def test_an_add_goes_on_and_leaves_no_record(
    s3: SeaweedFS, tmp_path: Path, asked: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    source, memory = s3.uri(), str(tmp_path / "memory")
    table = pa.table({"embedding": embedding_column(unit(np.ones((2, 8))))})
    pq.write_table(table, tmp_path / "two.parquet")
    fill(source, [f"{row:03d}.parquet" for row in range(40)], (tmp_path / "two.parquet").read_bytes())
    killed(memory, source, 5)
    storage = LocalStorage(Path(memory))
    before = storage.walk()
    assert record_files(storage)
    run("add", memory, source, "--dry-run")
    assert (storage.walk(), len(asked)) == (before, 6), "a trial neither reads nor changes the record"
    asked.clear()
    run("add", memory, source)
    said = capsys.readouterr()
    assert "went on with a listing begun at 2" in said.err
    assert "--refresh" in said.err
    assert 0 < len(asked) < 6
    assert VisualMemory(memory).status()["entries"] == 80
    assert not record_files(storage)
    assert not any(record.holds for record in read_leases(storage)), "only what announced the killed add"
    VisualMemory(memory).verify(clean=True)
    assert [found for found in VisualMemory(memory).verify().findings if found.severity != "note"] == []


def test_a_record_that_nobody_goes_on_with_is_waste_and_is_cleaned(
    s3: SeaweedFS, tmp_path: Path, asked: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    source, memory = s3.uri(), VisualMemory(tmp_path / "memory")
    pq.write_table(pa.table({"embedding": embedding_column(unit(np.ones((2, 8))))}), tmp_path / "two.parquet")
    memory.add(tmp_path / "two.parquet")
    fill(source, IMAGES["flat"])
    killed(memory.uri, source, 12)
    [finding] = [one for one in memory.verify().findings if "listing" in one.what]
    assert "run the same `add` again" in finding.advice
    memory.verify(clean=True)
    assert record_files(memory.log.storage) == []
    listing, record = going_on(memory.uri, source)
    assert (record.begun, listing.num_images, len(asked)) == (None, 150, -(-150 // PAGE))


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as exited:
        main(list(arguments))
    assert not exited.value.code


# A record itself


class ResumableBucket(Bucket):
    """A store in memory that can go on behind a key, and whose process dies after `answers`."""

    answers = 1 << 30

    def list_after(self, prefix: str, key: str, *, is_deep: bool) -> Page:
        names = self.below(prefix) if is_deep else self.directly_below(prefix)
        return self._answer(names, str(names.index(key) + 1))

    def _answer(self, names: list[str], token: str | None) -> Page:
        self.answers -= 1
        if self.answers < 0:
            raise RuntimeError("killed")
        page = super()._answer(names, token)
        keys = [(key, {"Size": 1, "LastModified": NOON}) for key, _ in page.keys]
        return Page(keys, page.folders, page.token)


def listed(record: ListingRecord, bucket: ResumableBucket) -> list[str]:
    record.open(anew=False)
    walk = KeyWalk(RecordedPages(bucket, record), "", lambda _folder: True)
    return [key for stretch in walk for key, _ in stretch.keys]


def killed_here(storage: Storage, bucket: ResumableBucket) -> None:
    """A listing in this process that ends as if its process was killed. Its lease is that of a dead one."""
    record = ListingRecord(storage, SOURCE)
    with pytest.raises(RuntimeError, match="killed"):
        listed(record, bucket)
    with record._writing:  # a thread may be writing a page; answers that come late are lost
        record._is_open = False
    if record._lease is not None:
        record._lease._ended.set()
        record._lease._thread.join()
    bury(storage)  # type: ignore[arg-type]


@given(trees, st.integers(1, 8), st.integers(1, 5), st.integers(1, 30), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_every_key_once_wherever_it_is_killed(
    names: list[str], page: int, at_once: int, keys_a_file: int, chance: random.Random
) -> None:
    names = sorted(names) if chance.random() < 0.5 else chance.sample(names, len(names))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys_module, "LARGE_FOLDER", 2)
        patch.setattr(listing_record, "KEYS_A_FILE", keys_a_file)
        storage = LocalStorage(Path(folder))
        whole = ResumableBucket(names, page, at_once)
        for _ in KeyWalk(whole, "", lambda _folder: True):
            pass
        num_whole = ResumableBucket.answers - whole.answers
        for _ in range(2):
            if num_whole > 1:
                bucket = ResumableBucket(names, page, at_once)
                bucket.answers = chance.randrange(max(1, (num_whole - num_recorded(storage)) // 2))
                killed_here(storage, bucket)
        recorded = num_recorded(storage)
        with ListingRecord(storage, SOURCE) as record:
            bucket = ResumableBucket(names, page, at_once)
            assert sorted(listed(record, bucket)) == sorted(names)
            assert ResumableBucket.answers - bucket.answers == num_whole - recorded
            record.drop()
        assert not record_files(storage)


NAMES = [f"{row:03d}.jpg" for row in range(100)]


@pytest.fixture
def stopped(tmp_path: Path) -> LocalStorage:
    """A memory with the record of a listing of ten pages, killed behind the fifth."""
    storage = LocalStorage(tmp_path)
    bucket = ResumableBucket(NAMES, 10, 1)
    bucket.answers = 5
    killed_here(storage, bucket)
    assert num_recorded(storage) == 4, "the fifth waited for a file"
    return storage


def num_asked(record: ListingRecord) -> int:
    bucket = ResumableBucket(NAMES, 10, 1)
    assert listed(record, bucket) == NAMES
    return ResumableBucket.answers - bucket.answers


def test_a_short_listing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_record, "KEYS_A_FILE", 1_000)
    storage = CountingStorage(LocalStorage(tmp_path))
    with ListingRecord(storage, SOURCE) as record:
        num_asked(record)
        record.drop()
    assert (storage.counts.requests, list(tmp_path.iterdir())) == ({"list": 1}, [])


def test_a_slow_listing_is_recorded_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_record, "KEYS_A_FILE", 1_000)
    monkeypatch.setattr(listing_record, "SECONDS_A_FILE", 0.0)
    num_asked(ListingRecord(LocalStorage(tmp_path), SOURCE))
    assert num_recorded(LocalStorage(tmp_path)) == 10


def test_a_listing_that_fails_keeps_what_it_has(tmp_path: Path) -> None:
    storage, bucket = LocalStorage(tmp_path), ResumableBucket(NAMES, 10, 1)
    bucket.answers = 5
    with pytest.raises(RuntimeError), ListingRecord(storage, SOURCE) as record:
        listed(record, bucket)
    assert (num_recorded(storage), read_leases(storage)) == (5, [])


def test_a_record_that_a_live_process_holds_is_neither_read_nor_written(stopped: LocalStorage) -> None:
    with ListingRecord(stopped, SOURCE) as first:
        first.open(anew=False)
        before = record_files(stopped)
        with ListingRecord(stopped, SOURCE) as second:
            assert (num_asked(second), second.begun) == (10, None)
            second.drop()
        assert record_files(stopped) == before
        assert num_asked(first) == 6


def test_a_record_that_is_old_or_to_be_refreshed_is_removed(
    stopped: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ListingRecord(stopped, SOURCE) as refreshing:
        refreshing.open(anew=True)
    assert record_files(stopped) == []
    bucket = ResumableBucket(NAMES, 10, 1)
    bucket.answers = 5
    killed_here(stopped, bucket)
    monkeypatch.setattr(listing_record, "LONGEST_PAUSE", datetime.timedelta(0))
    with ListingRecord(stopped, SOURCE) as record:
        assert (num_asked(record), record.begun) == (10, None)


@pytest.mark.parametrize("harm", ["cut", "gone", "other"])
def test_pages_of_a_damaged_file_are_asked_for_again(stopped: LocalStorage, harm: str) -> None:
    first, _ = sorted(record_files(stopped))
    path = stopped.root / first
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif harm == "other":
        pq.write_table(pa.table({"uri": ["s3://b/1.jpg"]}), path)
    with ListingRecord(stopped, SOURCE) as record:
        record.open(anew=False)
        if harm == "gone":
            path.unlink()
        bucket = ResumableBucket(NAMES, 10, 1)
        walk = KeyWalk(RecordedPages(bucket, record), "", lambda _folder: True)
        assert [key for stretch in walk for key, _ in stretch.keys] == NAMES
        assert ResumableBucket.answers - bucket.answers == 8


def test_a_memory_that_cannot_be_written_is_listed_for_without_a_record(tmp_path: Path) -> None:
    (tmp_path / "leases").write_bytes(b"in the way")
    assert num_asked(ListingRecord(LocalStorage(tmp_path), SOURCE)) == 10


def test_progress_says_since_when(stopped: LocalStorage) -> None:
    told: list[Progress] = []
    with ListingRecord(stopped, SOURCE) as record:
        assert record.told(ignore_progress) is ignore_progress
        record.open(anew=False)
        record.told(told.append)(Progress("listing", 3, None))
        assert record.begun is not None
    assert told == [Progress(f"listing, going on from {record.begun:%Y-%m-%d %H:%M} UTC", 3, None)]

"""Keys of a store listed with several requests at once: the same keys, whatever the tree, and few more requests."""

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StorageError
from pipeline.images.labels.labels import Labels
from pipeline.images.names.leftovers import Exclusion, PassedOver
from pipeline.images.reading import files
from pipeline.images.sources import keys as keys_module
from pipeline.images.sources.keys import Key, KeyWalk, Page
from pipeline.images.sources.listing import list_source
from pipeline.images.sources.walk import walk_source
from tests.store.seaweed import SeaweedFS


class Bucket:
    """A store of keys in memory, with pages as S3 has them. It keeps the order of the keys it is given."""

    can_list_deep = True

    def __init__(self, names: list[str], page: int = 10, at_once: int = 4, jitter: float = 0.0) -> None:
        self._names, self._page, self._jitter = names, page, jitter
        self.requests_at_once = at_once
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()

    def list_folder(self, prefix: str, token: str | None) -> Page:
        return self._answer(self.directly_below(prefix), token)

    def list_deep(self, prefix: str, token: str | None) -> Page:
        return self._answer(self.below(prefix), token)

    def below(self, prefix: str) -> list[str]:
        return [name for name in self._names if name.startswith(prefix)]

    def directly_below(self, prefix: str) -> list[str]:
        steps = [name[len(prefix) :].partition("/") for name in self.below(prefix)]
        return list(dict.fromkeys(prefix + step + slash for step, slash, _ in steps))

    def _answer(self, names: list[str], token: str | None) -> Page:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        time.sleep(random.random() * self._jitter)
        with self._lock:
            self._now -= 1
        start = int(token or 0)
        end = start + self._page
        keys: list[Key] = [(name, {"size": 1}) for name in names[start:end] if not name.endswith("/")]
        folders = [name for name in names[start:end] if name.endswith("/")]
        return Page(keys, folders, str(end) if end < len(names) else None)


def listed(walk: KeyWalk) -> list[str]:
    return [key for stretch in walk for key, _ in stretch.keys]


steps = st.text(st.sampled_from("ab-"), min_size=1, max_size=2)
trees = st.lists(st.lists(steps, min_size=1, max_size=4).map("/".join), unique=True, max_size=60)


@given(trees, st.integers(1, 8), st.integers(1, 5), st.randoms(use_true_random=False), st.integers(1, 100))
def test_every_key_once_whatever_the_order_of_the_store(
    names: list[str], page: int, at_once: int, chance: random.Random, held: int
) -> None:
    chance.shuffle(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys_module, "HELD_KEYS", held)
        patch.setattr(keys_module, "LARGE_FOLDER", 2)
        walk = KeyWalk(Bucket(names, page, at_once), "", lambda _folder: True)
        assert sorted(listed(walk)) == sorted(names)


def test_large_folders_are_listed_at_the_same_time_and_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "LARGE_FOLDER", 5)
    names = [f"train/{label:02d}/{row:03d}.jpg" for label in range(8) for row in range(43)] + ["train/readme.txt"]
    bucket = Bucket(names, 10, 4, jitter=0.004)
    walk = KeyWalk(bucket, "train/", lambda _folder: True)
    assert listed(walk) == names, "those that are done early wait for their turn"
    assert bucket.most_at_once == 4
    assert walk.num_requests == 1 + 1 + 8 * 5, "two for the folder above"


def test_a_prefix_of_many_small_folders_is_listed_from_end_to_end() -> None:
    names = [f"photos/{number:03d}/{size}.jpg" for number in range(300) for size in ("large", "small")]
    walk = KeyWalk(Bucket(names, 100), "photos/", lambda _folder: True)
    assert listed(walk) == names
    assert walk.num_requests == 1 + 6


def test_a_folder_that_is_not_entered_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "LARGE_FOLDER", 5)
    names = [f"{folder}/{row:03d}.jpg" for folder in ("@eaDir", "cat", "dog") for row in range(50)]
    walk = KeyWalk(Bucket(names), "", lambda folder: not folder.startswith("@"))
    assert listed(walk) == names[50:]
    assert walk.num_requests == 2 + 2 * 5


def test_few_keys_are_held_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "LARGE_FOLDER", 5)
    monkeypatch.setattr(keys_module, "HELD_KEYS", 60)

    class SlowFirst(Bucket):
        """The first folder waits until the others have given more pages than may be held."""

        def list_folder(self, prefix: str, token: str | None) -> Page:
            if prefix == "0/":
                assert ahead.wait(30)
            page = super().list_folder(prefix, token)
            given.append(prefix)
            if len(given) > 1 + 60 // 10:
                ahead.set()
            return page

    given: list[str] = []
    ahead = threading.Event()

    names = [f"{label}/{row:03d}.jpg" for label in range(9) for row in range(100)]
    walk = KeyWalk(SlowFirst(names), "", lambda _folder: True)
    largest, found = 0, []
    for stretch in walk:
        largest = max(largest, walk._num_held)
        found += [key for key, _ in stretch.keys]
    assert found != names, "the first folder is late, and the others do not wait for it"
    assert sorted(found) == names
    assert largest <= 60 + 4 * 10


def test_a_walk_that_is_given_up_asks_nothing_more() -> None:
    names = [f"{label}/{row:03d}.jpg" for label in range(9) for row in range(300)]
    walk = KeyWalk(Bucket(names, jitter=0.01), "", lambda _folder: True)
    found = iter(walk)
    next(found)
    began = time.monotonic()
    found.close()  # type: ignore[attr-defined]  # an interrupt does the same
    asked = walk.num_requests
    time.sleep(0.1)
    assert time.monotonic() - began < 1
    assert walk.num_requests == asked


# A real server


@pytest.fixture
def server(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[SeaweedFS]:
    for name, value in s3.admin.items():
        monkeypatch.setenv(name, value)
    files._file_system.cache_clear()
    yield s3
    files._file_system.cache_clear()


def fill(uri: str, names: list[str]) -> None:
    there = fsspec.filesystem("s3", skip_instance_cache=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: there.pipe_file(f"{uri}/{name}", b"x"), names))


def test_a_bucket_is_planned_alike_with_one_request_at_a_time_and_with_many(
    server: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = server.uri()
    names = [f"train/{label}/{row:03d}.jpg" for label in ("cat", "cat-big", "c#t") for row in range(30)]
    names += ["loose.png", "train/z.png", "train/.hidden.jpg", "train/@eaDir/cat/1.jpg", "train/cat/@eaDir/2.jpg"]
    names += ["notes.txt", "test/a/b/c/1.jpg", "zz/labels.csv"]
    fill(uri, names)
    monkeypatch.setattr(keys_module, "LARGE_FOLDER", 2)
    real = files._file_system(("s3", os.getpid())).call_s3
    asked: list[dict] = []

    def in_pages_of_seven(method: str, **options: object) -> dict:
        asked.append(options)
        time.sleep(0.02)
        return real(method, **options, MaxKeys=7)

    monkeypatch.setattr(files._file_system(("s3", os.getpid())), "call_s3", in_pages_of_seven)
    many = list_source(uri, Labels("parent"))
    requests = len(asked)
    monkeypatch.setattr("pipeline.images.sources.stores._S3Pages.requests_at_once", 1)
    one = list_source(uri, Labels("parent"))
    assert many.images.equals(one.images)
    found = [image.removeprefix(f"{uri}/") for image in many.images.column("uri").to_pylist()]
    images = [
        name for name in names if name.endswith(("jpg", "png")) and "@eaDir" not in name and ".hidden" not in name
    ]
    assert found == sorted(name.replace("#", "%23") for name in images)
    assert many.passed_over.to_json() == one.passed_over.to_json()
    assert many.passed_over.leftovers == {"@eaDir": 2, "hidden": 1}
    assert len(asked) == 2 * requests
    assert many.labels == ["c", "c#t", "cat", "cat-big", "memory-" + uri.rpartition("-")[2], "train"]


def test_a_missing_bucket_is_named(server: SeaweedFS) -> None:
    assert server
    with pytest.raises(StorageError, match="no-such-bucket"):
        list_source("s3://no-such-bucket/x", Labels())


def test_folders_of_any_file_system_come_in_the_order_of_uris() -> None:
    there = fsspec.filesystem("memory")
    names = ["cat/1.jpg", "cat-big/1.jpg", "a.jpg", "z.jpg", "c#t/1.jpg", "cat/deep/2.jpg", "cat.jpg"]
    for name in names:
        there.pipe_file(f"/keys-in-order/{name}", b"x")
    walk = walk_source("memory://keys-in-order", Exclusion(), PassedOver())
    uris = [file.uri for file in walk.files]
    assert uris == sorted(uris), "folders with their slash: nothing has to be sorted"
    assert len(uris) == len(names)
    alone = list_source("memory://keys-in-order/cat/1.jpg", Labels())
    assert (alone.is_file, alone.labels) == (True, ["cat"])

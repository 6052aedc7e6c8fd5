"""The counters that budgets of requests and bytes rest on."""

import inspect
from pathlib import Path

import pytest

from pipeline.store.storage.interface import Storage
from pipeline.store.storage.local import LocalStorage
from pipeline.store.storage.open_storage import open_storage
from tests.store.counting import CountingStorage, traffic
from tests.store.seaweed import SeaweedFS


def use(storage: Storage) -> None:
    """Write and read 12 bytes and more, in each way."""
    storage.create("a/one", b"123")
    storage.replace("a/two", b"1234")
    with storage.publishing("a/three") as local:
        local.write_bytes(b"12345")
    assert storage.read("a/one") == b"123"
    assert storage.read_range("a/three", 1, 3) == b"23"
    for _ in range(2):  # the second finds the copy
        assert storage.local_path("a/three").read_bytes() == b"12345"
    storage.release("a/three")
    assert storage.local_path("a/three").read_bytes() == b"12345"
    assert storage.list("a") == ["one", "three", "two"]
    assert sum(storage.walk("a").values()) == 12


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_requests_and_bytes_are_counted_alike(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    uri = str(tmp_path) if kind == "local" else request.getfixturevalue("s3").uri()
    storage = CountingStorage(open_storage(uri))
    use(storage)
    counts = storage.counts
    assert dict(counts.requests) == {
        **dict.fromkeys(("create", "replace", "publishing", "read", "read_range", "list", "walk"), 1),
        "local_path": 2,
    }
    assert (counts.bytes_written, counts.bytes_fetched) == (12, 3 + 2 + 5 + 5)
    assert (counts.fetched_of("/three"), counts.num_requests) == (12, 9)
    counts.reset()
    assert (counts.num_requests, counts.bytes_fetched, counts.bytes_written) == (0, 0, 0)


def test_what_reaches_the_server_is_counted(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    with traffic(s3, monkeypatch) as counts:
        use(open_storage(s3.uri()))
    assert counts.fetched_of("/three") == 2 + 5 + 5
    assert counts.fetched_of("/one") == 3
    assert counts.requests["GET"] >= 6  # those four, and two listings
    assert counts.bytes_written >= 12


def test_every_method_of_a_storage_is_counted(tmp_path: Path) -> None:
    methods = {name for name, _ in inspect.getmembers(Storage, inspect.isfunction) if not name.startswith("_")}
    assert methods <= {name for name in vars(CountingStorage) if not name.startswith("_")}
    assert CountingStorage(LocalStorage(tmp_path)).root == tmp_path

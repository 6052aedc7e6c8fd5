"""The door to the bytes: exclusive creation, atomic publication, and what is said of things that are not there."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import DamagedFile, UsageError
from pipeline.store.storage.interface import AlreadyExists, Storage
from pipeline.store.storage.local import LocalStorage
from pipeline.store.storage.open_storage import open_storage


@pytest.fixture(params=["local", "s3", "s3 versioned"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of each kind with nothing in it."""
    if request.param == "local":
        return str(tmp_path / "memory")
    return str(request.getfixturevalue("s3").uri(versioned="versioned" in request.param))


@pytest.fixture
def storage(uri: str) -> Storage:
    return open_storage(uri)


@pytest.fixture
def reopened(uri: str) -> Callable[[], Storage]:
    return lambda: open_storage(uri)


def test_create_is_exclusive_among_threads(storage: Storage) -> None:
    won: list[int] = []
    failed: list[Exception] = []
    barrier = threading.Barrier(16)

    def writer(number: int) -> None:
        barrier.wait()
        try:
            storage.create("versions/1.json", str(number).encode())
        except AlreadyExists:
            return
        except Exception as error:
            failed.append(error)
        won.append(number)

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(won) == 1
    assert storage.read("versions/1.json") == str(won[0]).encode()
    assert storage.list("versions") == ["1.json"]


def test_create_is_exclusive_among_storages(reopened: Callable[[], Storage]) -> None:
    reopened().create("a/file", b"one")
    with pytest.raises(AlreadyExists):
        reopened().create("a/file", b"two")
    assert reopened().read("a/file") == b"one"


def test_what_was_deleted_can_be_created(storage: Storage) -> None:
    storage.create("file", b"one")
    storage.delete(["file"])
    storage.create("file", b"two")
    assert storage.read("file") == b"two"


def test_nothing_is_published_when_writing_fails(storage: Storage) -> None:
    def half() -> None:
        with storage.publishing("a/file") as local:
            local.write_bytes(b"half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        half()
    assert not storage.exists("a/file")
    assert storage.walk() == {}


def test_publishing_replaces(storage: Storage) -> None:
    for text in ("one", "two"):
        with storage.publishing("file") as local:
            local.write_text(text)
        assert not local.exists()
    assert storage.read("file") == b"two"
    assert storage.noncurrent() == []


def test_replacing_replaces(storage: Storage) -> None:
    for data in (b"one", b"two", b"three"):
        storage.replace("a/file", data)
        assert storage.read("a/file") == data
        assert storage.local_path("a/file").read_bytes() == data
    assert storage.noncurrent() == []
    assert storage.abandoned() == []


def test_files_are_listed_walked_and_found(storage: Storage) -> None:
    for path in ("a/one", "a/two", "a/b/three", "top", "ab"):
        storage.create(path, path.encode())
    assert storage.list("") == ["a", "ab", "top"]
    assert storage.list("a") == ["b", "one", "two"]
    assert storage.walk() == {"a/one": 5, "a/two": 5, "a/b/three": 9, "top": 3, "ab": 2}
    assert storage.walk("a") == {"a/one": 5, "a/two": 5, "a/b/three": 9}
    assert storage.exists("a/b/three")
    assert not storage.exists("a/thr")


def test_deleting_leaves_the_rest(storage: Storage) -> None:
    for path in ("a/one", "a/one-more", "a/b/three"):
        storage.create(path, b"x")
    storage.delete(["a/one", "a/gone", "a/b/three"])
    assert storage.walk() == {"a/one-more": 1}
    assert {"one-more"} <= set(storage.list("a")) <= {"one-more", "b"}  # SeaweedFS lists an empty folder for a while
    storage.delete([])


def test_a_folder_that_threads_fill_and_empty(storage: Storage) -> None:
    """As that of the leases: whoever deletes the last file removes it, while others make files in it."""
    rounds = 300 if isinstance(storage, LocalStorage) else 5
    left: list[int] = []

    def fill_and_empty(number: int) -> None:
        for i in range(rounds):
            storage.create(f"leases/{number}-{i}", b"x")
            storage.delete([f"leases/{number}-{i}"])
        left.append(number)

    threads = [threading.Thread(target=fill_and_empty, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(left) == [0, 1, 2, 3]
    assert storage.list("leases") == []


def test_a_folder_is_removed_with_all_in_it(storage: Storage) -> None:
    for path in ("a/one", "a/b/two", "ab/three"):
        storage.create(path, b"x")
    storage.remove_folder("a")
    storage.remove_folder("nowhere")
    assert storage.walk() == {"ab/three": 1}
    assert not {"one", "two"} & set(storage.list("a"))


@pytest.mark.parametrize("ask", ["read", "local_path"])
def test_a_missing_file_is_named(storage: Storage, ask: str) -> None:
    storage.create("there", b"x")
    with pytest.raises(DamagedFile, match=r"gone\.bin is missing from the memory"):
        getattr(storage, ask)("gone.bin")


def test_a_folder_that_is_not_there_is_empty(storage: Storage) -> None:
    assert storage.list("") == []
    assert storage.list("versions") == []
    assert storage.walk("versions") == {}


@pytest.mark.parametrize("uri", ["http://host/memory", "nonsense://bucket/memory", "memory://memory", "zip::s3://b/m"])
def test_other_schemes_are_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="cannot hold a memory: give a folder, s3://BUCKET/FOLDER"):
        open_storage(uri)


def test_a_scheme_without_its_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UsageError, match="gcsfs"):
        open_storage("gs://bucket/memory")


@pytest.mark.parametrize("uri", ["s3://", "s3:///", "s3:///folder"])
def test_a_uri_without_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="names no bucket"):
        open_storage(uri)


def test_a_file_is_no_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        open_storage(str(tmp_path / "file"))

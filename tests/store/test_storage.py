"""The door to the bytes: exclusive creation, atomic publication, and what is said of things that are not there."""

import threading
from pathlib import Path

import pytest

from pipeline.errors import DamagedFile, UsageError
from pipeline.store.local import LocalStorage
from pipeline.store.storage import AlreadyExists, open_storage


def test_create_is_exclusive_among_threads(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    won: list[int] = []
    barrier = threading.Barrier(16)

    def writer(number: int) -> None:
        barrier.wait()
        try:
            storage.create("versions/1.json", str(number).encode())
        except AlreadyExists:
            return
        won.append(number)

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read("versions/1.json") == str(won[0]).encode()
    assert storage.list("versions") == ["1.json"]


def test_nothing_is_published_when_writing_fails(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)

    def half() -> None:
        with storage.publishing("a/file") as local:
            local.write_bytes(b"half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        half()
    assert not storage.exists("a/file")
    assert list((tmp_path / "a").iterdir()) == []


def test_publishing_replaces(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for text in ("one", "two"):
        with storage.publishing("file") as local:
            local.write_text(text)
    assert storage.read("file") == b"two"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match=r"gone\.bin is missing from the memory"):
        LocalStorage(tmp_path).read("gone.bin")


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "nowhere")
    assert storage.list("versions") == []


@pytest.mark.parametrize("uri", ["s3://bucket/memory", "gs://bucket/memory"])
def test_other_schemes_are_refused_for_now(uri: str) -> None:
    with pytest.raises(UsageError, match="local folder"):
        open_storage(uri)


def test_a_file_is_no_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        open_storage(str(tmp_path / "file"))

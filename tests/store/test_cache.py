"""Local copies of a memory's files: fetched once, whole or not used, bounded, and continued where they broke off."""

import fcntl
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DamagedFile, StorageError
from pipeline.progress import Progress
from pipeline.store.storage import file_cache as caching
from pipeline.store.storage.file_cache import CachedStorage, FileCache
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.local import LocalStorage


class Counting(LocalStorage):
    """A folder that counts what is asked of it, and may break off."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[tuple[int, int]] = []
        self.breaks_at: int | None = None

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        if self.breaks_at is not None and start >= self.breaks_at:
            raise StorageError("the connection broke")
        self.asked.append((start, stop))
        return super().read_range(path, start, stop)


@pytest.fixture
def storage(tmp_path: Path) -> Counting:
    return Counting(tmp_path / "memory")


def published(storage: Counting, name: str, data: bytes) -> FileRef:
    storage.create(name, data)
    return FileRef(path=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_a_file_is_fetched_once(storage: Counting, tmp_path: Path) -> None:
    file = published(storage, "a", b"x" * 1_000)
    cache = FileCache(tmp_path / "cache", 10_000)
    assert cache.get(storage, file).read_bytes() == b"x" * 1_000
    assert cache.get(storage, file) == FileCache(tmp_path / "cache", 10_000).get(storage, file)
    assert len(storage.asked) == 1


def test_a_download_that_broke_off_goes_on(storage: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "RANGE_BYTES", 100)
    data = bytes(range(256)) * 4
    file = published(storage, "a", data)
    moments: list[Progress] = []
    cache = FileCache(tmp_path / "cache", 10_000, moments.append)
    storage.breaks_at = 500
    with pytest.raises(StorageError, match="the connection broke"):
        cache.get(storage, file)
    storage.breaks_at = None
    assert FileCache(tmp_path / "cache", 10_000, moments.append).get(storage, file).read_bytes() == data
    assert [start for start, _ in storage.asked] == list(range(0, 1_024, 100))
    assert (moments[-1].done, moments[-1].total) == (1_024, 1_024)


@pytest.mark.parametrize("how", ["cut short", "overwritten", "removed", "longer"])
def test_a_damaged_copy_is_noticed_and_fetched_again(storage: Counting, tmp_path: Path, how: str) -> None:
    data = b"y" * 5_000
    file = published(storage, "a", data)
    cache = FileCache(tmp_path / "cache", 100_000)
    stored = CachedStorage(storage, cache)
    stored.expect([file])
    copy = stored.local_path("a")
    assert stored.altered() == []
    damage(copy, how)
    assert stored.altered() == [file.sha256]
    assert stored.local_path("a").read_bytes() == data
    assert stored.altered() == []
    damage(copy, how)  # found by a process that begins
    assert FileCache(tmp_path / "cache", 100_000).get(storage, file).read_bytes() == data


def damage(copy: Path, how: str) -> None:
    match how:
        case "cut short":
            with copy.open("r+b") as stream:
                stream.truncate(100)
        case "overwritten":
            with copy.open("r+b") as stream:
                stream.seek(50)
                stream.write(b"other")
        case "longer":
            with copy.open("ab") as stream:
                stream.write(b"more")
        case "removed":
            copy.unlink()


def test_a_file_damaged_where_it_comes_from_is_told(storage: Counting, tmp_path: Path) -> None:
    file = published(storage, "a", b"x" * 100)
    (tmp_path / "memory" / "a").write_bytes(b"z" * 100)
    with pytest.raises(StorageError, match="`verify` says whether"):
        FileCache(tmp_path / "cache", 1_000).get(storage, file)
    (tmp_path / "memory" / "a").unlink()
    with pytest.raises(DamagedFile, match="a is missing"):
        FileCache(tmp_path / "cache", 1_000).get(storage, file)


def test_room_is_made_by_what_nobody_uses(storage: Counting, tmp_path: Path) -> None:
    first, second, third, large = (
        published(storage, name, name.encode() * size)
        for name, size in (("a", 400), ("b", 400), ("c", 300), ("d", 900))
    )
    cache = FileCache(tmp_path / "cache", 1_000)
    cache.get(storage, first)
    cache.get(storage, second)
    with pytest.raises(StorageError, match="800 are in use, and c needs 300 more: allow more"):
        cache.get(storage, third)
    cache.keep_only({second.sha256})
    cache.get(storage, third)
    assert {path.name for path in (tmp_path / "cache").iterdir() if path.name[0] != "."} == {
        second.sha256,
        third.sha256,
    }
    cache.keep_only(set())
    with (tmp_path / "cache" / third.sha256).open("rb") as other:  # as another process would
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(StorageError, match="300 are in use"):
            cache.get(storage, large)
    cache.get(storage, large)


def test_processes_that_make_room_at_once_do_not_disturb_each_other(storage: Counting, tmp_path: Path) -> None:
    files = [published(storage, f"file-{number}", bytes([number]) * 400) for number in range(6)]

    def fetch(seed: int) -> None:
        cache = FileCache(tmp_path / "cache", 2_000)  # of its own, as in a process of its own
        for number in np.random.default_rng(seed).integers(6, size=300):
            assert cache.get(storage, files[number]).name == files[number].sha256
            cache.keep_only(set())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fetch, range(4)))


def test_what_has_no_known_hash_is_left_to_the_storage(storage: Counting, tmp_path: Path) -> None:
    published(storage, "a", b"x")
    stored = CachedStorage(storage, FileCache(tmp_path / "cache", 1_000))
    assert stored.local_path("a") == tmp_path / "memory" / "a"
    assert stored.read("a") == b"x"

"""Local copies of the files of an object store: bounded together, the least recently used go, those in use stay."""

import errno
import mmap
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.errors import UsageError
from pipeline.index.build.plan import IndexOptions
from pipeline.store.storage import local_copies
from pipeline.store.storage.interface import released
from pipeline.store.storage.local_copies import LIMIT, Copies
from pipeline.store.storage.object_store import ObjectStorage
from pipeline.store.storage.open_storage import open_storage
from tests.conftest import unit
from tests.store.seaweed import SeaweedFS

SIZE = 1_000


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of this test alone, of which one asked for just now may be removed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(local_copies, "OPENED_SECONDS", 0.0)
    monkeypatch.setattr(local_copies, "_process", local_copies._OfProcess())


def writing(num_bytes: int = SIZE) -> Callable[[Path], None]:
    return lambda local: local.write_bytes(b"x" * num_bytes) and None  # type: ignore[func-returns-value]


def there(folder: Path) -> int:
    """The bytes of all copies on the disk."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "owner.json")


def test_copies_of_all_storages_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, str(5 * SIZE))
    one, other = Copies(), Copies()
    for number in range(20):
        copies = one if number % 3 else other
        assert copies.get(f"a/{number}", writing()).stat().st_size == SIZE
        one.get("a/1", writing())  # used again and again
        assert there(tmp_path) == one.num_bytes + other.num_bytes <= 5 * SIZE
    assert one.get("a/1", lambda _: pytest.fail("it was removed although it was used last")).exists()
    fetched: list[Path] = []
    other.get("a/0", lambda local: fetched.append(local) or writing()(local))  # type: ignore[func-returns-value]
    assert len(fetched) == 1, "it was the least recently used"


def test_mapped_copies_and_those_about_to_be_opened_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, str(2 * SIZE))
    copies = Copies()
    with copies.get("mapped", writing()).open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ):
        for number in range(6):
            copies.get(str(number), writing())
        copies.get("mapped", lambda _: pytest.fail("it was removed while it was mapped"))
        assert copies.num_bytes == 2 * SIZE
    monkeypatch.setattr(local_copies, "OPENED_SECONDS", 60.0)
    paths = [copies.get(f"new {number}", writing()) for number in range(5)]
    assert all(path.exists() for path in paths), "they are more than the limit, and their callers open them now"


def test_a_full_disk_is_relieved_once(tmp_path: Path) -> None:
    copies = Copies()
    for number in range(3):
        copies.get(str(number), writing())
    tries: list[int] = []

    def fetch(local: Path) -> None:
        tries.append(copies.num_bytes)
        if copies.num_bytes:
            raise OSError(errno.ENOSPC, "no space left on device")
        writing()(local)

    assert copies.get("more", fetch).exists()
    assert tries == [3 * SIZE, 0]
    with pytest.raises(OSError, match="no space"):
        Copies().get("again", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space left on device")))


def test_the_limit_follows_the_disk_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = local_copies.shutil.disk_usage(tmp_path).free
    assert local_copies._limit(tmp_path, 0) == pytest.approx(0.8 * free, rel=0.05)
    monkeypatch.setenv(LIMIT, "a lot")
    with pytest.raises(UsageError, match="VISUAL_MEMORY_COPIES_BYTES a lot is no number of bytes"):
        Copies().get("a", writing())


def _in_a_fork(path: str) -> None:
    local_copies.make_room(Path(path), most=0)


def test_a_fork_leaves_its_parents_copies(tmp_path: Path) -> None:
    copies = Copies()
    copy = copies.get("a", writing())
    process = multiprocessing.get_context("fork").Process(target=_in_a_fork, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert copy.exists()


def test_an_index_build_holds_a_few_files_at_a_time(
    s3: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries files are released one after another, whatever the limit."""
    (tmp_path / "vectors").mkdir()
    for part in range(6):
        vectors_ND = unit(np.random.default_rng(part).normal(size=(500, 64)))
        np.save(tmp_path / "vectors" / f"{part}.npy", vectors_ND)
    memory = VisualMemory(s3.uri())
    memory.add(tmp_path / "vectors")
    most = list[int]()
    local_path = ObjectStorage.local_path

    def watched(self: ObjectStorage, path: str) -> Path:
        found = local_path(self, path)
        most.append(sum("/entries/" in known for known in self._here.copies._copies))
        return found

    monkeypatch.setattr(ObjectStorage, "local_path", watched)
    VisualMemory(memory.uri).index(IndexOptions(key="IVF16,SQfp16"))
    assert max(most) == 1
    storage = open_storage(memory.uri)
    [file, *_] = memory.state().entries_files()
    with released(storage, file.path):
        local = storage.local_path(file.path)
        assert local.exists()
    assert not local.exists()

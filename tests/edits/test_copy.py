"""Copying: everything, checked, to the last version; killed at any moment; and never over anything else."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import VisualMemory
from pipeline.edits.copy import copy
from pipeline.edits.expire import expire
from pipeline.errors import CommitConflict, DamagedFile, MemoryMissing, StorageError, UsageError
from pipeline.index.build.plan import IndexOptions
from pipeline.progress import Progress
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.local import LocalStorage
from pipeline.store.storage.object_store import ObjectStorage
from pipeline.store.storage.open_storage import open_storage
from tests.store.counting import traffic
from tests.store.dying import Died, DyingStorage, bury
from tests.store.seaweed import SeaweedFS


@pytest.fixture
def memory(digits_memory: VisualMemory, digits: Path, tmp_path: Path) -> VisualMemory:
    """Seven versions with an index, single adds, other labels and what a rollback took away."""
    made = VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "memory"))
    made.forget(labels=["4"])
    made.index(IndexOptions(key="IVF2,Flat"))
    made.add_images(sorted((digits / "ask" / "3").iterdir())[:2], labels=["3", "3"])
    made.relabel(ids=[int(made.live().live_ids()[0])], label="7")
    made.rollback(4)
    made.forget(labels=["2"])
    return made


def answers(memory: VisualMemory, digits: Path) -> list:
    asked = [next((digits / "ask" / str(digit)).iterdir()) for digit in range(5)]
    first, newest = memory.log.retained()[0], memory.log.retained()[-1]
    versions = [VisualMemory(memory.uri, at=number) for number in range(first, newest + 1)]
    return [[d.to_json() for d in each.classify(asked, 20)] for each in versions]


def contents(root: str | Path) -> dict[str, bytes]:
    files = LocalStorage(Path(root)).walk()
    return {path: (Path(root) / path).read_bytes() for path in files}


def test_the_copy_answers_as_the_memory_does(memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = memory.copy(tmp_path / "copy", on_progress=seen.append)
    copied = VisualMemory(tmp_path / "copy")
    assert (report.first_version, report.version, report.already) == (1, 7, 0)
    assert answers(copied, digits) == answers(memory, digits)
    ours, theirs = contents(memory.uri), contents(copied.uri)
    assert theirs.pop("versions/latest") == b"7"
    assert theirs.pop("versions/rollup") != ours.pop("versions/rollup"), "of the last version"
    assert theirs == ours
    assert copied.status() | {"uri": 0} == memory.status() | {"uri": 0}
    assert {(moment.stage, moment.total) for moment in seen} == {("copying", report.files)}
    assert [moment.done for moment in seen] == list(range(report.files + 1))
    shutil.rmtree(memory.uri)
    assert copied.verify().sound
    assert copied.add(digits / "ask").segment == 3
    copied.rollback(2)
    assert copied.status()["entries"] == 80


def test_a_memory_that_dropped_versions(memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    memory.expire(3)
    assert memory.copy(tmp_path / "copy").to_json()["versions"] == 3
    copied = VisualMemory(tmp_path / "copy")
    assert copied.log.retained() == range(5, 8)
    assert answers(copied, digits) == answers(memory, digits)


def test_places_that_are_taken(memory: VisualMemory, digits_memory: VisualMemory, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("mine")
    (tmp_path / "elsewhere").symlink_to(memory.uri)
    before = contents(tmp_path)
    for target in (tmp_path / "texts", digits_memory.uri):
        with pytest.raises(UsageError, match="is not empty: name an empty or new place"):
            memory.copy(target)
    for target in (memory.uri, f"{memory.uri}/inside", tmp_path, tmp_path / "elsewhere" / "inside"):
        with pytest.raises(UsageError, match="lie in one another"):
            memory.copy(target)
    with pytest.raises(UsageError, match="is a file"):
        memory.copy(tmp_path / "texts/a.txt")
    with pytest.raises(MemoryMissing, match="there is no memory at"):
        VisualMemory(tmp_path / "nowhere").copy(tmp_path / "copy")
    memory.log.storage.replace("erasures/0123.json", b"{}")
    with pytest.raises(CommitConflict, match="begun and not finished"):
        memory.copy(tmp_path / "copy")
    memory.log.storage.delete(["erasures/0123.json"])
    assert contents(tmp_path) == before
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("first", [1, 4])
def test_killed_at_any_moment(memory: VisualMemory, tmp_path: Path, first: int) -> None:
    if first > 1:
        memory.expire(8 - first)
    reference = tmp_path / "reference"
    memory.copy(reference)
    expected = contents(reference)
    for changes in range(200):
        root = tmp_path / f"killed-{changes}"
        dying = DyingStorage(root, changes)
        with contextlib.suppress(Died):
            copy(memory.log, dying)
        log = VersionLog(LocalStorage(root))
        unfinished = (root / "copying.json").exists()
        with contextlib.suppress(DamagedFile) if unfinished else contextlib.nullcontext():
            if root.exists():
                assert log.retained() == memory.log.retained()
                assert log.latest() == memory.log.latest()
        bury(log.storage)
        if unfinished or not root.exists():
            copy(memory.log, log.storage)
        left = contents(root)
        assert {path: left[path] for path in left if not path.startswith("leases/")} == expected
        shutil.rmtree(root)
        if not dying.died:
            break
    else:
        pytest.fail("it never came to an end")


def interrupted(memory: VisualMemory, root: Path, changes: int | None = None) -> None:
    """Begin a copy and die after so many changes; by default when all is there but the version that opens the rest."""
    if changes is None:
        counting = DyingStorage(root.with_name("counting"), 1_000)
        copy(memory.log, counting)
        changes = 1_000 - counting.changes - 5  # that version, the hint, the roll-up, the marker, the lease
    dying = DyingStorage(root, changes)
    with pytest.raises(Died):
        copy(memory.log, dying)
    bury(LocalStorage(root))


def test_an_unfinished_copy_is_no_memory(memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    interrupted(memory, tmp_path / "copy")
    assert len(list((tmp_path / "copy").glob("versions/*"))) == 6
    before = contents(tmp_path / "copy")
    for use in (
        lambda copied: copied.status(),
        lambda copied: copied.add(digits / "ask"),
        lambda copied: copied.forget(labels=["3"]),
        lambda copied: copied.history(),
        lambda copied: copied.copy(tmp_path / "another"),
    ):
        with pytest.raises(DamagedFile, match="copy of a memory that was not finished: run the same `copy` again"):
            use(VisualMemory(tmp_path / "copy"))
    assert contents(tmp_path / "copy") == before


def test_an_unfinished_copy_of_another_memory(
    memory: VisualMemory, digits_memory: VisualMemory, tmp_path: Path
) -> None:
    interrupted(memory, tmp_path / "copy", 10)
    before = contents(tmp_path / "copy")
    with pytest.raises(UsageError, match=f"unfinished copy of the memory at {memory.uri}: finish that one"):
        digits_memory.copy(tmp_path / "copy")
    assert contents(tmp_path / "copy") == before


def test_what_was_copied_is_not_copied_again(memory: VisualMemory, tmp_path: Path) -> None:
    interrupted(memory, tmp_path / "copy", 10)
    there = set((tmp_path / "copy").rglob("*.parquet"))
    [cut, *_] = there
    cut.write_bytes(cut.read_bytes()[:-1])
    inodes = {path: path.stat().st_ino for path in there}
    report = memory.copy(tmp_path / "copy")
    assert 0 < report.already < report.files + report.already
    assert {path for path in there if path.stat().st_ino != inodes[path]} == {cut}


def test_the_memory_goes_on_while_the_copy_is_interrupted(memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    """It grows, and drops versions whose files the first attempt brought over."""
    interrupted(memory, tmp_path / "copy")
    memory.forget(labels=["1"])
    memory.expire(1)
    memory.copy(tmp_path / "copy")
    assert contents(tmp_path / "copy").keys() - {"versions/latest"} == contents(memory.uri).keys()
    assert answers(VisualMemory(tmp_path / "copy"), digits) == answers(memory, digits)


def test_versions_dropped_while_copying(memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    class Overtaken(LocalStorage):
        expired = False

        def read(self, path: str) -> bytes:
            if path.endswith("done/000000.json") and not self.expired:
                self.expired = True
                expire(VersionLog(LocalStorage(self.root)), 2, "expire")
            return super().read(path)

    copy(VersionLog(Overtaken(Path(memory.uri))), LocalStorage(tmp_path / "copy"))
    assert VisualMemory(tmp_path / "copy").log.retained() == range(6, 8)
    assert answers(VisualMemory(tmp_path / "copy"), digits) == answers(memory, digits)


@pytest.mark.parametrize(
    "pattern", ["segments/*/entries/*.parquet", "index/*/shards/0/vectors.f16", "encoder/*", "tombstones/*"]
)
def test_damage_is_named_and_not_copied(memory: VisualMemory, tmp_path: Path, pattern: str) -> None:
    damaged = min(Path(memory.uri).glob(pattern))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    name = damaged.relative_to(memory.uri)
    with pytest.raises(DamagedFile, match=f"{name} in the memory at .* was altered"):
        memory.copy(tmp_path / "copy")
    assert not (tmp_path / "copy" / name).exists()
    damaged.unlink()
    with pytest.raises(DamagedFile, match=f"{name} is missing"):
        memory.copy(tmp_path / "copy")
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    memory.copy(tmp_path / "copy")
    assert (tmp_path / "copy" / name).read_bytes() == data


def test_two_copies_to_one_place(memory: VisualMemory, tmp_path: Path) -> None:
    interrupted(memory, tmp_path / "copy", 10)
    target = LocalStorage(tmp_path / "copy")
    with Lease(target, "copy"), pytest.raises(CommitConflict, match="is copying to .* right now"):
        memory.copy(tmp_path / "copy")
    memory.copy(tmp_path / "copy")


def test_an_interrupted_add_stays_where_it_was_begun(memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    killed = VisualMemory(memory.uri)
    killed.log = VersionLog(DyingStorage(Path(memory.uri), 6))
    with pytest.raises(Died):
        killed.add(digits / "ask")
    bury(LocalStorage(Path(memory.uri)))
    memory.copy(tmp_path / "copy")
    report = VisualMemory(tmp_path / "copy").add(digits / "ask")
    assert (report.segment, report.entries, report.resumed) == (4, 50, 0)
    assert memory.add(digits / "ask").segment == 3


def test_a_process_that_is_killed_and_run_again(memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    [part] = Path(memory.uri).glob("segments/00000001/entries/*.parquet")
    command = [sys.executable, "-m", "jobs.cli", "copy", memory.uri, str(tmp_path / "copy"), "--json"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment)
    while not (tmp_path / "copy" / "copying.json").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["version"] == 7
    assert (tmp_path / "copy" / part.relative_to(memory.uri)).read_bytes() == part.read_bytes()
    assert contents(tmp_path / "copy").keys() - {"versions/latest"} == contents(memory.uri).keys()


def test_to_s3_and_back(memory: VisualMemory, digits: Path, tmp_path: Path, s3: SeaweedFS) -> None:
    uri = s3.uri()
    report = memory.copy(uri)
    assert (report.version, report.already) == (7, 0)
    there = VisualMemory(uri)
    assert answers(there, digits) == answers(memory, digits)
    with pytest.raises(UsageError, match="is not empty"):
        memory.copy(uri)
    there.rollback(2)
    there.expire(2)
    assert VisualMemory(uri).log.retained() == range(7, 9)
    VisualMemory(uri).copy(tmp_path / "back")
    assert answers(VisualMemory(tmp_path / "back"), digits) == answers(there, digits)
    assert VisualMemory(tmp_path / "back").verify().sound
    other = s3.uri(versioned=True)
    VisualMemory(uri).copy(other)
    assert open_storage(other).walk().keys() == open_storage(uri).walk().keys() | {"versions/latest"}
    assert open_storage(other).noncurrent() == []


def test_a_repeated_copy_to_s3_fetches_nothing_from_there(
    memory: VisualMemory, tmp_path: Path, s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = s3.uri()

    def fail(*_: object) -> None:
        raise StorageError("the connection broke off")

    with monkeypatch.context() as broken:
        broken.setattr("pipeline.edits.copy._Copier._copy_commit", fail)
        with pytest.raises(StorageError):
            memory.copy(uri)
    part = next(path for path in open_storage(uri).walk() if "/entries/" in path)
    open_storage(uri).replace(part, b"cut")
    fetched: list[str] = []
    of_files = ObjectStorage.local_path
    monkeypatch.setattr(ObjectStorage, "local_path", lambda self, path: (fetched.append(path), of_files(self, path))[1])
    report = memory.copy(uri)
    assert fetched == []
    assert (report.files, report.already > 5) == (1, True)
    monkeypatch.undo()
    assert VisualMemory(uri).verify().sound


def test_within_a_store_the_store_copies(
    memory: VisualMemory, digits: Path, s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = s3.uri(), s3.uri(), s3.uri(versioned=True)
    memory.copy(first)
    large = sum(file.num_bytes for file in memory.state().entries_files())
    with traffic(s3, monkeypatch) as counts:
        report = VisualMemory(first).copy(second)
    assert (report.version, report.already) == (7, 0)
    moved = {path for path in counts.fetched | counts.written if path.endswith((".parquet", ".safetensors", ".faiss"))}
    assert {path for path in moved if counts.fetched[path] or counts.written[path]} == set()
    assert counts.bytes_fetched + counts.bytes_written < large < report.num_bytes
    there = VisualMemory(second)
    assert answers(there, digits) == answers(memory, digits)
    assert there.verify().sound
    cut = next(path for path in open_storage(first).walk() if "/entries/" in path)
    whole = open_storage(first).read(cut)
    open_storage(first).replace(cut, whole[:-1])
    with pytest.raises(DamagedFile, match=f"{cut} in the memory at .* has"):
        VisualMemory(first).copy(third)
    open_storage(first).replace(cut, whole)
    assert VisualMemory(first).copy(third).already > 0
    assert open_storage(third).noncurrent() == []
    assert VisualMemory(third).verify().sound

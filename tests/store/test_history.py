"""The history: every kind of change in words, newest first, quick however many there are."""

import datetime
import getpass
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.edits.expire import expire
from pipeline.errors import DamagedFile, MemoryMissing, UsageError
from pipeline.index.build.plan import IndexOptions
from pipeline.store.layout import commit_path
from pipeline.store.log.documents import Commit
from pipeline.store.log.history import history
from pipeline.store.log.state import Forget, Relabel
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.local import LocalStorage
from tests.conftest import MakeMemory, add_vectors, unit


@pytest.fixture
def memory(make_memory: MakeMemory) -> VisualMemory:
    return make_memory(unit(np.random.default_rng(0).normal(size=(60, 8))), ["cat", "dog", "eel"] * 20)


def test_every_change_in_words(memory: VisualMemory, tmp_path: Path) -> None:
    first = int(memory.live().live_ids()[0])
    memory.forget(labels=["cat"])
    memory.index(IndexOptions(key="Flat"))
    memory.relabel(ids=[first + 1], label="cat")
    memory.relabel(label_set="size", map={"cat": "big", "dog": "big", "eel": "small"})
    memory.relabel(ids=[first + 2], label="huge", label_set="size")
    memory.rollback(2, command="rollback 2")
    add_vectors(memory.log, unit(np.random.default_rng(2).normal(size=(1, 8))), ["cat"], name="b")
    found = memory.history()
    assert [version.version for version in found] == list(range(8, 0, -1))
    assert [version.actions for version in found[::-1]] == [
        ("set encoder given", "add segment 1 (60 entries)"),
        ("forget 20",),
        ("index Flat",),
        ("relabel 1",),
        ("label set size",),
        ("relabel 1 in size",),
        ("rollback to 2",),
        ("add segment 2 (1 entry)",),
    ]
    assert [(version.rows_before, version.rows_after) for version in found[::-1]] == [
        *[(0, 60), (60, 40), (40, 40), (40, 40), (40, 40), (40, 40), (40, 40), (40, 41)]
    ]
    assert [version.command for version in found[:3]] == ["add", "rollback 2", "relabel"]
    for version in found:
        assert version.author == f"{getpass.getuser()}@{socket.gethostname()}"
        assert abs(datetime.datetime.now(datetime.UTC) - version.committed_at) < datetime.timedelta(minutes=5)
    assert found[0].to_json() == {
        "version": 8,
        "committed_at": found[0].committed_at.isoformat(),
        "author": found[0].author,
        "command": "add",
        "rows_before": 40,
        "rows_after": 41,
        "actions": ["add segment 2 (1 entry)"],
    }


def test_single_adds_and_erasures(digits_memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    memory = VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "memory"))
    memory.add_images(sorted((digits / "ask" / "3").iterdir())[:2], labels=["3", "3"])
    [newest] = memory.history(limit=1)
    assert (newest.actions, newest.rows_after) == (("add 2 entries",), 102)


def test_limit_and_the_past(memory: VisualMemory) -> None:
    for label in ("cat", "dog"):
        memory.forget(labels=[label])
    assert [version.version for version in memory.history(limit=2)] == [3, 2]
    assert [version.version for version in memory.history(limit=100)] == [3, 2, 1]
    assert [version.version for version in VisualMemory(memory.uri, at=2).history()] == [2, 1]
    assert [version.version for version in VisualMemory(memory.uri, at=2).history(limit=1)] == [2]
    memory.expire(2)
    assert [version.version for version in memory.history()] == [3, 2]
    with pytest.raises(MemoryMissing, match="has no version 1: it goes from 2 to 3"):
        VisualMemory(memory.uri, at=1).history()
    for limit in (0, -1):
        with pytest.raises(UsageError, match="not a number of versions"):
            memory.history(limit=limit)
    with pytest.raises(MemoryMissing, match="there is no memory at"):
        VisualMemory(f"{memory.uri}-new").history()


def long_log(root: Path, versions: int) -> VersionLog:
    """Version files as an application that forgets and corrects all day leaves them."""
    storage = LocalStorage(root)
    log = VersionLog(storage)
    for number in range(1, versions + 1):
        file = FileRef(path=f"tombstones/{number:020d}-{'0' * 16}.parquet", rows=1, num_bytes=800, sha256="0" * 64)
        action = Relabel(labels=file, relabelled=1) if number % 2 else Forget(tombstones=file, forgotten=1)
        commit = Commit(
            version=number,
            nonce=f"{number:016x}",
            committed_at=datetime.datetime.now(datetime.UTC),
            author="ana@laptop",
            command=f"forget --id {number}",
            rows_before=2_000 - number,
            rows_after=1_999 - number,
            actions=(action,),
        )
        log.rewrite(commit)
    return log


def test_each_version_that_is_shown_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = long_log(tmp_path, 1_000)
    log.latest()
    read: list[str] = []
    own_read = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, path: read.append(path) or own_read(self, path))
    assert [version.version for version in history(log)] == list(range(1_000, 0, -1))
    assert len(read) <= 1_010
    read.clear()
    assert len(history(log, limit=10)) == 10
    assert len(read) <= 20


def test_beside_an_expiry(tmp_path: Path) -> None:
    long_log(tmp_path, 50)

    class Overtaken(LocalStorage):
        def read(self, path: str) -> bytes:
            if path == commit_path(20):
                expire(VersionLog(LocalStorage(self.root)), 10, "expire")
            return super().read(path)

    found = [version.version for version in history(VersionLog(Overtaken(tmp_path)))]
    assert found[:10] == list(range(50, 40, -1))
    assert found == sorted(found, reverse=True)


def test_damage_is_named(tmp_path: Path) -> None:
    log = long_log(tmp_path, 5)
    (tmp_path / commit_path(3)).write_bytes(b"{}")
    with pytest.raises(DamagedFile, match=f"{commit_path(3)} .* is not a whole version file"):
        history(log)

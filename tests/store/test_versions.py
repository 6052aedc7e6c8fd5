"""Commits: exclusive, rebased or refused, folded from checkpoints, and told apart by nonce."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import CommitConflict, DamagedFile, FormatError, MemoryMissing
from pipeline.store.log.records import Index
from pipeline.store.log.state import Forget, SetIndex, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.interface import AlreadyExists
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.local import LocalStorage
from pipeline.store.tables.tombstones import read_tombstones, write_tombstones


def forget(log: VersionLog, base: State, *entry_ids: int) -> State:
    ids = np.array(entry_ids, np.int64)

    def prepare(version: int, _: State) -> list[Forget]:
        return [Forget(tombstones=write_tombstones(log.storage, lease, version, ids), forgotten=len(ids))]

    with Lease(log.storage, "test") as lease:
        return log.commit(base, "forget", prepare, lease)


@pytest.fixture
def log(tmp_path: Path) -> VersionLog:
    return VersionLog(LocalStorage(tmp_path))


def test_versions_count_up_and_the_past_stays_readable(log: VersionLog) -> None:
    state = State()
    for entry_id in (5, 3, 4):
        state = forget(log, state, entry_id)
    assert log.latest() == state
    assert state.version == 3
    assert read_tombstones(log.storage, log.latest().tombstones).tolist() == [3, 4, 5]
    assert read_tombstones(log.storage, log.at(2).tombstones).tolist() == [3, 5]


def test_racing_writers_rebase_and_none_is_lost(log: VersionLog) -> None:
    base = forget(log, State(), 1)

    def writer(number: int) -> None:
        for i in range(5):
            forget(log, base, 1_000 * number + i)  # each starts from the same old state

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = log.latest()
    assert state.version == 21
    assert len(read_tombstones(log.storage, state.tombstones)) == 21


def test_an_overlay_is_named_by_the_version_that_took_it(log: VersionLog) -> None:
    base = forget(log, State(), 1)
    forget(log, base, 2)
    state = forget(log, base, 3)  # loses the race for version 2
    assert state.version == 3
    assert f"{3:020d}" in state.tombstones[-1].path


def index(generation: int) -> Index:
    return Index(generation=generation, key="Flat", parameters="", trained=None, shards=())


def test_an_index_built_beside_another_is_a_conflict(log: VersionLog) -> None:
    base = forget(log, State(), 1)
    log.commit(base, "index", lambda *_: [SetIndex(index=index(1), replaces=None)])
    with pytest.raises(CommitConflict, match="another writer has changed the index"):
        log.commit(base, "index", lambda *_: [SetIndex(index=index(2), replaces=None)])
    assert log.latest().index == index(1)


def test_a_refusal_after_a_lost_answer_is_success(tmp_path: Path) -> None:
    class LosesTheAnswer(LocalStorage):
        """A store that does what it is told and then says the name was taken, as a retried request would find."""

        def create(self, path: str, data: bytes) -> None:
            super().create(path, data)
            raise AlreadyExists(path)

    log = VersionLog(LosesTheAnswer(tmp_path))
    assert forget(log, State(), 1).version == 1
    assert VersionLog(LocalStorage(tmp_path)).latest().version == 1


def test_checkpoints_stand_for_the_commits_before_them(log: VersionLog) -> None:
    state = State()
    for entry_id in range(103):
        state = forget(log, state, entry_id)
    assert log.storage.exists(f"versions/{100:020d}.checkpoint.json")
    for number in range(1, 100):
        (log.storage.local_path(f"versions/{number:020d}.json")).unlink()
    assert VersionLog(log.storage).latest() == state


def test_no_memory_and_no_such_version_are_said(log: VersionLog) -> None:
    with pytest.raises(MemoryMissing, match="there is no memory at"):
        log.latest()
    forget(log, State(), 1)
    with pytest.raises(MemoryMissing, match="has no version 9: it goes from 1 to 1"):
        log.at(9)


@pytest.mark.parametrize("damage", [b"", b'{"format": 1', b"[]", b'{"format": 1, "version": 1}'])
def test_a_damaged_version_is_named(log: VersionLog, damage: bytes) -> None:
    forget(log, State(), 1)
    path = log.storage.local_path(f"versions/{1:020d}.json")
    path.write_bytes(damage)
    with pytest.raises(DamagedFile, match=rf"{path.name}.*restore it"):
        VersionLog(log.storage).latest()


def test_a_version_under_another_number_is_named(log: VersionLog) -> None:
    state = forget(log, forget(log, State(), 1), 2)
    first, second = (log.storage.local_path(f"versions/{number:020d}.json") for number in (1, 2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(DamagedFile, match=second.name):
        VersionLog(log.storage).latest()
    with pytest.raises(DamagedFile, match=second.name):
        forget(log, state.model_copy(update={"version": 1}), 3)


def test_another_format_is_named(log: VersionLog) -> None:
    forget(log, State(), 1)
    path = log.storage.local_path(f"versions/{1:020d}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7}))
    with pytest.raises(FormatError, match="in format 7 and this release reads format 2"):
        VersionLog(log.storage).latest()

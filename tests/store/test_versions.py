"""Commits: exclusive, rebased or refused, folded from checkpoints, and told apart by nonce."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline.edits.expire import expire
from pipeline.errors import CommitConflict, DamagedFile, FormatError, MemoryMissing
from pipeline.store.checks.version_files import check_rollup, read_chain
from pipeline.store.layout import ROLLUP
from pipeline.store.log import version_log
from pipeline.store.log.documents import sealed_rollup
from pipeline.store.log.records import Index
from pipeline.store.log.state import BreakLeases, Forget, SetIndex, SetState, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.interface import AlreadyExists
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.local import LocalStorage
from pipeline.store.tables.tombstones import read_tombstones, write_tombstones
from tests.store.counting import CountingStorage


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


def grown(log: VersionLog, version: int) -> State:
    """A log with this many versions, each committed by a process of its own."""
    state = State()
    while state.version < version:
        process = VersionLog(log.storage)
        state = process.commit(process.newest() or State(), "verify --clean", lambda *_: [BreakLeases(leases=())])
    return state


@pytest.mark.parametrize("version", [10, 19, 99, 100, 109, 199])
def test_a_memory_opens_in_few_requests_wherever_its_last_checkpoint_is(log: VersionLog, version: int) -> None:
    state = State()
    while state.version < version:
        state = forget(log, state, state.version)
    counting = CountingStorage(log.storage)
    assert VersionLog(counting).latest() == state
    assert counting.counts.num_requests <= 14, counting.counts


@pytest.mark.parametrize("version", [9, 99, 100, 115])
def test_processes_that_commit_once_keep_the_rollup_up(log: VersionLog, version: int) -> None:
    state = grown(log, version)
    run = log.read_rollup()
    start = version - version % 100
    assert [*run.commits] == [*log.commits(range(start + 1, version + 1))]
    assert run.version == version
    counting = CountingStorage(log.storage)
    assert VersionLog(counting).latest() == state
    assert counting.counts.num_requests <= 5, counting.counts


def _found_of_rollup(log: VersionLog) -> list[tuple[str, str]]:
    return [(found.severity, found.what) for found in check_rollup(log, read_chain(log))]


@pytest.mark.parametrize("harm", [b"", b"{}", b"cut", b"old", None])
@pytest.mark.parametrize("version", [47, 130])
def test_a_memory_opens_with_a_rollup_that_is_lost_old_or_cut_short(
    log: VersionLog, version: int, harm: bytes | None
) -> None:
    grown(log, 20)
    old = log.storage.read(ROLLUP)
    state = grown(log, version)
    assert _found_of_rollup(log) == []
    if harm is None:
        log.remove_rollup()
    else:
        whole = log.storage.read(ROLLUP)
        log.storage.replace(ROLLUP, {b"cut": whole[: len(whole) // 2], b"old": old}.get(harm, harm))
    assert VersionLog(log.storage).latest() == state
    [(severity, what)] = _found_of_rollup(log)
    assert (severity, what) == {
        None: ("note", "is not there, so that the memory opens slowly"),
        b"old": ("note", f"leads to version 20, and {version} is the newest there is"),
    }.get(harm, ("damage", "is not as it was written"))
    process = VersionLog(log.storage)
    later = forget(process, process.latest(), 1_000)
    assert VersionLog(log.storage).latest() == later
    assert _found_of_rollup(log) == []


def test_a_rollup_that_says_other_than_the_commits_is_named(log: VersionLog) -> None:
    grown(log, 20)
    run = log.read_rollup()
    changed = [run.commits[0].model_copy(update={"author": "another"}), *run.commits[1:]]
    log.storage.replace(ROLLUP, sealed_rollup(changed, 1))
    assert _found_of_rollup(log) == [("damage", "is not what the commits in it say")]


def test_a_rollup_of_another_memory_is_not_used(log: VersionLog, tmp_path: Path) -> None:
    """A copy of an older state of the memory was put in its place, and has gone on otherwise."""
    other = VersionLog(LocalStorage(tmp_path / "other"))
    grown(other, 12)
    state = grown(log, 15)
    log.storage.replace(ROLLUP, other.storage.read(ROLLUP))
    assert VersionLog(log.storage).latest() == state


def test_a_state_that_is_replaced_begins_the_rollup_anew(log: VersionLog) -> None:
    state = grown(log, 15)
    old = log.at(3)
    restored = old.model_copy(update={"version": 3, "rewrites": 1})
    log = VersionLog(log.storage)
    state = log.commit(state, "rollback", lambda *_: [SetState(why="rollback", state=restored)])
    while state.version < 23:
        state = forget(log, state, 1_000 + state.version)
    assert (log.read_rollup().first, log.read_rollup().version) == (16, 20)
    assert VersionLog(log.storage).latest() == state


def test_large_commits_are_rolled_up_as_the_state(log: VersionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_log, "MOST_ROLLED_BYTES", 2_000)
    state = forget(log, State(), 0)
    index = Index(generation=1, key="k" * 20_000, parameters="", trained=None, shards=())
    while state.version < 10:
        built = index.model_copy(update={"generation": state.version})
        changed = SetIndex(index=built, replaces=state.version - 1 or None)
        state = log.commit(log.latest(), "index", lambda *_, changed=changed: [changed])
    assert log.checkpoints() == []
    assert (log.read_rollup().commits, log.read_rollup().begun) == ((), state)
    assert VersionLog(log.storage).latest() == state
    state = forget(VersionLog(log.storage), state, 1_000)
    assert VersionLog(log.storage).latest() == state
    assert _found_of_rollup(log) == []
    run = log.read_rollup()
    other = run.model_copy(update={"begun": run.begun.model_copy(update={"rewrites": 9})}) if run.begun else run
    log.storage.replace(ROLLUP, sealed_rollup(other.commits, other.first, other.begun))
    assert [severity for severity, *_ in _found_of_rollup(log)] == ["damage"]


def test_a_rollup_does_not_begin_before_dropped_versions(log: VersionLog) -> None:
    """The process that goes on has seen the versions that another drops."""
    state = grown(log, 19)
    state = forget(log, log.latest(), 19)
    state = forget(log, state, 20)
    expire(VersionLog(log.storage), 2, "expire")
    while state.version < 41:
        state = forget(log, state, state.version)
    assert log.read_rollup().first == 21
    assert VersionLog(log.storage).latest() == state
    assert _found_of_rollup(log) == []


def test_no_rollup_names_what_an_erasure_took_away_while_it_was_written(log: VersionLog) -> None:
    """The writer is slow: after its commit another erases, and removes the roll-up, before it writes this one."""

    class Slow(LocalStorage):
        def replace(self, path: str, data: bytes) -> None:
            if path == ROLLUP:
                other = VersionLog(LocalStorage(Path(log.storage.uri)))
                state = other.latest()
                erased = state.model_copy(update={"rewrites": 1, "erasures": ("ab" * 8,)})
                other.commit(state, "erase", lambda *_: [SetState(why="erase", state=erased)])
                other.remove_rollup()
            super().replace(path, data)

    grown(log, 9)
    slow = VersionLog(Slow(Path(log.storage.uri)))
    assert forget(slow, slow.latest(), 100).version == 10
    assert not log.storage.exists(ROLLUP)
    assert VersionLog(log.storage).latest().version == 11


def test_a_rollup_of_a_version_that_was_dropped_meanwhile_is_removed(
    log: VersionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer is slow: after its commit others commit, and drop its version and the one after it."""
    monkeypatch.setattr(version_log, "SOON_SECONDS", 0.0)

    class Slow(LocalStorage):
        def replace(self, path: str, data: bytes) -> None:
            if path == ROLLUP:
                other = VersionLog(LocalStorage(Path(log.storage.uri)))
                state = other.latest()
                while state.version < 45:
                    state = forget(other, state, state.version)
                expire(VersionLog(log.storage), 2, "expire")
                assert other.retained()[0] > 11
            super().replace(path, data)

    grown(log, 9)
    slow = VersionLog(Slow(Path(log.storage.uri)))
    assert forget(slow, slow.latest(), 100).version == 10
    assert not log.storage.exists(ROLLUP)
    assert VersionLog(log.storage).latest().version == 45

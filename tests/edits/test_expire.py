"""Expiring: what goes and what stays, killed at any moment, beside writers and readers, under clocks that jump."""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import VisualMemory
from pipeline.edits.expire import expire
from pipeline.errors import CommitConflict, DamagedFile, MemoryMissing, UsageError
from pipeline.index.build.plan import IndexOptions
from pipeline.store.layout import ROLLUP, checkpoint_path, commit_number, commit_path
from pipeline.store.log.state import Forget, State, file_refs
from pipeline.store.log.version_log import VersionLog, in_droppable_groups
from pipeline.store.segments.reservations import SegmentSpec, is_given_up, reserve
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.local import LocalStorage
from pipeline.store.tables.tombstones import read_tombstones, write_tombstones
from tests.conftest import MakeMemory, add_vectors, identity_of, unit
from tests.store.dying import Died, DyingStorage, bury


def committed_ago(log: VersionLog, *ages: timedelta) -> None:
    """Make the versions as old as said, the oldest version first."""
    for commit, age in zip(list(log.commits(log.retained())), ages, strict=True):
        log.rewrite(commit.model_copy(update={"committed_at": datetime.now(UTC) - age}))


def days(*ages: float) -> list[timedelta]:
    return [timedelta(days=age) for age in ages]


@pytest.fixture
def memory(make_memory: MakeMemory) -> VisualMemory:
    """Six versions: an add, a forget, an index, an add, a rollback to 2, a forget."""
    made = make_memory(unit(np.random.default_rng(0).normal(size=(60, 8))), ["cat", "dog", "eel"] * 20)
    made.forget(labels=["cat"])
    made.index(IndexOptions(key="IVF2,Flat"))
    add_vectors(made.log, unit(np.random.default_rng(2).normal(size=(10, 8))), ["cat"] * 10, name="b")
    made.rollback(2)
    made.forget(labels=["dog"])
    return made


def kept(memory: VisualMemory) -> tuple[int, int]:
    numbers = VersionLog(LocalStorage(Path(memory.uri))).retained()
    return numbers[0], numbers[-1]


def test_what_the_memory_was_within_the_age_stays(memory: VisualMemory) -> None:
    committed_ago(memory.log, *days(90, 60, 40, 20, 10, 5))
    before = memory.log.storage.walk()
    planned = memory.plan_expire(timedelta(days=30))
    assert memory.log.storage.walk() == before
    report = memory.expire(timedelta(days=30))
    assert (report.dropped, report.first_kept, report.newest) == (2, 3, 6)  # 30 days ago it was version 3
    assert (report.dropped, report.files, report.num_bytes) == (planned.dropped, planned.files, planned.num_bytes)
    assert kept(memory) == (3, 6)
    assert memory.expire(timedelta(days=30)).files == 0
    memory.rollback(3)
    assert memory.status()["index"]["key"] == "IVF2,Flat"


def test_the_newest_stays_however_old(memory: VisualMemory) -> None:
    committed_ago(memory.log, *days(90, 80, 70, 60, 50, 40))
    entries = memory.status()["entries"]
    report = memory.expire(timedelta(days=30))
    assert (report.dropped, kept(memory)) == (5, (6, 6))
    assert VisualMemory(memory.uri).status()["entries"] == entries == 20
    files = memory.log.storage.walk()
    assert not [path for path in files if path.startswith("index/")]
    assert sorted(path for path in files if path.startswith("versions/")) == [
        checkpoint_path(6),
        commit_path(6),
        ROLLUP,
    ]
    assert memory.expire(timedelta(0)).dropped == 0


def test_a_number_of_versions(memory: VisualMemory) -> None:
    assert memory.expire(100).dropped == 0
    assert (memory.expire(3).dropped, kept(memory)) == (3, (4, 6))
    memory.forget(labels=["eel"])
    assert (memory.expire(3).dropped, kept(memory)) == (1, (5, 7))
    assert memory.log.checkpoints() == [5]
    assert VisualMemory(memory.uri, at=6).status()["entries"] == 20
    with pytest.raises(MemoryMissing, match="has no version 4: it goes from 5 to 7"):
        VisualMemory(memory.uri, at=4).status()


def test_clocks_that_jump_keep_too_much_rather_than_too_little(memory: VisualMemory) -> None:
    committed_ago(memory.log, *days(90, 60, -400, 80, 70, 5))  # the third was committed by a clock that ran ahead
    assert memory.expire(timedelta(days=30)).first_kept == 2
    committed_ago(memory.log, *days(1, 90, 80, 70, 5))
    assert memory.expire(timedelta(days=30)).dropped == 0
    committed_ago(memory.log, *days(90, 90, 90, 90, 90))
    assert memory.expire(timedelta(days=30)).first_kept == 6
    assert memory.expire(timedelta(days=999_999_999)).dropped == 0


def test_what_can_never_be_kept(memory: VisualMemory) -> None:
    for keep in (0, -3, timedelta(days=-1), True, "30d"):
        with pytest.raises(UsageError):
            memory.expire(keep)  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            memory.plan_expire(keep)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="can only be read"):
        VisualMemory(memory.uri, at=2).expire(1)
    assert kept(memory) == (1, 6)


def test_not_while_an_erasure_is_unfinished(memory: VisualMemory) -> None:
    memory.log.storage.replace("erasures/0123.json", b"{}")
    with pytest.raises(CommitConflict, match="begun and not finished.*verify --clean"):
        memory.expire(1)
    assert kept(memory) == (1, 6)


def names_only_what_is_there(log: VersionLog) -> None:
    there = log.storage.walk()
    for commit, state in log.states():
        named = {file for part in (state, *commit.actions) for file in file_refs(part) if file.num_bytes}
        assert {file.path for file in named} <= there.keys(), commit.version


@pytest.mark.parametrize("first", [1, 3])
def test_killed_at_any_moment(memory: VisualMemory, tmp_path: Path, first: int) -> None:
    """From a memory that has all versions, and from one that had dropped some before."""
    if first > 1:
        memory.expire(kept(memory)[1] - first + 1)
    states = {state.version: state for _, state in memory.log.states()}
    undisturbed = VisualMemory(shutil.copytree(memory.uri, tmp_path / "undisturbed"))
    undisturbed.expire(2)
    expected = undisturbed.log.storage.walk()
    for changes in range(100):
        root = shutil.copytree(memory.uri, tmp_path / f"killed-{changes}")
        dying = DyingStorage(root, changes)
        with contextlib.suppress(Died):
            expire(VersionLog(dying), 2, "expire")
        log = VersionLog(LocalStorage(root))
        assert log.latest() == states[6]
        assert {state.version: state for _, state in log.states()} == {n: states[n] for n in log.retained()}
        assert all(log.at(number) == states[number] for number in log.retained())
        assert VersionLog(LocalStorage(root)).retained()[0] <= 5
        names_only_what_is_there(log)
        bury(log.storage)
        expire(log, 2, "expire")
        assert log.storage.walk().keys() == expected.keys()
        assert VersionLog(LocalStorage(root)).at(5) == states[5]
        if not dying.died:
            break
    else:
        pytest.fail("it never came to an end")


def forget_one(log: VersionLog, base: State, entry_id: int) -> State:
    ids = np.array([entry_id], np.int64)

    def prepare(version: int, _: State) -> list[Forget]:
        return [Forget(tombstones=write_tombstones(log.storage, lease, version, ids), forgotten=1)]

    with Lease(log.storage, "test") as lease:
        return log.commit(base, "forget", prepare, lease)


@pytest.fixture(scope="module")
def long_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = VersionLog(LocalStorage(tmp_path_factory.mktemp("long")))
    state = State()
    for entry_id in range(120):
        state = forget_one(log, state, entry_id)
    return Path(log.storage.uri)


@pytest.fixture
def log(long_log: Path, tmp_path: Path) -> VersionLog:
    """120 versions, each of which forgot an id."""
    return VersionLog(LocalStorage(shutil.copytree(long_log, tmp_path / "long")))


def fresh(log: VersionLog) -> VersionLog:
    return VersionLog(LocalStorage(Path(log.storage.uri)))


@pytest.mark.parametrize("base", [1, 49, 50, 99, 109, 110])
def test_a_writer_whose_version_was_dropped_commits_the_newest(log: VersionLog, base: int) -> None:
    stale = fresh(log)
    state = stale.at(base)
    expire(log, 10, "expire")
    assert forget_one(stale, state, 1_000).version == 121
    assert fresh(log).retained() == range(111, 122)
    assert read_tombstones(log.storage, fresh(log).latest().tombstones).tolist() == [*range(120), 1_000]


def test_a_commit_left_in_a_gap_misleads_nobody(log: VersionLog) -> None:
    """A writer that was killed after it had taken a number which was free because it had been dropped."""
    stale, reader = fresh(log), fresh(log)
    state = stale.at(49)
    reader._known = state
    left = log.storage.read(commit_path(50))
    expire(log, 10, "expire")
    log.storage.create(commit_path(50), left)
    assert reader.latest().version == 120
    assert fresh(log).latest().version == 120
    assert fresh(log).retained() == range(111, 121)
    assert forget_one(stale, state, 1_000).version == 121
    expire(log, 10, "expire")
    assert not log.storage.exists(commit_path(50))


def test_a_writer_taken_for_dead_is_refused_when_that_version_was_dropped_too(log: VersionLog) -> None:
    state = log.latest()
    with Lease(log.storage, "slow", beat_seconds=1_000) as slow:
        bury(log.storage)
        expire(log, 100, "expire")  # breaks the lease
        for entry_id in range(500, 505):
            forget_one(log, log.latest(), entry_id)
        expire(log, 2, "expire")
        with pytest.raises(CommitConflict, match="taken for dead"):
            fresh(log).commit(state, "forget", lambda *_: [], slow)


def test_readers_follow_across_an_expiry(log: VersionLog) -> None:
    reader, pinned = fresh(log), VersionLog(LocalStorage(Path(log.storage.uri)))
    assert reader.latest().version == 120
    newest = forget_one(log, log.latest(), 500)
    expire(log, 1, "expire")
    assert reader.latest() == newest
    with pytest.raises(MemoryMissing, match="has no version 60: it goes from 121 to 121"):
        pinned.at(60)
    with pytest.raises(DamagedFile, match="is missing"):
        list(pinned.commits([60]))


class Shuffled(LocalStorage):
    """Deletes the paths of one call in any order, as a store does, and calls `between` after each."""

    def __init__(self, root: Path, between: Callable[[], None]) -> None:
        super().__init__(root)
        self._between = between
        self._generator = np.random.default_rng(3)
        self.calls: list[list[str]] = []

    def delete(self, paths: Iterable[str]) -> None:
        given = list(paths)
        self.calls.append(given)
        for at in self._generator.permutation(len(given)):
            super().delete([given[at]])
            self._between()


@pytest.mark.parametrize("keep", [*(pytest.param(keep, marks=pytest.mark.slow) for keep in (1, 25)), 10])
def test_while_a_group_is_deleted_in_any_order_nobody_is_misled(
    log: VersionLog, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    monkeypatch.setattr("pipeline.store.log.version_log.GROUP", 10)
    states = {version: fresh(log).at(version) for version in (1, 5, 44, 50, 51, 97, 99, 108, 119)}
    wrote: list[int] = []

    def between() -> None:
        newest = 120 + len(wrote)
        assert fresh(log).latest().version == newest
        for state in states.values():
            stale = fresh(log)
            stale._known, stale._known_nonce = state, None
            assert stale.latest().version == newest
        if len(storage.calls) % 3 == 0:
            state = states[[*states][len(wrote) % len(states)]]
            wrote.append(forget_one(fresh(log), state, 1_000 + len(wrote)).version)

    storage = Shuffled(Path(log.storage.uri), between)
    expire(VersionLog(storage), keep, "expire")
    assert wrote == [*range(121, 121 + len(wrote))]
    assert len(wrote) > 10
    assert fresh(log).retained() == range(121 - keep, 121 + len(wrote))
    forgotten = read_tombstones(log.storage, fresh(log).latest().tombstones).tolist()
    assert forgotten == [*range(120), *range(1_000, 1_000 + len(wrote))]
    commits = [len(call) for call in storage.calls if call and all(map(commit_number, call))]
    assert max(commits) == 9
    assert len(commits) <= 2 * 12


@pytest.mark.parametrize(
    ("newest", "groups"),
    [
        (3_000, [(998, 999), (1_000,), tuple(range(1_001, 1_005))]),
        (1_003, [(998, 999), (1_000,), (1_001,), (1_002,), (1_003,), (1_004,)]),
    ],
)
def test_groups_end_with_a_version_that_others_can_ask_for(newest: int, groups: list[tuple[int, ...]]) -> None:
    assert [tuple(group) for group in in_droppable_groups(range(998, 1_005), newest)] == groups


class Crowd:
    """Threads that all go on to their ends; what goes wrong in any of them is kept."""

    def __init__(self) -> None:
        self.failed: list[BaseException] = []
        self.ended = threading.Event()

    def started(self, *works: Callable[[], None]) -> list[threading.Thread]:
        threads = [threading.Thread(target=self._watched, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        return threads

    def repeated(self, work: Callable[[], None]) -> Callable[[], None]:
        def repeat() -> None:
            while not self.ended.is_set():
                work()

        return repeat

    def _watched(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.failed.append(error)


def test_beside_writers_and_readers_nothing_is_lost(log: VersionLog) -> None:
    crowd, following, seen = Crowd(), fresh(log), [0]

    def write(number: int) -> None:
        own = fresh(log)
        for i in range(40):
            try:
                forget_one(own, own.latest(), 1_000 * number + i)
            except CommitConflict as conflict:  # which loses nothing when it is run again, as it says
                assert "run the command again if it has not changed" in str(conflict)
                forget_one(own, own.latest(), 1_000 * number + i)

    def read() -> None:
        seen.append(following.latest().version)
        fresh(log).latest()

    drop = crowd.repeated(lambda: expire(fresh(log), 5, "expire") and None)
    others = crowd.started(crowd.repeated(read), drop, drop)
    for thread in crowd.started(lambda: write(1), lambda: write(2), lambda: write(3)):
        thread.join()
    crowd.ended.set()
    for thread in others:
        thread.join()
    assert crowd.failed == []
    assert seen == sorted(seen)
    state = fresh(log).latest()
    assert state.version >= 240
    wanted = {*range(120), *(1_000 * n + i for n in (1, 2, 3) for i in range(40))}
    assert set(read_tombstones(log.storage, state.tombstones).tolist()) == wanted


def test_an_add_that_was_interrupted_can_go_on(digits_memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    memory = VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "memory"))
    memory.forget(labels=["3"])
    killed = VisualMemory(memory.uri)
    killed.log = VersionLog(DyingStorage(Path(memory.uri), 6))
    with pytest.raises(Died):
        killed.add(digits / "ask")
    bury(memory.log.storage)  # type: ignore[arg-type]
    interrupted = {path for path in memory.log.storage.walk() if path.startswith("segments/00000002/")}
    assert interrupted
    memory.expire(1)
    assert interrupted <= memory.log.storage.walk().keys()
    assert not is_given_up(memory.log.storage, 2)
    assert memory.add(digits / "ask").segment == 2


def test_work_under_way_is_spared(memory: VisualMemory) -> None:
    storage = memory.log.storage
    images = pa.table(
        {
            "uri": ["/c/1.png"],
            "label": pa.array([None], pa.string()),
            "num_bytes": [1],
            "modified": pa.array([None], pa.timestamp("us", tz="UTC")),
        }
    )
    with Lease(storage, "add") as lease:
        spec = SegmentSpec(fingerprint="c", source="/c", dataset="c", identity=identity_of(8))
        reservation = reserve(storage, spec, images, lease=lease)
        memory.expire(1)
        assert storage.exists(reservation.plan.path)


def test_the_first_version_kept_is_not_taken_back(log: VersionLog) -> None:
    """Dropping all but the newest comes between a writer's commit and its look at what lies before it."""

    class Overtaken(LocalStorage):
        def create(self, path: str, data: bytes) -> None:
            super().create(path, data)
            if path.startswith("versions/"):
                expire(fresh(log), 1, "expire")

    writer = VersionLog(Overtaken(Path(log.storage.uri)))
    state = forget_one(writer, writer.latest(), 1_000)
    assert state.version == 121
    assert fresh(log).latest() == state
    assert log.storage.exists(state.tombstones[-1].path)


def test_what_was_dropped_before_its_writer_looked_keeps_its_files(log: VersionLog) -> None:
    """The writer is slow: others have built on its version, and an expiry has dropped it, before it knows it is in."""

    class Overtaken(LocalStorage):
        def create(self, path: str, data: bytes) -> None:
            super().create(path, data)
            if path == commit_path(121):
                forget_one(fresh(log), fresh(log).latest(), 500)
                expire(fresh(log), 1, "expire")

    writer = VersionLog(Overtaken(Path(log.storage.uri)))
    with pytest.raises(CommitConflict, match="cannot be told whether it counts"):
        forget_one(writer, writer.latest(), 1_000)
    assert read_tombstones(log.storage, fresh(log).latest().tombstones).tolist() == [*range(120), 500, 1_000]


def test_a_commit_among_dropped_versions_counts_for_nothing(log: VersionLog) -> None:
    """Between a writer's look at the newest version and its commit others commit, and an expiry frees its number."""

    class Overtaken(LocalStorage):
        def create(self, path: str, data: bytes) -> None:
            if path == commit_path(121):
                for entry_id in (500, 501):
                    forget_one(fresh(log), fresh(log).latest(), entry_id)
                expire(fresh(log), 1, "expire")
            super().create(path, data)

    writer = VersionLog(Overtaken(Path(log.storage.uri)))
    with pytest.raises(CommitConflict, match="cannot be told whether it counts"):
        forget_one(writer, writer.latest(), 1_000)
    assert fresh(log).latest().version == 122
    assert forget_one(writer, writer.latest(), 1_000).version == 123
    assert read_tombstones(log.storage, fresh(log).latest().tombstones).tolist() == [*range(120), 500, 501, 1_000]


def test_a_torn_listing_is_not_believed(log: VersionLog) -> None:
    """A folder listed while commits are made may show the later and lack the earlier."""

    class Torn(LocalStorage):
        torn = 0

        def list(self, folder: str) -> list[str]:
            names = super().list(folder)
            self.torn += folder == "versions"
            return [name for name in names if self.torn != 1 or name[:20] != f"{99:020d}"]

    reader = VersionLog(Torn(Path(log.storage.uri)))
    assert reader.retained() == range(1, 121)

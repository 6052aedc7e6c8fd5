"""Many processes that write at once: each commit is a version of its own, and none is lost."""

import multiprocessing
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.edits.forget import forget
from pipeline.index.search.live_entries import LiveEntries
from pipeline.store.checks.verify import verify
from pipeline.store.log.state import AddSegment, AddSingles, FoldSingles, Forget
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.interface import AlreadyExists, Storage
from pipeline.store.storage.local import LocalStorage
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.ids import first_id, rows_per_part, split_id
from tests.conftest import add_vectors
from tests.edits.given import add_given, vectors
from tests.store.seaweed import SeaweedFS

WRITERS, COMMITS = 16, 20
TO_FORGET = 1_000  # entries there before

# Forked from a process that has imported all this and talked to no store yet: its threads would not come along.
forking = multiprocessing.get_context("forkserver")
forking.set_forkserver_preload([__name__])


def id_before(row: int) -> int:
    """The id of one of the entries that were there before."""
    rows = rows_per_part(TO_FORGET)
    return first_id(1, row // rows) + row % rows


@dataclass(frozen=True)
class Wrote:
    """What a writer was told about one of its commits."""

    version: int
    added: tuple[str, ...] = ()
    forgotten: int | None = None


def write(uri: str, number: int, environment: dict[str, str], ready: Any, told: Any) -> None:
    """One writer: single adds, tombstones and segments in turn."""
    os.environ.update(environment)
    log = VersionLog(open_storage(uri))
    wrote = []
    ready.wait()
    for turn in range(COMMITS):
        name, before = f"w{number}-{turn}", log.newest()
        if turn % 5 == 4:
            state = add_vectors(log, vectors(3, seed=number), ["a", "b", None], name=name)
            wrote.append(Wrote(state.version, tuple(f"/{name}/{row}.png" for row in range(3))))
        elif turn % 5 in (1, 3) and before is not None:
            entry_id = id_before(number * COMMITS + turn)
            state, forgotten = forget(log, before, np.array([entry_id]), "forget")
            wrote.append(Wrote(state.version, forgotten=entry_id if forgotten else None))
        else:
            state, _ = add_given(log, vectors(2, seed=number), ["a", None], name)
            wrote.append(Wrote(state.version, tuple(f"/{name}/{row}.png" for row in range(2))))
    told.put(wrote)


def race(uri: str) -> list[Wrote]:
    """Sixteen writers at once; what they were told."""
    ready, told = forking.Barrier(WRITERS), forking.Queue()
    writers = [
        forking.Process(target=write, args=(uri, number, dict(os.environ), ready, told)) for number in range(WRITERS)
    ]
    for writer in writers:
        writer.start()
    wrote = [one for _ in writers for one in told.get(timeout=240)]
    for writer in writers:
        writer.join()
    assert {writer.exitcode for writer in writers} == {0}
    return wrote


def assert_nothing_lost(log: VersionLog, wrote: list[Wrote]) -> None:
    kept = list(log.retained())
    assert kept == list(range(1, kept[-1] + 1)), "numbers without a gap"
    commits = list(log.commits(kept))
    kinds = Counter(type(commit.actions[-1]) for commit in commits)
    assert len(wrote) == WRITERS * COMMITS
    assert kinds[AddSegment] == 1 + WRITERS * COMMITS // 5
    assert kinds[AddSingles] == WRITERS * COMMITS * 2 // 5
    assert kinds[Forget] == WRITERS * COMMITS * 2 // 5
    assert sum(kinds.values()) - kinds[FoldSingles] - 1 == len(wrote), "each commit is there once"
    assert len({commit.nonce for commit in commits}) == len(commits)
    assert len({one.version for one in wrote} | {1}) >= len(wrote), "no two were told the same version"
    state = log.latest()
    live = LiveEntries.open(log.storage, state)
    forgotten = {one.forgotten for one in wrote if one.forgotten is not None}
    assert len(forgotten) == kinds[Forget]
    expected = {uri for one in wrote for uri in one.added}
    expected |= {f"/before/{row}.png" for row in range(TO_FORGET) if id_before(row) not in forgotten}
    uris = [uri for block in live.blocks for uri in block.uris.filter(block.live_N).to_pylist()]
    assert Counter(uris) == Counter(expected)
    ids = np.concatenate([block.ids_N for block in live.blocks])
    assert len(np.unique(ids)) == len(ids) == state.num_entries
    assert len({split_id(int(i))[0] for i in ids}) == 1 + WRITERS * COMMITS // 5 + 1, "one segment of single adds"
    for number in kept[:: len(kept) // 7]:
        assert log.at(number).num_live == commits[number - 1].rows_after
    found = [f for f in verify(log).findings if f.severity == "damage" and not f.path.startswith("encoder/")]
    assert found == []


@pytest.mark.slow
def test_sixteen_processes_on_disk(tmp_path: Path) -> None:
    log = VersionLog(open_storage(str(tmp_path)))
    add_vectors(log, vectors(TO_FORGET), ["old"] * TO_FORGET, name="before")
    assert_nothing_lost(log, race(str(tmp_path)))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("versioned", [False, True])
def test_sixteen_processes_on_s3(s3: SeaweedFS, versioned: bool) -> None:
    uri = s3.uri(versioned=versioned)
    log = VersionLog(open_storage(uri))
    add_vectors(log, vectors(TO_FORGET), ["old"] * TO_FORGET, name="before")
    assert_nothing_lost(VersionLog(open_storage(uri)), race(uri))


class Forgetful(LocalStorage):
    """A store whose answer to every third commit is lost: asked again, as clients do, it says the name is taken."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.lost = 0
        self._commits = 0

    def create(self, path: str, data: bytes) -> None:
        super().create(path, data)
        if path.startswith("versions/"):
            self._commits += 1
            if self._commits % 3 == 0:
                self.lost += 1
                raise AlreadyExists(path)


def test_an_answer_that_was_lost(tmp_path: Path) -> None:
    storage: Storage = Forgetful(tmp_path)
    log, other = VersionLog(storage), VersionLog(open_storage(str(tmp_path)))
    given_out: list[int] = []
    for number in range(70):
        state, ids = add_given(log if number % 4 else other, vectors(1, seed=number), name=str(number))
        given_out += ids
        assert state.num_entries == number + 1
    assert isinstance(storage, Forgetful)
    assert storage.lost > 10
    live = LiveEntries.open(storage, log.latest())
    assert live.live_ids().tolist() == given_out == sorted(set(given_out))
    commits = list(log.commits(log.retained()))
    assert sum(isinstance(commit.actions[-1], AddSingles) for commit in commits) == 70
    state, forgotten = forget(log, log.latest(), np.array(given_out[:5]), "forget")
    assert (forgotten, state.num_live) == (5, 65)

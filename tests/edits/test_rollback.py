"""Rolling back: the answers of then, ids that are never used twice, and no one's work lost on the way."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.decisions.voting import VOTINGS
from pipeline.edits.forget import forget
from pipeline.errors import CommitConflict, MemoryMissing, UsageError
from pipeline.index.build.builder import build_index
from pipeline.index.build.plan import IndexOptions, plan_index
from pipeline.store.checks.garbage import remove_garbage, take_census
from pipeline.store.log.state import file_refs
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.local import LocalStorage
from tests.conftest import MakeMemory, add_vectors, unit

QUERIES = unit(np.random.default_rng(1).normal(size=(5, 8)))


@pytest.fixture
def memory(make_memory: MakeMemory) -> VisualMemory:
    return make_memory(unit(np.random.default_rng(0).normal(size=(60, 8))), ["cat", "dog", "eel"] * 20)


def answers(memory: VisualMemory) -> list:
    """Everything a memory says, but for the number of its version."""
    decided = [d.to_json() for v in VOTINGS for d in memory.classify(embeddings=QUERIES, k=15, voting=v, balance=0.5)]
    left_out = memory.evaluate_leave_one_out(ks=[5]).to_json()
    status = memory.status()
    return [{k: v for k, v in each.items() if k != "version"} for each in [*decided, left_out, status]]


def grown(memory: VisualMemory) -> list[list]:
    """Give the memory versions 2 to 6, each of another kind; what it said at 1 to 6."""
    said = [answers(memory)]
    ids = memory.live().live_ids()
    for change in (
        lambda: memory.forget(labels=["cat"]),
        lambda: memory.index(IndexOptions(key="IVF2,Flat")),
        lambda: add_vectors(memory.log, unit(np.random.default_rng(2).normal(size=(10, 8))), ["cat"] * 10, name="b"),
        lambda: memory.relabel(ids=[int(ids[1])], label="cat"),
        lambda: memory.index(IndexOptions(key="Flat", rebuild=True)),
    ):
        change()
        said.append(answers(memory))
    return said


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_it_answers_as_it_did_then(memory: VisualMemory, version: int) -> None:
    said = grown(memory)
    report = memory.rollback(version)
    assert (report.version, report.rolled_back_to, report.entries_before) == (7, version, 50)
    assert report.entries == [60, 40, 40, 50, 50][version - 1]
    assert answers(memory) == said[version - 1]  # through blocks that were opened for other versions
    assert answers(VisualMemory(memory.uri)) == said[version - 1]
    assert answers(VisualMemory(memory.uri, at=6)) == said[5]


def test_a_rollback_can_be_rolled_back(memory: VisualMemory) -> None:
    said = grown(memory)
    memory.rollback(2)
    memory.rollback(1)
    assert memory.rollback(7).version == 9
    assert answers(memory) == said[1]
    memory.rollback(6)
    assert answers(memory) == said[5]
    assert [state.retired for _, state in memory.log.states()] == [()] * 6 + [(2,)] * 3 + [()]
    assert [state.rewrites for _, state in memory.log.states()] == [0] * 6 + [1, 2, 3, 4]


def test_a_source_added_again_gets_new_ids(digits_memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    memory = VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "memory"))
    first = set(memory.live().live_ids().tolist())
    assert memory.add(digits / "ask").segment == 2
    taken = set(memory.live().live_ids().tolist()) - first
    memory.rollback(1)
    assert set(memory.live().live_ids().tolist()) == first
    again = memory.add(digits / "ask")
    assert (again.segment, again.entries, again.resumed) == (3, 50, 0)
    assert not taken & set(memory.live().live_ids().tolist())
    memory.rollback(2)
    assert set(memory.live().live_ids().tolist()) == first | taken
    assert memory.log.latest().retired == (3,)
    assert memory.add(digits / "ask").already == 2


def test_single_adds_get_new_ids(digits_memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    memory = VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "memory"))
    images = sorted((digits / "ask" / "3").iterdir())
    ids = memory.add_images(images[:2], labels=["3", "3"])
    ids += memory.add_images(images[2:4], labels=["3", "3"])
    memory.rollback(1)
    assert memory.status()["entries"] == 100
    later = memory.add_images(images[4:5], labels=["3"])
    assert not set(later) & set(ids)
    memory.rollback(2)
    assert set(memory.live().live_ids().tolist()) & {*ids, *later} == set(ids[:2])
    assert not set(memory.add_images(images[5:6], labels=["3"])) & {*ids, *later}


def test_versions_that_cannot_be_rolled_back_to(memory: VisualMemory) -> None:
    memory.forget(labels=["cat"])
    with pytest.raises(UsageError, match="version 2 is the newest one already: there is nothing to roll back"):
        memory.rollback(2)
    for version in (0, 3, -1):
        with pytest.raises(MemoryMissing, match=f"has no version {version}: it goes from 1 to 2"):
            memory.rollback(version)
    memory.expire(1)
    with pytest.raises(MemoryMissing, match="has no version 1: it goes from 2 to 2"):
        memory.rollback(1)
    with pytest.raises(UsageError, match="can only be read"):
        VisualMemory(memory.uri, at=2).rollback(2)
    assert memory.log.latest().version == 2


def test_not_while_an_erasure_is_unfinished(memory: VisualMemory) -> None:
    memory.forget(labels=["cat"])
    memory.log.storage.replace("erasures/0123.json", b"{}")
    with pytest.raises(CommitConflict, match="begun and not finished.*verify --clean"):
        memory.rollback(1)
    assert memory.log.latest().version == 2


class Meanwhile(LocalStorage):
    """A store in which something happens just before the first commit."""

    def __init__(self, root: Path, happens: Callable[[], object]) -> None:
        super().__init__(root)
        self._happens: Callable[[], object] | None = happens

    def create(self, path: str, data: bytes) -> None:
        if path.startswith("versions/") and self._happens is not None:
            happens, self._happens = self._happens, None
            happens()
        super().create(path, data)


def through(memory: VisualMemory, happens: Callable[[], object]) -> VisualMemory:
    other = VisualMemory(memory.uri)
    other.log = VersionLog(Meanwhile(Path(memory.uri), happens))
    return other


def test_whoever_commits_meanwhile_is_not_undone(memory: VisualMemory) -> None:
    memory.forget(labels=["cat"])
    with pytest.raises(CommitConflict, match="another writer has committed version 3 meanwhile"):
        through(memory, lambda: memory.forget(labels=["dog"])).rollback(1)
    assert memory.log.latest().version == 3
    assert memory.status()["entries"] == 20
    assert memory.log.storage.list("leases") == []


def test_a_version_dropped_meanwhile_keeps_its_files(memory: VisualMemory) -> None:
    """The version was there when it was decided on; an expiry drops it before the commit, and cleans up."""
    add_vectors(memory.log, unit(np.random.default_rng(2).normal(size=(10, 8))), ["cat"] * 10, name="b")
    memory.index(IndexOptions(key="Flat"))
    said = answers(memory)
    memory.forget(labels=["cat"])
    memory.rollback(1)
    memory.forget(labels=["eel"])

    def expiry() -> None:
        other = VisualMemory(memory.uri)
        other.expire(1)
        remove_garbage(other.log, take_census(other.log), "clean")

    report = through(memory, expiry).rollback(3)
    assert report.entries == 70
    named = {file.path for file in file_refs(memory.log.latest()) if file.num_bytes}
    assert named <= memory.log.storage.walk().keys()
    assert answers(VisualMemory(memory.uri)) == said


def test_work_prepared_before_does_not_fit_after(memory: VisualMemory) -> None:
    memory.forget(labels=["cat"])
    base = memory.log.latest()
    plan = plan_index(base, IndexOptions(key="Flat"))
    memory.rollback(1)
    with pytest.raises(CommitConflict, match="erased entries or rolled the memory back"):
        forget(VersionLog(memory.log.storage), base, np.array([1], np.int64), "forget")
    with pytest.raises(CommitConflict, match="erased entries or rolled the memory back"):
        build_index(VersionLog(memory.log.storage), base, plan, IndexOptions(key="Flat"), "index")
    assert memory.log.latest().version == 3
    add_vectors(memory.log, unit(np.random.default_rng(2).normal(size=(10, 8))), ["cat"] * 10, name="b")
    assert memory.status()["entries"] == 70


def test_after_expiry_what_was_rolled_away_is_gone_and_its_number_stays_taken(
    digits_memory: VisualMemory, digits: Path, tmp_path: Path
) -> None:
    memory = VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "memory"))
    memory.add(digits / "ask")
    memory.rollback(1)
    memory.expire(1)
    left = {path for path in memory.log.storage.walk() if path.startswith("segments/00000002/")}
    assert left == {"segments/00000002/given_up.json", "segments/00000002/segment.json"}
    assert memory.add(digits / "ask").segment == 3
    assert memory.status()["entries"] == 150

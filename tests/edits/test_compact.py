"""Compacting: fewer files, and nothing else that anybody could tell; whatever other writers do meanwhile."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.edits import compact as compacting
from pipeline.edits import singles
from pipeline.edits.add import AddOptions
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.errors import CommitConflict
from pipeline.index.build.plan import IndexOptions
from pipeline.progress import Progress
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.segments.reservations import reserve_for_singles
from pipeline.store.storage.local import LocalStorage
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.ids import split_id
from tests.conftest import ENCODER, IMAGE_SIZE, add_vectors
from tests.edits.given import add_given, vectors
from tests.edits.test_singles import assert_sound
from tests.store.seaweed import SeaweedFS

QUERIES = vectors(6, seed=99)
ENTRIES = 300 + 42 + 5 + 20 - 22


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VisualMemory:
    """Segments of several parts and of one, single adds in files and in commits, several files of each overlay."""
    monkeypatch.setattr(singles, "FOLD_EVERY", 7)
    memory = VisualMemory(tmp_path / "memory")
    labels = [f"l{row % 4}" for row in range(300)]
    add_vectors(memory.log, vectors(300), labels, dataset="large", name="large")
    for number in range(21):
        add_given(memory.log, vectors(2, seed=number), [None, "single"], name=f"single {number}")
    add_vectors(memory.log, vectors(5, seed=5), labels[:5], dataset="small", name="small")
    add_vectors(memory.log, vectors(20, seed=6), labels[:20], dataset="other", name="other")
    ids = memory.live().live_ids()
    memory.forget(ids=ids[:20].tolist())
    memory.relabel(ids=ids[30:40].tolist(), label="corrected")
    memory.relabel(ids=ids[35:45].tolist(), label="corrected again")
    memory.relabel(ids=ids[50:60].tolist(), label="even", label_set="parity")
    memory.relabel(label_set="parity", map={"l0": "even", "l1": "odd"})
    memory.forget(ids=ids[-2:].tolist())
    assert memory.state().pending
    return memory


def again(memory: VisualMemory) -> VisualMemory:
    return VisualMemory(memory.uri)


def answers(memory: VisualMemory) -> list:
    """All that is answered, but for the number of the version."""
    found: list = [memory.search(embeddings=QUERIES, k=500)]
    for label_set in (None, "parity"):
        decisions = memory.classify(embeddings=QUERIES, k=30, label_set=label_set)
        found += [(d.label, d.confidence, d.votes, d.neighbors) for d in decisions]
    live = memory.live()
    found.append(sorted(live.live_ids().tolist()))
    return found


def counts(memory: VisualMemory) -> dict:
    return {name: told for name, told in memory.status().items() if name != "version"}


def files(state: State) -> int:
    return len(state.entries_files()) + len(state.tombstones) + len(state.labels)


@pytest.mark.parametrize("key", [None, "Flat", "IVF4,Flat"])
def test_nobody_could_tell(memory: VisualMemory, key: str | None) -> None:
    if key:
        memory.index(IndexOptions(key=key, shard_rows=140, target_recall=0.1))
        for number in range(12):  # and fresh entries beside the shards
            add_given(memory.log, vectors(1, seed=200 + number), name=f"fresh {number}")
        add_vectors(memory.log, vectors(3, seed=8), ["l1"] * 3, name="fresh")
        memory.forget(ids=memory.live().live_ids()[5:6].tolist())
    before, state, told = counts(memory), memory.state(), answers(memory)
    report = memory.compact()
    after = memory.state()
    assert report.committed
    assert (report.files_before, report.files_after) == (files(state), files(after))
    assert files(after) < 0.7 * files(state)
    assert (after.pending, len(after.tombstones), len(after.labels)) == ((), 1, 1)
    for reader in (memory, again(memory)):
        assert answers(reader) == told
        assert counts(reader) == before
    if key:  # no file holds both what a shard covers and what it does not
        covers = [span for shard in after.index.shards for span in shard.covers]
        for file in after.entries_files():
            assert any(a <= file.first_id and file.last_id <= b for a, b in covers) or not any(
                a <= file.last_id and file.first_id <= b for a, b in covers
            )
    past = VisualMemory(memory.uri, at=state.version)
    assert counts(past) == before
    assert answers(past) == told
    assert_sound(memory)
    assert memory.verify().garbage_bytes == 0


def test_a_second_time_there_is_nothing_to_do(memory: VisualMemory) -> None:
    memory.compact()
    before = memory.state()
    report = memory.compact()
    assert (report.committed, report.version, report.files_before) == (False, before.version, report.files_after)
    assert memory.log.latest() == before
    assert not memory.log.storage.list("leases")


def test_ids_and_files_stay_in_order(memory: VisualMemory) -> None:
    memory.compact()
    compacted = memory.state().entries_files()
    numbers = [(split_id(file.first_id)[0], split_id(file.last_id)[0]) for file in compacted]
    assert numbers == [(1, 2), (3, 4)], "single adds, segment 2, go on: nothing after them shares a file with them"
    [entry_id] = add_given(memory.log, vectors(1, seed=70), name="later")[1]
    assert compacted[0].last_id < entry_id < compacted[1].first_id
    memory.compact()
    compacted = memory.state().entries_files()
    assert [(file.first_id >> 39, file.last_id >> 39) for file in compacted] == [(1, 2), (3, 4)]
    assert compacted[0].last_id == entry_id
    assert len(memory.live()) == ENTRIES + 1
    assert_sound(memory)


def test_large_files_stay_as_they_are(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compacting, "SMALL_ROWS", 50)
    monkeypatch.setattr(compacting, "PACK_ROWS", 60)
    before = [file for file in memory.state().entries_files() if file.rows >= 50]
    assert len(before) == 2  # parts of 128 rows; the third has 44
    memory.compact()
    after = memory.state().entries_files()
    assert [file for file in after if file in before] == before
    assert max(file.rows for file in after if file not in before) <= 60


def test_an_add_under_way_commits_between(memory: VisualMemory, digits: Path, weights: str, tmp_path: Path) -> None:
    """Its segment has a number between those of others that are committed before it."""
    options = {"encoder": ENCODER, "weights": weights, "weights_order": "positional", "image_size": IMAGE_SIZE}
    memory = VisualMemory(tmp_path / "real")
    memory.add(digits / "ask", **options)

    def others(moment: Progress) -> None:
        if moment.stage == "embedding" and moment.done == 0:
            other = again(memory)
            other.add(digits / "ask", dataset="later")
            other.compact()
            spans = [(f.first_id >> 39, f.last_id >> 39) for f in other.state().entries_files()]
            assert spans == [(1, 1), (3, 3)], "no file may span the segment to come"
            other.add(digits / "ask", dataset="later still")
            assert other.compact().committed
            held.append([(f.first_id >> 39, f.last_id >> 39) for f in other.state().entries_files()])

    held: list[list[tuple[int, int]]] = []
    report = memory.add(digits / "remember", on_progress=others)
    assert (report.segment, held) == (2, [[(1, 1), (3, 4)]])
    ids = [file.first_id >> 39 for file in memory.state().entries_files()]
    assert ids == [1, 2, 3]
    assert memory.compact().committed
    assert [(f.first_id >> 39, f.last_id >> 39) for f in memory.state().entries_files()] == [(1, 4)]
    assert memory.status()["entries"] == 250
    assert_sound(memory)


def test_a_number_that_single_adds_left_unused_is_no_barrier(memory: VisualMemory) -> None:
    for _ in range(2):
        number = reserve_for_singles(memory.log.storage)  # by a first single add that was killed
        add_vectors(memory.log, vectors(4, seed=number), ["l0"] * 4, name=f"s{number}")
    memory.compact()
    assert [(f.first_id >> 39, f.last_id >> 39) for f in memory.state().entries_files()] == [(1, 2), (3, 8)]
    assert_sound(memory)


Meanwhile = Callable[[VisualMemory], object]


@pytest.mark.parametrize(
    ("meanwhile", "packings"),
    [
        (lambda m: add_given(m.log, vectors(1, seed=300), name="meanwhile"), 1),
        (lambda m: add_vectors(m.log, vectors(9, seed=300), ["l3"] * 9, name="meanwhile"), 1),
        (lambda m: m.forget(ids=m.live().live_ids()[100:110].tolist()), 1),
        (lambda m: m.relabel(ids=m.live().live_ids()[100:110].tolist(), label="meanwhile"), 1),
        (lambda m: [add_given(m.log, vectors(1, seed=n), name=f"m{n}") for n in range(300, 320)], 2),  # folds
        (lambda m: m.index(IndexOptions(key="Flat")), 2),
        (lambda m: m.compact(), 2),
    ],
)
def test_other_writers_commit_meanwhile(
    memory: VisualMemory, monkeypatch: pytest.MonkeyPatch, meanwhile: Meanwhile, packings: int
) -> None:
    pack, packed = compacting._Packer.pack, []

    def pack_and_lose(self: compacting._Packer, state: State) -> None:
        pack(self, state)
        packed.append(state.version)
        if len(packed) == 1:
            meanwhile(again(memory))

    monkeypatch.setattr(compacting._Packer, "pack", pack_and_lose)
    report = again(memory).compact()
    assert report.version == memory.state().version
    assert len(packed) >= packings
    if packings == 1:
        assert len(packed) == 1, "what was packed before the race was lost is used after it"
    expected = answers(VisualMemory(memory.uri, at=report.version - 1))
    assert answers(memory) == expected
    assert memory.verify().garbage_bytes == 0, "what the loser wrote is gone"
    assert_sound(memory)
    ids = memory.live().live_ids().tolist()
    assert len(set(ids)) == len(ids) == memory.state().num_live


@pytest.mark.parametrize("change", ["erase", "rollback"])
def test_what_cannot_be_packed_any_more_is_said(
    memory: VisualMemory, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    pack = compacting._Packer.pack

    def pack_and_lose(self: compacting._Packer, state: State) -> None:
        pack(self, state)
        if change == "erase":
            again(memory).forget(ids=memory.live().live_ids()[:1].tolist(), erase=True)
        else:
            again(memory).rollback(memory.state().version - 1)

    monkeypatch.setattr(compacting._Packer, "pack", pack_and_lose)
    with pytest.raises(CommitConflict, match="erased entries or rolled the memory back"):
        again(memory).compact()
    monkeypatch.undo()
    assert memory.verify().garbage_bytes == 0
    assert again(memory).compact().committed
    assert_sound(memory)


def test_beside_a_writer_that_goes_on(memory: VisualMemory) -> None:
    ended = threading.Event()
    added: list[int] = []

    def write() -> None:
        log = VersionLog(open_storage(memory.uri))
        while not ended.is_set():
            added.extend(add_given(log, vectors(1, seed=len(added)), name=f"added {len(added)}")[1])
            time.sleep(0.02)  # an image takes that long to embed

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not added:
            time.sleep(0.01)
        report = again(memory).compact()
    finally:
        ended.set()
        writer.join()
    assert report.committed
    live = memory.live()
    assert set(added) <= set(live.live_ids().tolist())
    assert len(live) == ENTRIES + len(added)
    assert_sound(memory)


KILLED = """
import os, signal, sys
from pipeline import VisualMemory

def die(storage, path, data):
    if path.startswith("versions/"):
        os.kill(os.getpid(), signal.SIGKILL)

memory = VisualMemory(sys.argv[1])
type(memory.log.storage).create = die
memory.compact()
"""


def test_killed_it_leaves_garbage_only(memory: VisualMemory) -> None:
    before, told = memory.state(), answers(memory)
    done = subprocess.run([sys.executable, "-c", KILLED, memory.uri], check=False)
    assert done.returncode == -signal.SIGKILL
    assert again(memory).state() == before
    assert answers(again(memory)) == told
    found = memory.verify(clean=True)
    assert found.removed
    assert found.garbage_bytes == 0
    assert again(memory).compact().committed
    assert answers(again(memory)) == told
    assert_sound(memory)


def test_in_an_object_store(s3: SeaweedFS, memory: VisualMemory) -> None:
    there = s3.uri()
    memory.copy(there)
    told, before = answers(memory), memory.state()
    report = VisualMemory(there).compact()
    assert report.files_after < 0.6 * report.files_before
    assert answers(VisualMemory(there)) == told
    assert answers(VisualMemory(there, at=before.version)) == told
    assert not VisualMemory(there).compact().committed
    assert_sound(VisualMemory(there))


# What comes after


def test_then_index(memory: VisualMemory) -> None:
    told = answers(memory)
    memory.index(IndexOptions(key="Flat", shard_rows=100))
    memory.compact()
    memory.index(IndexOptions(key="Flat", rebuild=True))
    assert (memory.status()["shards"], memory.status()["fresh"]) == (1, 0)
    assert answers(memory) == told
    assert_sound(memory)


def test_then_expire(memory: VisualMemory) -> None:
    told = answers(memory)
    memory.compact()
    before = sum(memory.log.storage.walk("segments").values())
    memory.expire(1)
    assert sum(memory.log.storage.walk("segments").values()) < before
    assert answers(again(memory)) == told
    named = {file.path for file in memory.state().entries_files()}
    there = {path for path in memory.log.storage.walk() if path.split("/")[-2] in ("entries", "packs")}
    assert there == named
    assert_sound(memory)


@pytest.mark.parametrize("erase", [False, True])
def test_then_forget_what_was_packed(memory: VisualMemory, erase: bool) -> None:
    memory.compact()
    packed = memory.state().packs
    assert packed
    ids = memory.live().live_ids()
    gone = [int(i) for file in packed for i in ids[(ids >= file.first_id) & (ids <= file.last_id)][::9]]
    left = again(memory).live().live_ids()
    left = left[~np.isin(left, gone)]
    memory.forget(ids=gone, erase=erase)
    assert sorted(again(memory).live().live_ids().tolist()) == sorted(left.tolist())
    memory.compact()
    assert sorted(again(memory).live().live_ids().tolist()) == sorted(left.tolist())
    assert_sound(memory)


def test_packs_of_which_one_segment_is_left_are_packed_again(memory: VisualMemory) -> None:
    memory.compact()
    for number in (30, 31):
        add_vectors(memory.log, vectors(6, seed=number), ["l0"] * 6, name=f"s{number}")
        add_given(memory.log, vectors(1, seed=number), name=f"single {number}")
        memory.compact()
    live = memory.live().live_ids()
    for pack in memory.state().packs:
        others = live[(live >= pack.first_id) & (live <= pack.last_id) & (live >> 39 != pack.last_id >> 39)]
        memory.forget(ids=others.tolist(), erase=True)
    expected = sorted(memory.live().live_ids().tolist())
    memory.compact()
    assert sorted(again(memory).live().live_ids().tolist()) == expected
    assert_sound(memory)


def test_entries_of_real_images_are_explained_as_before(tmp_path: Path, digits: Path, weights: str) -> None:
    memory = VisualMemory(tmp_path / "memory")
    choice = EncoderChoice(ENCODER, weights, "positional", IMAGE_SIZE)
    memory.carry_out(memory.plan_add(digits / "ask", AddOptions(encoder=choice, thumbnails=True)))
    memory.add_images([next((digits / "remember/4").iterdir())], labels=["4"])
    image = next((digits / "remember/3").iterdir())
    before = memory.explanation_page(memory.classify([image], k=20)[0])
    memory.compact()
    assert memory.explanation_page(memory.classify([image], k=20)[0]) == before.replace("version 2", "version 3")


def test_files_erased_while_they_are_packed(memory: VisualMemory) -> None:
    """Another process erases an entry, and with it the file that was about to be read: that is no damage."""
    [erased, *_] = memory.live().matching(dataset="small").tolist()

    class Overtaken(LocalStorage):
        overtaken = False

        def local_path(self, path: str) -> Path:
            if "/entries/" in path and not self.overtaken:
                self.overtaken = True
                VisualMemory(self.root).forget(ids=[erased], erase=True)
            return super().local_path(path)

    with pytest.raises(CommitConflict, match="another writer removed files meanwhile"):
        compacting.compact(VersionLog(Overtaken(Path(memory.uri))))
    assert memory.verify(clean=True).findings == ()
    memory.compact()
    assert len(again(memory).live()) == len(memory.live())

"""Cleaning: garbage goes, whoever left it; what is named, held, or not ours stays; and every verb leaves no damage."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.edits.compact import compact
from pipeline.edits.singles import NewEntry, add_singles
from pipeline.errors import CommitConflict
from pipeline.index.build.plan import IndexOptions
from pipeline.store.checks.garbage import remove_garbage, take_census
from pipeline.store.checks.verify import Verification
from pipeline.store.layout import commit_path
from pipeline.store.log import single_adds, version_log
from pipeline.store.log.state import Forget, SetIndex
from pipeline.store.log.version_log import VersionLog
from pipeline.store.segments.reservations import reserved_numbers
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.local import LocalStorage
from pipeline.store.tables.tombstones import write_tombstones
from tests.conftest import MakeMemory, add_vectors, identity_of, unit
from tests.store.dying import bury
from tests.store.seaweed import SeaweedFS

BEAT_SECONDS = 0.2


@pytest.fixture
def memory(make_memory: MakeMemory) -> VisualMemory:
    made = make_memory(vectors(0, 200), ["cat", "dog"] * 100)
    made.index(IndexOptions(key="Flat"))
    made.forget(ids=made.live().live_ids()[:3].tolist())
    return made


def vectors(seed: int, rows: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(rows, 8)))


def teach(memory: VisualMemory, times: int) -> None:
    """Add one entry at a time, of vectors made up."""
    encoder = cast(Any, SimpleNamespace(identity=identity_of(8)))
    for number, vector in enumerate(vectors(memory.log.latest().version, times)):
        entry = NewEntry(f"/single/{number}.png", "single", "singles", vector.astype(np.float32), "0" * 64, 1, 1)
        add_singles(memory.log, memory.log.latest(), encoder, [entry], "add")


def put(memory: VisualMemory, path: str, data: bytes = b"planted") -> Path:
    target = Path(memory.uri) / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return target


def checked(memory: VisualMemory, *, clean: bool = False) -> Verification:
    return VisualMemory(memory.uri).verify(clean=clean)


def contents(memory: VisualMemory) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(Path(memory.uri).rglob("*")) if path.is_file()}


PLANTED = [
    "segments/00000001/entries/000000-zombie.parquet",
    "segments/00000001/plan/another.parquet",
    "index/000009-dead/shards/0/vectors.f16",
    "tombstones/00000000000000000009-lost.parquet",
    "labels/00000000000000000009-lost.map.parquet",
    "packs/lost.parquet",
    "encoder/other.safetensors",
    "erasures/never-committed.json",
    "leases/no-lease.json",
    "versions/00000000000000000001.checkpoint.json.old",
]


def test_garbage_is_waste_and_goes(memory: VisualMemory) -> None:
    before = contents(memory)
    planted = [put(memory, path) for path in PLANTED]
    report = checked(memory)
    assert report.sound
    assert {finding.path for finding in report.findings if finding.severity == "waste"} == set(PLANTED)
    assert report.garbage_bytes == sum(len(path.read_bytes()) for path in planted)
    assert all("--clean" in finding.advice for finding in report.findings)
    cleaned = checked(memory, clean=True)
    assert (cleaned.removed, cleaned.findings, cleaned.garbage_bytes) == (len(PLANTED), (), 0)
    assert contents(memory) == before
    assert checked(memory, clean=True).removed == 0


def test_what_is_not_a_memorys_is_left_alone(memory: VisualMemory) -> None:
    ours = [put(memory, "README.txt"), put(memory, "backup/versions/1.json"), put(memory, ".DS_Store")]
    report = checked(memory, clean=True)
    assert all(path.exists() for path in ours)
    assert report.sound
    assert {(f.severity, f.path) for f in report.findings} == {
        ("note", "README.txt"),
        ("note", "backup"),
        ("note", ".DS_Store"),
    }


def test_what_a_live_lease_holds_is_left_alone(memory: VisualMemory) -> None:
    with Lease(memory.log.storage, "try") as lease:
        lease.hold("packs/held/")
        held = [put(memory, f"tombstones/1-{lease.nonce}.parquet"), put(memory, "packs/held/a.parquet")]
        loose = put(memory, "packs/loose.parquet")
        report = checked(memory, clean=True)
        assert (report.removed, loose.exists()) == (1, False)
        assert all(path.exists() for path in held)
        [finding] = report.findings
        assert (finding.severity, finding.path) == ("note", f"leases/{lease.nonce}.json")
        assert "try" in finding.what
    assert {finding.severity for finding in checked(memory).findings} == {"waste"}
    assert checked(memory, clean=True).removed == 2


def test_damaged_files_that_are_named_stay(memory: VisualMemory) -> None:
    [file] = Path(memory.uri).glob("segments/00000001/entries/000000-*.parquet")
    file.write_bytes(file.read_bytes()[:-10])
    before = contents(memory)
    report = checked(memory, clean=True)
    assert not report.sound
    assert report.removed == 0
    assert contents(memory) == before


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("damage", ["gone", "altered"])
def test_nothing_goes_while_a_version_cannot_be_read(memory: VisualMemory, number: int, damage: str) -> None:
    path = Path(memory.uri) / commit_path(number)
    if damage == "gone" and number == 3:
        return  # nobody can tell that there was a newer one
    path.unlink() if damage == "gone" else path.write_bytes(b"{}")
    put(memory, "packs/loose.parquet")
    before = contents(memory)
    report = checked(memory, clean=True)
    assert (report.sound, report.removed) == (False, 0)
    assert commit_path(number) in {finding.path for finding in report.findings if finding.severity == "damage"}
    assert any("nothing was removed" in finding.what for finding in report.findings)
    assert contents(memory) == before


def test_an_older_memory_is_not_written(memory: VisualMemory) -> None:
    from pipeline.errors import UsageError

    with pytest.raises(UsageError, match="can only be read"):
        VisualMemory(memory.uri, at=1).verify(clean=True)
    assert VisualMemory(memory.uri, at=1).verify().sound


def start(code: str, *arguments: str) -> subprocess.Popen:
    """A process of its own that says "ready" and then waits to be killed."""
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


KILLED_ADD = """
import sys, time
import pyarrow as pa
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.local import LocalStorage
from pipeline.store.segments.reservations import SegmentSpec, reserve
from pathlib import Path
from tests.conftest import identity_of
storage = LocalStorage(Path(sys.argv[1]))
images = pa.table({
    "uri": ["/x.png"] * 3, "label": pa.array([None] * 3, pa.string()),
    "num_bytes": pa.array([1] * 3, pa.int64()), "modified": pa.array([None] * 3, pa.timestamp("us", tz="UTC")),
})
with Lease(storage, "add /x") as lease:
    spec = SegmentSpec(fingerprint="x", source="/x", dataset="x", identity=identity_of(8))
    reserve(storage, spec, images, lease=lease)
    with storage.publishing(f"packs/{lease.nonce}.parquet") as local:
        local.write_bytes(b"half")
        print("ready", flush=True)
        time.sleep(600)
"""


def test_what_a_killed_process_left_goes_and_its_number_stays_used(memory: VisualMemory) -> None:
    process = start(KILLED_ADD, memory.uri)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    number = reserved_numbers(memory.log.storage)[-1]
    running = contents(memory)
    report = checked(memory, clean=True)  # it is at work: nothing of it is touched
    assert report.removed == 0
    assert [finding.severity for finding in report.findings] == ["note"]
    assert contents(memory).keys() == running.keys()
    process.send_signal(signal.SIGKILL)
    process.wait()
    report = checked(memory)
    assert report.sound
    assert {finding.severity for finding in report.findings} == {"waste"}
    assert any(finding.path == f"segments/{number:08d}/" for finding in report.findings)
    assert any(finding.path.endswith(".aside") for finding in report.findings)
    report = checked(memory, clean=True)
    assert report.findings == ()
    assert report.removed >= 3
    assert not list(Path(memory.uri).rglob("*.aside")) + list(Path(memory.uri).rglob(".*.aside"))
    add_vectors(memory.log, vectors(3, 5), ["new"] * 5, name="after")
    assert memory.log.latest().segments[-1].number == number + 1
    assert checked(memory).findings == ()


def test_a_holder_that_cannot_be_seen_is_watched(memory: VisualMemory) -> None:
    """One on another machine lives as long as it counts on."""
    with Lease(memory.log.storage, "elsewhere", beat_seconds=BEAT_SECONDS) as lease:
        lease._record = lease._record.model_copy(
            update={"process": lease._record.process.model_copy(update={"host": "another"})}
        )
        time.sleep(2 * BEAT_SECONDS)
        held = put(memory, f"packs/{lease.nonce}.parquet")
        report = checked(memory, clean=True)
        assert held.exists()
        assert [finding.severity for finding in report.findings] == ["note"]
        left = lease._record
    memory.log.storage.replace(left.path, left.model_dump_json().encode())  # as if it had died without a word
    assert checked(memory, clean=True).removed == 2
    assert not held.exists()


def test_a_process_taken_for_dead_cannot_commit(memory: VisualMemory) -> None:
    storage = cast(LocalStorage, memory.log.storage)
    base = memory.log.latest()
    with Lease(storage, "forget", beat_seconds=600) as lease:
        ids = memory.live().live_ids()[:1]
        tombstones = write_tombstones(storage, lease, base.version + 1, ids)
        bury(storage)
        report = checked(memory, clean=True)
        assert report.findings == ()
        assert not storage.exists(tombstones.path)
        with pytest.raises(CommitConflict, match="taken for dead"):
            VersionLog(storage).commit(base, "forget", lambda *_: [Forget(tombstones=tombstones, forgotten=1)], lease)
    assert checked(memory).findings == ()


def test_a_hand_copied_memory_with_a_file_missing(memory: VisualMemory, tmp_path: Path) -> None:
    copy = shutil.copytree(memory.uri, tmp_path / "copy")
    [victim] = copy.glob("segments/00000001/entries/000001-*.parquet")
    victim.unlink()
    report = VisualMemory(copy).verify()
    assert [(f.path, f.what, f.advice) for f in report.findings] == [
        (str(victim.relative_to(copy)), "is missing", "restore it from a copy of the memory")
    ]
    shutil.copy(Path(memory.uri) / victim.relative_to(copy), victim)
    assert VisualMemory(copy).verify().findings == ()


def test_leftovers_beside_readers_of_the_census(memory: VisualMemory) -> None:
    """A file that comes to be named between looking and removing stays."""
    log = memory.log
    with Lease(log.storage, "forget") as lease:
        ids = memory.live().live_ids()[:1]
        tombstones = write_tombstones(log.storage, lease, log.latest().version + 1, ids)
        census = take_census(log)
        log.commit(log.latest(), "forget", lambda *_: [Forget(tombstones=tombstones, forgotten=1)], lease)
    assert remove_garbage(log, census, "verify --clean") == []
    assert checked(memory).findings == ()


@pytest.mark.parametrize("versioned", [False, True])
def test_in_an_object_store(s3: SeaweedFS, versioned: bool) -> None:
    memory = VisualMemory(s3.uri(versioned=versioned))
    add_vectors(memory.log, vectors(0, 200), ["cat", "dog"] * 100)
    memory.index(IndexOptions(key="IVF2,Flat", target_recall=0.1))
    memory.forget(labels=["dog"])
    assert checked(memory).findings == ()
    storage = memory.log.storage
    storage.replace("packs/loose.parquet", b"loose")
    storage.replace("notes.txt", b"mine")
    report = checked(memory, clean=True)
    assert (report.removed, [finding.path for finding in report.findings]) == (1, ["notes.txt"])
    state = memory.log.latest()
    assert state.index is not None
    for file in (state.segments[0].entries[1], state.index.shards[0].vectors, state.tombstones[0]):
        data = storage.read(file.path)
        for changed in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
            storage.replace(file.path, changed)
            assert [f.path for f in checked(memory).findings if f.severity == "damage"] == [file.path]
        storage.replace(file.path, data)
    storage.delete([commit_path(2)])
    assert [f.path for f in checked(memory, clean=True).findings if f.severity == "damage"] == [commit_path(2)]


# Whatever a verb does, what it leaves is sound.


def erased(memory: VisualMemory) -> None:
    memory.forget(ids=memory.live().live_ids()[[0, 5, 130]].tolist(), erase=True)


VERBS: dict[str, Callable[[VisualMemory], object]] = {
    "add": lambda memory: add_vectors(
        memory.log, vectors(2, 300), ["eel", None, "cat"] * 100, name=f"more {memory.log.latest().version}"
    ),
    "forget": lambda memory: memory.forget(labels=["dog"]),
    "erase": erased,
    "erase all": lambda memory: memory.forget(labels=["cat", "dog"], erase=True),
    "teach": lambda memory: teach(memory, 3),
    "teach and fold": lambda memory: teach(memory, single_adds.FOLD_EVERY + 2),
    "relabel": lambda memory: memory.relabel(ids=memory.live().live_ids()[:4].tolist(), label="x"),
    "label set": lambda memory: memory.relabel(label_set="s", map={"cat": "pet"}),
    "label in a set": lambda memory: memory.relabel(
        ids=memory.live().live_ids()[:1].tolist(), label="x", label_set="t"
    ),
    "index": lambda memory: memory.index(),
    "rebuild": lambda memory: memory.index(IndexOptions(key="IVF2,Flat", rebuild=True, target_recall=0.1)),
    "compact": lambda memory: compact(memory.log),
    "rollback": lambda memory: memory.rollback(max(memory.log.latest().version - 2, memory.log.retained()[0])),
    "expire": lambda memory: memory.expire(3),
}
HISTORIES = [
    *([verb] for verb in VERBS),
    ["teach and fold", "index", "erase", "compact", "index", "erase"],
    ["teach", "relabel", "label set", "label in a set", "erase", "erase all"],
    ["add", "teach and fold", "compact", "forget", "erase", "expire", "erase"],
    ["add", "rebuild", "erase", "rebuild", "erase", "compact", "expire"],
    ["add", "rollback", "erase", "teach", "rollback", "erase", "compact"],
    ["add", "compact", "add", "teach and fold", "index", "compact", "erase", "rollback", "expire"],
    ["rebuild", "teach and fold", "teach and fold", "index", "erase", "compact", "teach and fold", "erase"],
    ["add", "rebuild", "compact", "erase", "index", "erase", "compact"],
    ["forget", "teach", "compact", "teach and fold", "erase"],
    ["label in a set", "teach and fold", "rollback", "erase"],
    ["teach", "expire", "erase", "relabel", "expire", "erase", "compact"],
]


@pytest.mark.parametrize("history", HISTORIES, ids=", ".join)
def test_every_verb_leaves_a_sound_memory(
    memory: VisualMemory, history: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single_adds, "FILES_A_TIER", (1, 15))  # so that files are merged after few single adds
    monkeypatch.setattr(version_log, "CHECKPOINT_EVERY", 3)
    for verb in history:
        VERBS[verb](memory)
        report = checked(memory)
        assert [finding for finding in report.findings if finding.severity != "note"] == [], verb
        state = memory.log.latest()
        assert len(VisualMemory(memory.uri).live().live_ids()) == state.num_live, verb


def test_an_index_built_beside_a_fold_is_a_conflict(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_adds, "FILES_A_TIER", (1, 15))
    teach(memory, single_adds.FOLD_EVERY)
    base = memory.log.latest()
    grown = VisualMemory(shutil.copytree(memory.uri, f"{memory.uri}-grown"))
    grown.index()
    index = grown.log.latest().index
    assert index is not None
    teach(memory, single_adds.FOLD_EVERY)  # merges the file that the shard was built of with what came since
    with pytest.raises(CommitConflict, match="moved entries that were being indexed"):
        memory.log.commit(base, "index", lambda *_: [SetIndex(index=index, replaces=1, replaces_shards=1)])
    assert len(VisualMemory(memory.uri).live().live_ids()) == memory.log.latest().num_live

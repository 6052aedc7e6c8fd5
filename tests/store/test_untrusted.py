"""The files of a memory are read as those of somebody else: nothing outside is read, written or removed.

Each row of the table that an attack found is here with its variants: other fields, other files, other verbs, and links
in the place of folders and files.
"""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.edits.copy import CopyMarker
from pipeline.errors import DamagedFile, UsageError, VisualMemoryError
from pipeline.index.build.builder import _fingerprint
from pipeline.index.build.plan import IndexOptions, plan_index
from pipeline.store.layout import commit_path
from pipeline.store.log.state import SetState
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage import interface as storages
from pipeline.store.storage import leases, local
from pipeline.store.storage.beneath import is_inside
from pipeline.store.storage.file_cache import FileCache
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import LeaseRecord, live_leases, read_leases
from pipeline.store.storage.local import LocalStorage
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.storage.processes import Process
from tests.conftest import unit
from tests.store.planned import add_planned
from tests.store.seaweed import SeaweedFS
from tests.store.untrusted import Outside, rewritten, up_to

Verb = Callable[[VisualMemory], object]
SECONDS = 30


@pytest.fixture(autouse=True)
def nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A FIFO that is opened to be read waits for ever; and no lease elsewhere is watched for seconds."""
    monkeypatch.setattr(leases, "LONGEST_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(local, "_sync", lambda descriptor: None)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    found = Outside.at(tmp_path / "victim")
    yield found
    found.assert_untouched()


@pytest.fixture
def memory(tmp_path: Path) -> VisualMemory:
    made = VisualMemory(tmp_path / "memory")
    add_planned(made.log, unit(np.random.default_rng(0).normal(size=(200, 8))), ["cat", "dog"] * 100)
    made.index(IndexOptions(key="Flat"))
    made.forget(ids=made.live().live_ids()[:3].tolist())
    made.relabel(ids=made.live().live_ids()[:3].tolist(), label="fox")
    made.relabel(label_set="size", map={"cat": "small", "dog": "large"})
    return made


def verbs(tmp_path: Path) -> dict[str, Verb]:
    return {
        "status": lambda m: m.status(),
        "search": lambda m: m.search(embeddings=np.eye(8)[:1], k=3, label_set="size"),
        "verify": lambda m: m.verify(),
        "copy": lambda m: m.copy(tmp_path / "copies" / "copy"),
        "export": lambda m: m.export(tmp_path / "exports" / "export"),
        "index": lambda m: m.index(IndexOptions(key="Flat"), command="index --rebuild"),
        "compact": lambda m: m.compact(),
        "rollback": lambda m: m.rollback(2),
        "forget": lambda m: m.forget(ids=m.live().live_ids()[:1].tolist()),
        "expire": lambda m: m.expire(1),
        "clean": lambda m: m.verify(clean=True),
        "erase": lambda m: m.forget(labels=["cat"], erase=True),
        "clean again": lambda m: m.verify(clean=True),
    }


def do_all(memory: VisualMemory, tmp_path: Path) -> dict[str, str]:
    """Every verb one after the other, each as a process of its own would; what those that refuse say."""
    said = {}
    for name, verb in verbs(tmp_path).items():
        try:
            verb(VisualMemory(memory.uri))
        except VisualMemoryError as error:
            said[name] = str(error)
            assert not str(error).startswith("this should not happen")
    return said


def newest(memory: VisualMemory) -> Path:
    return Path(memory.uri) / commit_path(memory.log.latest().version)


# What a hostile memory holds, and what its victim runs


def test_a_lease_is_removed_under_its_own_name(memory: VisualMemory, outside: Outside, tmp_path: Path) -> None:
    """Its nonce used to be the path that was removed."""
    root = Path(memory.uri)
    victim = up_to(root / "leases", outside.folder / "precious")
    for number, nonce in enumerate((victim, str(outside.folder / "precious"), "", "0", "../versions/latest", "a" * 16)):
        said = {"nonce": nonce, "work": "x", "beat_seconds": 5.0}
        for host, process in (("elsewhere", "n"), (Process.this().host, Process.this().namespace)):
            who = {"host": host, "namespace": process, "pid": 4_000_000, "started": "1"}
            path = root / f"leases/{number}{len(host)}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(said | {"process": who, "holds": ["", "segments/"]}))
    assert read_leases(memory.log.storage) == []
    assert memory.verify(clean=True).removed
    assert memory.verify().findings == ()
    assert not (root / "leases").exists()


@pytest.mark.parametrize(
    "said",
    [
        {"process": {"pid": 10**30}},
        {"process": {"pid": -1}},
        {"process": {"pid": 0}},
        {"beat_seconds": -1},
        {"beat_seconds": 0},
        {"beat_seconds": "nan"},
        {"beat": -(10**30)},
        {"holds": [None]},
        {"nonce": "F" * 16},
        {"nonce": "0" * 17},
    ],
)
def test_what_is_no_lease_is_none(memory: VisualMemory, said: dict[str, Any]) -> None:
    process = Process.this().model_dump() | said.pop("process", {})
    record = {"nonce": "0" * 16, "work": "x", "process": process, "beat_seconds": 5.0} | said
    path = Path(memory.uri) / "leases/0000000000000000.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))
    assert read_leases(memory.log.storage) == []
    assert memory.status()["version"]


def test_a_lease_that_says_it_beats_once_a_year_is_not_waited_for(memory: VisualMemory) -> None:
    process = Process(host="elsewhere", namespace="n", pid=1, started="1")
    record = LeaseRecord(nonce="0" * 16, work="x", process=process, beat_seconds=3e7)
    fast = LeaseRecord(nonce="1" * 16, work="x", process=process, beat_seconds=1e-300)
    for each in (record, fast):
        memory.log.storage.replace(each.path, each.model_dump_json().encode())
    assert live_leases(memory.log.storage, read_leases(memory.log.storage)) == []


PATHS = [
    "../victim/id_rsa",
    "{outside}/id_rsa",
    "segments/../../victim/id_rsa",
    "segments//00000001/x",
    "./segments/x",
    "segments/x/",
    "segments\\..\\..\\victim\\id_rsa",
    "segments/x\0y",
    "segments/x\ny",
    "segments/\ud800",
    "",
    ".",
    "..",
    "segments",
    "leases/0.json",
    "versions/00000000000000000001.json",
    "erasures/x.json",
    "other/folder",
    "segments/" + "x" * 300,
    "segments/" + "x/" * 2_000 + "x",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_version_names_what_is_outside(memory: VisualMemory, outside: Outside, tmp_path: Path, path: str) -> None:
    path = path.replace("{outside}", str(outside.folder))

    def change(document: dict[str, Any]) -> None:
        [action] = document["actions"]
        action["label_set"]["map"]["path"] = path

    rewritten(newest(memory), change)
    with pytest.raises(DamagedFile, match="is not a whole version file: restore it from a copy"):
        VisualMemory(memory.uri).status()
    assert not VisualMemory(memory.uri).verify().sound
    said = do_all(memory, tmp_path)
    assert {"search", "copy", "erase"} <= said.keys()


HASHES = ["{outside}/id_rsa", "../../victim/id_rsa", "", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n", 7, None]


@pytest.mark.parametrize("sha256", HASHES)
def test_no_hash_is_a_path(memory: VisualMemory, outside: Outside, tmp_path: Path, sha256: object) -> None:
    said = sha256.replace("{outside}", str(outside.folder)) if isinstance(sha256, str) else sha256

    def change(document: dict[str, Any]) -> None:
        document["actions"][0]["label_set"]["map"]["sha256"] = said

    rewritten(newest(memory), change)
    with pytest.raises(DamagedFile, match="is not a whole version file"):
        VisualMemory(memory.uri).status()
    unchecked = FileRef.model_construct(path="labels/x", rows=0, num_bytes=1, sha256=said)
    if isinstance(said, str):
        with pytest.raises(DamagedFile, match="which is none"):
            FileCache(tmp_path / "cache", 1_000).get(memory.log.storage, unchecked)


NUMBERS = [-1, 10**30, 2**63, 1 << 53 | 1 << 54, 1.5, "1e400", True, None, [], {}]


@pytest.mark.parametrize("number", [number for number in NUMBERS if number is not True])  # which is read as 1
@pytest.mark.parametrize("name", ["num_bytes", "rows"])
def test_absurd_numbers(memory: VisualMemory, tmp_path: Path, name: str, number: object) -> None:
    def change(document: dict[str, Any]) -> None:
        document["actions"][0]["label_set"]["map"][name] = number

    rewritten(newest(memory), change)
    with pytest.raises(DamagedFile, match="is not a whole version file"):
        VisualMemory(memory.uri).status()
    do_all(memory, tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 200_000 + b"]" * 200_000,
        b'{"format": 1, "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"format": 1, "version": ' + b"9" * 100_000 + b"}",
        b'{"format": ' + b"9" * 100_000 + b"}",
        b'{"format": 1, "format": 1}',
        b'{"format": [1]}',
        b"\xff\xfe",
        b"",
        b"null",
        b'{"format": 1, "actions": [' + b"{}," * 100_000 + b"{}]}",
    ],
)
def test_bombs(memory: VisualMemory, tmp_path: Path, data: bytes) -> None:
    root = Path(memory.uri)
    newest(memory).write_bytes(data)
    with pytest.raises(DamagedFile, match="is not a whole version file"):
        VisualMemory(memory.uri).status()
    for path in ("leases/0000000000000000.json", "erasures/0000000000000000.json", "segments/00000001/segment.json"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(data)
    (root / "versions/latest").write_bytes(data)
    do_all(memory, tmp_path)


@pytest.mark.parametrize("number", ["99999999999999999999", "00009007199254740993", "٣" * 20])
def test_a_version_beyond_all_is_none(memory: VisualMemory, number: str) -> None:
    before = memory.status()
    shutil.copy(newest(memory), newest(memory).with_name(f"{number}.json"))
    shutil.copy(newest(memory), newest(memory).with_name(f"{number}.checkpoint.json"))
    assert VisualMemory(memory.uri).status() == before
    assert VisualMemory(memory.uri).verify(clean=True).removed == 2
    assert VisualMemory(memory.uri).verify().findings == ()


@pytest.mark.parametrize("path", ["versions/{newest}", "versions/latest", "leases/0000000000000000.json"])
def test_a_file_made_to_be_huge_is_not_read(memory: VisualMemory, tmp_path: Path, path: str) -> None:
    target = Path(memory.uri) / path.format(newest=newest(memory).name)
    target.parent.mkdir(exist_ok=True)
    with target.open("wb") as stream:
        stream.truncate(10 << 30)  # sparse
    if "newest" in path:
        with pytest.raises(DamagedFile, match="has 10,737,418,240 bytes, more than such a file can have"):
            VisualMemory(memory.uri).status()
    do_all(memory, tmp_path)


# Links, and what is no file


def test_a_link_in_the_place_of_the_marks(memory: VisualMemory, outside: Outside) -> None:
    """An erasure removes the marks of the segments it touches: it used to remove all that such a link led to."""
    done = Path(memory.uri) / "segments/00000001/done"
    shutil.rmtree(done)
    done.symlink_to(outside.folder / "done")
    with pytest.raises(DamagedFile, match="done in the memory at .* is a link, and none is followed"):
        memory.forget(labels=["cat"], erase=True)
    outside.assert_untouched()
    done.unlink()  # the way out, and the erasure is finished
    VisualMemory(memory.uri).verify(clean=True)
    assert VisualMemory(memory.uri).verify().findings == ()


FOLDERS = ["versions", "segments", "segments/00000001", "segments/00000001/entries", "segments/00000001/done", "index"]
FOLDERS += ["labels", "tombstones", "leases", "erasures", "encoder", "packs"]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("kind", ["copy", "outside", "dangling", "loop", "root"])
def test_a_link_in_the_place_of_a_folder(
    memory: VisualMemory, outside: Outside, tmp_path: Path, folder: str, kind: str
) -> None:
    place = Path(memory.uri) / folder
    elsewhere = tmp_path / "elsewhere"
    if place.is_dir():
        shutil.copytree(place, elsewhere)
        shutil.rmtree(place)
    else:
        elsewhere.mkdir()
        (elsewhere / "0000000000000000.json").write_text("{}")
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    leads_to = {"copy": elsewhere, "outside": outside.folder, "dangling": tmp_path / "none", "loop": place, "root": "/"}
    place.symlink_to(leads_to[kind])
    do_all(memory, tmp_path)
    assert place.is_symlink()
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "none").exists()
    try:
        found = VisualMemory(memory.uri).verify().findings
    except VisualMemoryError as error:
        assert "is a link" in str(error)
    else:
        assert any(finding.path == folder and "is a link" in finding.what for finding in found)


def other_than_files(path: Path, kind: str, outside: Outside) -> None:
    if kind == "link":
        path.symlink_to(outside.folder / "id_rsa")
    elif kind == "copy":
        path.symlink_to(path.with_name("aside"))
    elif kind == "dangling":
        path.symlink_to(outside.folder / "nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        made = socket.socket(socket.AF_UNIX)
        before = Path.cwd()
        os.chdir(path.parent)  # whose path may be longer than a socket's may be
        made.bind(path.name)
        os.chdir(before)
        made.close()
    else:
        path.mkdir()


FILES = ["versions/[0-9]*.json", "versions/latest", "versions/rollup", "segments/*/segment.json"]
FILES += ["segments/*/done/*", "segments/*/plan/*", "segments/*/entries/*", "index/*/shards/0/ids.npy"]
FILES += ["index/*/shards/0/vectors.f16", "encoder/*"]
FILES += ["index/*/shards/0/entries.arrow", "tombstones/*", "labels/*", "leases/0000000000000000.json"]
FILES += ["erasures/0000000000000000.json"]


@pytest.mark.parametrize("kind", ["link", "copy", "dangling", "device", "fifo", "socket", "folder"])
@pytest.mark.parametrize("pattern", FILES)
def test_what_is_no_file(memory: VisualMemory, outside: Outside, tmp_path: Path, pattern: str, kind: str) -> None:
    """It is told as damage where a file is needed, waited for by nobody, and what it leads to stays."""
    root = Path(memory.uri)
    found = sorted(root.glob(pattern)) or [root / pattern]
    place = found[-1]
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        place.rename(place.with_name("aside"))
    other_than_files(place, kind, outside)
    said = do_all(memory, tmp_path)
    assert "CANARY" not in str(said)
    for tree in (tmp_path / "copies", tmp_path / "exports", root):
        for path in tree.rglob("*"):
            if stat.S_ISREG(path.lstat().st_mode):
                assert b"CANARY" not in path.read_bytes()
    if not any(needless in pattern for needless in ("leases", "latest", "rollup", "done")):
        assert said


def test_hard_links_lose_a_name_and_nothing_else(memory: VisualMemory, tmp_path: Path) -> None:
    """What has another name elsewhere is never written in place."""
    root, elsewhere = Path(memory.uri), tmp_path / "elsewhere"
    before = {}
    for path in [path for path in root.rglob("*") if path.is_file()]:
        other = elsewhere / path.relative_to(root)
        other.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, other)
        before[other] = other.read_bytes()
    said = do_all(memory, tmp_path)
    assert "erase" not in said
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before


def test_a_memory_may_itself_be_reached_by_a_link(memory: VisualMemory, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(memory.uri)
    linked = VisualMemory(tmp_path / "linked")
    said = do_all(linked, tmp_path)
    assert said == {} or set(said) <= {"rollback"}
    assert VisualMemory(memory.uri).verify().findings == ()


def test_what_is_not_a_memorys_is_named_and_left(memory: VisualMemory, outside: Outside) -> None:
    root = Path(memory.uri)
    (root / "mine").symlink_to(outside.folder)
    (root / "segments/mine").symlink_to(outside.folder / "id_rsa")
    os.mkfifo(root / "leases.fifo")
    report = memory.verify(clean=True)
    assert report.sound
    told = {(finding.path, finding.what) for finding in report.findings if finding.severity == "note"}
    assert ("mine", "is a link, which is not a memory's") in told
    assert ("segments/mine", "is a link, which is not a memory's") in told
    assert ("leases.fifo", "is a FIFO, which is not a memory's") in told
    assert (root / "mine").is_symlink()
    assert (root / "segments/mine").is_symlink()


def test_a_thousand_folders_in_each_other(memory: VisualMemory) -> None:
    deep = Path(memory.uri) / "index"
    descriptor = os.open(deep, os.O_RDONLY)
    for _ in range(1_500):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    try:
        assert memory.verify(clean=True).sound
        assert memory.status()["version"]
    finally:
        subprocess.run(["rm", "-rf", deep / "d"], check=True)  # shutil's own does not go so deep


# Marks, plans and reservations


@pytest.mark.parametrize(
    "path", ["../../../victim/id_rsa", "{outside}/id_rsa", "labels/x", "segments/00000002/entries/x"]
)
def test_a_mark_names_files_of_its_own_segment(
    memory: VisualMemory, outside: Outside, path: str, tmp_path: Path
) -> None:
    path = path.replace("{outside}", str(outside.folder))
    [first, *_] = sorted((Path(memory.uri) / "segments/00000001/done").iterdir())
    rewritten(first, lambda document: document["entries"].update(path=path))
    (Path(memory.uri) / "segments/00000001/done/no mark.json").write_text("{}")
    (Path(memory.uri) / "segments/00000001/done/१.json").write_text("{}")
    do_all(memory, tmp_path)


@pytest.mark.parametrize(
    "path", ["../victim/id_rsa", "{outside}/id_rsa", "segments/00000001/entries", "versions/latest"]
)
def test_the_marks_of_an_index(memory: VisualMemory, outside: Outside, path: str, tmp_path: Path) -> None:
    """A build that is given up removes what its marks name."""
    path = path.replace("{outside}", str(outside.folder))
    file = {"path": path, "rows": 1, "num_bytes": 1, "sha256": "0" * 64}
    side = {"ids": file, "labels": file, "vectors": file, "entries": file}
    made = VisualMemory(memory.uri)
    options = IndexOptions(key="Flat", rebuild=True)
    state = made.log.latest()
    marks = Path(memory.uri) / f"index/begun-{_fingerprint(state, plan_index(state, options), options)[:16]}"
    marks.mkdir()
    (marks / "begun.json").write_text(json.dumps({"generation": -5, "work": "../../victim"}))
    (marks / "gathered-0.json").write_text(json.dumps({"side": side, "sample": file}))
    (marks / "trained.json").write_text(
        json.dumps({"key": "Flat", "index": file, "centroid_distance": None, "candidates": file})
    )
    before = {path.name for path in (Path(memory.uri) / "segments/00000001/entries").iterdir()}
    made.index(options)
    assert {path.name for path in (Path(memory.uri) / "segments/00000001/entries").iterdir()} == before
    assert VisualMemory(memory.uri).verify(clean=True).sound


@pytest.mark.parametrize(
    "said",
    [
        {"nonce": "../../victim/precious"},
        {"nonce": "1" * 16},
        {"files": {"../victim/id_rsa": {"by": None, "ids": [1]}}},
        {"files": {"segments/x/y": {"by": None, "ids": [-1]}}},
        {"files": {"segments/x": {"by": {"path": "leases/x", "num_bytes": 1, "sha256": "0" * 64}, "ids": []}}},
        {"shards": {"{outside}": None}},
        {"stale": ["../victim"]},
        {"ids": [10**30]},
    ],
)
def test_the_plan_of_an_erasure(memory: VisualMemory, outside: Outside, said: dict[str, Any], tmp_path: Path) -> None:
    nonce = "0" * 16
    state = memory.log.latest()
    erased = state.model_copy(update={"erasures": (nonce,), "rewrites": state.rewrites + 1})
    memory.log.commit(state, "erase", lambda *_: [SetState(why="erase", state=erased)])
    plan = {"nonce": nonce, "ids": [], "uris": [], "files": {}, "shards": {}, "stale": []} | said
    path = Path(memory.uri) / f"erasures/{nonce}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(plan))
    with pytest.raises(DamagedFile, match="is not a whole plan of an erasure: remove it, and erase again"):
        VisualMemory(memory.uri).verify(clean=True)
    path.unlink()
    assert VisualMemory(memory.uri).verify(clean=True).sound


RESERVATIONS: list[dict[str, Any]] = [
    {"number": -1},
    {"number": 10**30},
    {"number": 1 << 24},
    {"rows_per_part": 0},
    {"planned": 10**15},
    {"num_containers": 1 << 20},
    {"plan": {"path": "../../victim/id_rsa", "num_bytes": 1, "sha256": "0" * 64}},
    {"plan": {"path": "segments/00000001/plan/x", "num_bytes": 1, "sha256": "0" * 64}},
    {"held": {"path": "/etc/passwd", "num_bytes": 1, "sha256": "0" * 64}},
    {"fingerprint": None},
]


@pytest.mark.parametrize("said", RESERVATIONS)
def test_what_a_segment_was_reserved_for(memory: VisualMemory, outside: Outside, said: dict, tmp_path: Path) -> None:
    root = Path(memory.uri)
    document = json.loads((root / "segments/00000001/segment.json").read_bytes()) | {"number": 7, "plan": None}
    (root / "segments/00000007").mkdir()
    (root / "segments/00000007/segment.json").write_text(json.dumps(document | said))
    for name in ("99999999", "00000000", "\uff10" * 8, "\u00b2", "x"):
        (root / "segments" / name).mkdir()
    assert VisualMemory(memory.uri).status()["under_way"] == []
    do_all(memory, tmp_path)


# The door itself


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return LocalStorage(tmp_path / "victim" / "memory")
    s3: SeaweedFS = request.getfixturevalue("s3")
    return open_storage(s3.uri())


OUTSIDE = [
    "../id_rsa",
    "/etc/passwd",
    "a/../../id_rsa",
    "a//b",
    "./a",
    "a/.",
    "a/..",
    "\ud800",
    "a\0",
    "a/" * 3_000 + "a",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_path_leads_out_of_a_storage(storage: Storage, outside: Outside, path: str) -> None:
    storage.create("there", b"x")
    asked: list[Callable[[], object]] = [
        lambda: storage.read(path),
        lambda: storage.read_range(path, 0, 1),
        lambda: storage.create(path, b"x"),
        lambda: storage.replace(path, b"x"),
        lambda: storage.publishing(path).__enter__(),
        lambda: storage.local_path(path),
        lambda: storage.list(path),
        lambda: storage.walk(path),
        lambda: storage.exists(path),
        lambda: storage.delete([path]),
        lambda: storage.remove_folder(path),
    ]
    for ask in asked:
        with pytest.raises(DamagedFile, match="which is no path inside of it"):
            ask()
    assert storage.read("there") == b"x"
    if isinstance(storage, LocalStorage):
        shutil.rmtree(storage.root)
        os.utime(outside.folder, ns=(0, outside.before[str(outside.folder)][1]))  # type: ignore[index]


def test_what_is_inside() -> None:
    assert all(is_inside(path) for path in ("a", "a/b", "...", "a..b/c", "a\\b", " ", "é", "a\n"))
    assert not any(is_inside(path) for path in ("", *OUTSIDE, "a/" + "x" * 256))


def test_a_key_that_leads_out_is_left_alone(s3: SeaweedFS) -> None:
    uri = s3.uri()
    storage = open_storage(uri)
    storage.create("segments/a", b"x")
    assert storage.walk() == {"segments/a": 1}
    with pytest.raises(DamagedFile, match="no path inside"):
        storage.delete(["segments/../../other"])


def test_what_is_read_of_an_object_is_bounded(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(s3.uri())
    storage.create("versions/1", b"x" * 100)
    storage.create("versions/2", b"")
    monkeypatch.setitem(storages.MOST_BYTES, "versions", 10)
    with pytest.raises(DamagedFile, match="more than such a file can have"):
        storage.read("versions/1")
    assert storage.read("versions/2") == b""


def test_a_copy_goes_nowhere_else(memory: VisualMemory, outside: Outside, tmp_path: Path) -> None:
    """A target that holds a link, put there after the copy was begun."""
    target = tmp_path / "copy"
    target.mkdir()
    marker = CopyMarker(source=str(memory.uri), version=memory.log.latest().version)
    (target / "copying.json").write_text(marker.model_dump_json())
    (target / "segments").symlink_to(outside.folder)
    with pytest.raises(DamagedFile, match="segments in the memory at .* is a link"):
        memory.copy(target)


def test_a_path_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"caf\\udce9 is no UTF-8"):
        VisualMemory(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))


def test_the_newest_version_may_be_a_fifo(memory: VisualMemory) -> None:
    path = newest(memory)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedFile, match="is a FIFO, which does not belong there"):
        VersionLog(LocalStorage(Path(memory.uri))).latest()

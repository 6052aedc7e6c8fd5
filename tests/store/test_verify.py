"""Verification: a sound memory gives no finding, and every change to any file of it gives one that names the file."""

import json
import pickle
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.edits.singles import NewEntry, add_singles
from pipeline.errors import DamagedFile
from pipeline.index.build.plan import IndexOptions
from pipeline.index.verify import verify_faiss
from pipeline.progress import Progress
from pipeline.steps import Step
from pipeline.store.checks import verify_steps
from pipeline.store.checks.findings import Finding
from pipeline.store.checks.verify import verify
from pipeline.store.layout import HINT, checkpoint_path, commit_path, segment_folder
from pipeline.store.log.rollups import CHECKPOINT_EVERY
from pipeline.store.log.state import file_refs
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.file_refs import FileRef
from tests.conftest import ENCODER, IMAGE_SIZE, MakeMemory, unit
from tests.images.pictures import write_assortment

SINGLES = 66  # more than are folded into one file


@pytest.fixture(scope="module")
def everything(digits: Path, weights: str, tmp_path_factory: pytest.TempPathFactory) -> VisualMemory:
    """A memory with every kind of file in it, and more versions than lie between two checkpoints."""
    root = tmp_path_factory.mktemp("everything")
    write_assortment(root / "photos")
    memory = VisualMemory(root / "memory")
    memory.add(digits / "remember", encoder=ENCODER, weights=weights, weights_order="positional", image_size=IMAGE_SIZE)
    assert memory.add(root / "photos", thumbnails=True).rejected
    memory.index(IndexOptions(key="IVF4,Flat", shard_rows=50, target_recall=0.1))
    memory.relabel(ids=memory.live().live_ids()[:3].tolist(), label="other")
    memory.relabel(ids=memory.live().live_ids()[:2].tolist(), label="even", label_set="parity")
    memory.relabel(label_set="parity", map={"1": "odd", "3": "odd", "2": "even"})
    teach(memory, SINGLES)
    memory.forget(ids=memory.live().live_ids()[[0, 101, 120]].tolist())
    memory.index(IndexOptions(target_recall=0.1))
    teach(memory, 5)
    while memory.log.latest().version < CHECKPOINT_EVERY + 3:
        memory.forget(ids=[int(memory.live().live_ids()[0])])
    return memory


def teach(memory: VisualMemory, times: int) -> None:
    """Add one entry at a time, of vectors made up."""
    encoder = memory.encoder()
    generator = np.random.default_rng(memory.log.latest().version)
    for number in range(times):
        vector_D = unit(generator.normal(size=(1, encoder.identity.dimension)))[0].astype(np.float32)
        entry = NewEntry(f"/single/{number}.png", "single", "singles", vector_D, "0" * 64, 1, 1)
        add_singles(memory.log, memory.log.latest(), encoder, [entry], "add")


@pytest.fixture
def memory(everything: VisualMemory, tmp_path: Path) -> VisualMemory:
    return VisualMemory(shutil.copytree(everything.uri, tmp_path / "memory"))


def damaged(memory: VisualMemory | str) -> list[Finding]:
    report = VisualMemory(memory if isinstance(memory, str) else memory.uri).verify()
    assert report.sound == (not [f for f in report.findings if f.severity == "damage"])
    return [finding for finding in report.findings if finding.severity == "damage"]


def in_steps(uri: str, moments: list[Progress] | None = None) -> set[Finding]:
    """The findings of a check that any process can do a step of."""
    log = VisualMemory(uri).log
    found = verify(log, (moments if moments is not None else []).append, run_pickled)
    opened = verify_faiss(log.storage, found.indexes, found.dimension, found.broken, run_pickled)
    return {*found.findings, *opened}


def run_pickled(steps: Iterable[Step]) -> Iterator[tuple[int, Any]]:
    """Run steps, the last first, as another process would: work and result are pickled."""
    for step in [*steps][::-1]:
        yield step.number, pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(step.make))()))


def named_files(memory: VisualMemory) -> dict[str, FileRef]:
    found = {file.path: file for _, state in memory.log.states() for file in file_refs(state)}
    return dict(sorted(found.items()))


def test_a_sound_memory_gives_no_finding(everything: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"/".join(part for part in path.split("/")[:-1] if not part.isdigit()) for path in named_files(everything)}
    assert {"segments/plan", "segments/entries", "segments/rejected", "segments/thumbnails", "encoder"} <= kinds
    assert {"labels", "tombstones"} <= kinds
    moments = []
    report = VisualMemory(everything.uri).verify(on_progress=moments.append)
    assert report.findings == ()
    assert report.sound
    assert report.version == report.versions == CHECKPOINT_EVERY + 3
    assert moments[-1].done == moments[-1].total == len(named_files(everything))
    for files_a_step in (verify_steps.FILES_A_STEP, 1):
        monkeypatch.setattr(verify_steps, "FILES_A_STEP", files_a_step)
        moments.clear()
        assert in_steps(everything.uri, moments) == set()
        assert moments[-1].done == moments[-1].total == len(named_files(everything))
    document = json.loads(json.dumps(report.to_json()))
    assert (document["sound"], document["garbage_bytes"], document["removed"]) == (True, 0, None)


def changes(data: bytes, other: bytes) -> Iterator[tuple[str, bytes | None]]:
    """What may happen to a file: gone, cut, a bit turned here and there, exchanged for another."""
    yield "gone", None
    yield "empty", b""
    yield "cut", data[: len(data) // 2]
    yield "longer", data + b"\0"
    yield "exchanged", other
    for at in {0, len(data) // 2, 4 * len(data) // 5, len(data) - 1}:
        yield f"bit at {at}", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def contents(memory: VisualMemory) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(Path(memory.uri).rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_change_to_a_named_file_is_found(memory: VisualMemory) -> None:
    files = named_files(memory)
    by_kind: dict[str, list[str]] = {}
    for path in files:
        by_kind.setdefault(f"{path.split('/')[0]} {path.split('/')[2:3]} {path.rpartition('.')[2]}", []).append(path)
    for kind, paths in by_kind.items():
        for path in {paths[0], paths[-1]}:
            others = [other for other in paths if other != path] or [p for p in files if p != path]
            check_changes(memory, path, (Path(memory.uri) / others[0]).read_bytes(), kind)


def check_changes(memory: VisualMemory, path: str, other: bytes, kind: str) -> None:
    target = Path(memory.uri) / path
    data = target.read_bytes()
    for what, changed in changes(data, other):
        if changed is None:
            target.unlink()
        else:
            target.write_bytes(changed)
        found = damaged(memory)
        assert [finding.path for finding in found] == [path], (kind, what, found)
        assert in_steps(memory.uri) == {*found}, (kind, what)
        assert found[0].advice
        target.write_bytes(data)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [1, 2, 40, 99, CHECKPOINT_EVERY, CHECKPOINT_EVERY + 3])
def test_every_change_to_a_version_is_found(memory: VisualMemory, number: int) -> None:
    target = Path(memory.uri) / commit_path(number)
    data = target.read_bytes()
    for what, changed in changes(data, (Path(memory.uri) / commit_path(number - 1 or 3)).read_bytes()):
        if changed is None:
            continue  # below
        target.write_bytes(changed)
        assert commit_path(number) in [finding.path for finding in damaged(memory)], what
        report = VisualMemory(memory.uri).verify(clean=True)
        assert report.removed == 0
        assert any("nothing was removed" in finding.what for finding in report.findings)
        target.write_bytes(data)
    assert damaged(memory) == []


@pytest.mark.parametrize("number", [2, 40, 99, CHECKPOINT_EVERY + 1])
def test_a_version_that_is_gone_is_named(memory: VisualMemory, number: int) -> None:
    (Path(memory.uri) / commit_path(number)).unlink()
    [found] = damaged(memory)
    assert found.path == commit_path(number)
    assert "restore it" in found.advice
    before = contents(memory)
    assert VisualMemory(memory.uri).verify(clean=True).removed == 0
    assert contents(memory) == before


def test_a_memory_without_its_first_version_or_checkpoint(memory: VisualMemory, make_memory: MakeMemory) -> None:
    small = make_memory(unit(np.eye(8)), ["a"] * 8, name="small")
    small.forget(ids=[int(small.live().live_ids()[0])])
    (Path(small.uri) / commit_path(1)).unlink()
    assert [finding.path for finding in damaged(small)] == [commit_path(1)]
    # With a checkpoint above it, that is what a clean-up of old versions leaves when it is cut off.
    (Path(memory.uri) / commit_path(1)).unlink()
    first, newest = memory.log.checkpoints()[0], memory.log.latest().version
    report = VisualMemory(memory.uri).verify()
    assert report.sound
    assert report.versions == newest - first + 1
    assert {finding.severity for finding in report.findings} == {"waste"}
    answer = memory.search(embeddings=np.ones((1, 1280)), k=5)
    assert VisualMemory(memory.uri).verify(clean=True).removed >= first - 2
    assert VisualMemory(memory.uri).verify().findings == ()
    assert VisualMemory(memory.uri).search(embeddings=np.ones((1, 1280)), k=5) == answer
    for number in memory.log.checkpoints():
        (Path(memory.uri) / checkpoint_path(number)).unlink()
    [found] = damaged(memory)
    assert found.path == commit_path(first - 1)
    assert f"a checkpoint of version {first}" in found.what


def test_every_change_to_a_checkpoint_is_found(memory: VisualMemory) -> None:
    target = Path(memory.uri) / checkpoint_path(CHECKPOINT_EVERY)
    data = target.read_bytes()
    for what, changed in changes(data, data[:-1]):
        if changed is None:
            target.unlink()
            assert damaged(memory) == []  # the commits say the same
        else:
            target.write_bytes(changed)
            assert [finding.path for finding in damaged(memory)] == [checkpoint_path(CHECKPOINT_EVERY)], what
        target.write_bytes(data)
    log = VersionLog(memory.log.storage)
    state = log.at(CHECKPOINT_EVERY)
    log.rewrite_checkpoint(state.model_copy(update={"retired": (77,)}))
    [found] = damaged(memory)
    assert "is not what the commits before it add up to" in found.what


def test_counts_in_versions_are_compared(memory: VisualMemory) -> None:
    for number in (3, 50):
        for field, change in (("rows_before", 1), ("rows_after", -1)):
            [commit] = memory.log.commits([number])
            memory.log.rewrite(commit.model_copy(update={field: getattr(commit, field) + change}))
            [found] = damaged(memory)
            assert (found.path, "rows" in found.what) == (commit_path(number), True)
            memory.log.rewrite(commit)
    [commit] = memory.log.commits([5])
    memory.log.rewrite(commit.model_copy(update={"nonce": ""}))
    assert [(finding.path, finding.what) for finding in damaged(memory)] == [(commit_path(5), "carries no nonce")]


def test_the_hint_is_worth_a_note_at_most(memory: VisualMemory) -> None:
    for text in (b"9999", b"many", b""):
        memory.log.storage.replace(HINT, text)
        report = VisualMemory(memory.uri).verify()
        assert report.sound
        assert [finding.severity for finding in report.findings] == ["note"]


def test_a_number_that_is_not_remembered_is_damage(memory: VisualMemory) -> None:
    for number in (1, 3):  # of a folder, and of single adds
        target = Path(memory.uri) / segment_folder(number) / "segment.json"
        data = target.read_bytes()
        for changed in (None, b"", data[:-9]):
            if changed is None:
                target.unlink()
            else:
                target.write_bytes(changed)
            assert [finding.path for finding in damaged(memory)] == [f"{segment_folder(number)}segment.json"]
        target.write_bytes(data)


def test_a_later_format_is_named(memory: VisualMemory) -> None:
    target = Path(memory.uri) / commit_path(memory.log.latest().version)
    target.write_text(target.read_text().replace('"format": 2', '"format": 3'))
    [found] = damaged(memory)
    assert (found.path, found.what) == (
        commit_path(CHECKPOINT_EVERY + 3),
        "is in format 3 and this release reads format 2",
    )
    assert "later release" in found.advice


def test_all_damage_is_told_at_once(memory: VisualMemory) -> None:
    root = Path(memory.uri)
    victims = [commit_path(7), *list(named_files(memory))[::4]]
    for path in victims:
        (root / path).write_bytes(b"damaged")
    assert [finding.path for finding in damaged(memory)].count(commit_path(7)) == 1
    assert {finding.path for finding in damaged(memory)} == set(victims)


def test_lost_versions_are_said(memory: VisualMemory) -> None:
    shutil.rmtree(Path(memory.uri) / "versions")
    with pytest.raises(DamagedFile, match="has lost its versions/"):
        VisualMemory(memory.uri).verify()


def test_advice_fits(memory: VisualMemory) -> None:
    memory.index(IndexOptions(key="IVF4,Flat", target_recall=0.1, rebuild=True))
    old = memory.log.at(CHECKPOINT_EVERY).index
    new = memory.log.latest().index
    assert old is not None
    assert new is not None
    entries = memory.log.latest().segments[0].entries[0].path
    for path in (old.shards[0].ids.path, new.shards[0].ids.path, entries):
        (Path(memory.uri) / path).unlink()
    advice = {finding.path: finding.advice for finding in damaged(memory)}
    assert "the newest does without it" in advice[old.shards[0].ids.path]
    assert "index --rebuild" in advice[new.shards[0].ids.path]
    assert "restore it from a copy" in advice[entries]

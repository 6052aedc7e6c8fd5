"""Files that a user may not read are told from damaged ones, and every file of a memory has the mode of the others."""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.errors import DamagedFile, NotPermitted, StorageError, VisualMemoryError
from pipeline.index.build.plan import IndexOptions
from pipeline.store.storage.file_cache import FileCache
from pipeline.store.storage.file_refs import describe
from pipeline.store.storage.open_storage import open_storage
from tests.conftest import ENCODER, IMAGE_SIZE, unit
from tests.store.proxy import behind_proxy
from tests.store.seaweed import SeaweedFS
from tests.store.unprivileged import held_back_by_modes, unreadable

Verb = Callable[[VisualMemory, Path], object]


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda mask: (os.umask(mask), None)[1]
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_every_file_has_the_mode_that_the_umask_leaves(
    umask: Callable[[int], None], mask: int, mode: int, digits: Path, weights: str, tmp_path: Path
) -> None:
    umask(mask)
    memory = VisualMemory(tmp_path / "memory")
    some = tmp_path / "some"
    shutil.copytree(digits / "ask" / "0", some / "0")
    memory.add(some, encoder=ENCODER, weights=weights, weights_order="positional", image_size=IMAGE_SIZE)
    memory.index(IndexOptions(key="IVF1,Flat"))
    memory.forget(ids=[memory.search([next((some / "0").iterdir())], k=1)[0][0].id])
    memory.copy(tmp_path / "copy")

    files = [path for folder in ("memory", "copy") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in files}
    assert any(path.suffix == ".safetensors" for path in files)
    assert any(path.name == "index.faiss" for path in files)
    assert modes == {mode}, {path.name: oct(path.stat().st_mode) for path in files}


READING: dict[str, Verb] = {
    "search": lambda memory, image: memory.search([image]),
    "classify": lambda memory, image: memory.classify([image]),
    "evaluate": lambda memory, image: memory.evaluate(image.parents[1]),
    "add": lambda memory, image: memory.add(image.parent),
    "copy": lambda memory, image: memory.copy(Path(memory.uri).with_name("copy")),
}


@pytest.mark.parametrize("verb", READING)
def test_weights_that_may_not_be_read_are_not_called_damaged(
    verb: str, digits_memory: VisualMemory, digits: Path, tmp_path: Path
) -> None:
    memory = VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "memory"))
    [kept] = (tmp_path / "memory" / "encoder").iterdir()
    image = next((digits / "ask" / "0").iterdir())
    with unreadable(kept), pytest.raises(NotPermitted, match=f"denied: .*encoder/{kept.name}.* right to read"):
        READING[verb](memory, image)
    READING[verb](memory, image)


@pytest.fixture
def grown(tmp_path: Path) -> VisualMemory:
    """A memory of vectors with an index, entries no shard covers, tombstones and labels of its own."""
    memory = VisualMemory(tmp_path / "memory")
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        source = tmp_path / "sources" / name
        source.mkdir(parents=True)
        np.save(source / "x.npy", unit(rng.normal(size=(300, 16))))
        memory.add(source)
        if name == "a":
            memory.index(IndexOptions(key="IVF4,Flat"))
    ids = [neighbor.id for neighbor in memory.search(embeddings=rng.normal(size=(1, 16)), k=4)[0]]
    memory.forget(ids=ids[:1])
    memory.relabel(ids=ids[1:2], label="other")
    return memory


FILES = [
    "versions/00000000000000000001.json",
    "segments/00000003/entries/*",
    "tombstones/*",
    "labels/*",
    "index/*/shards/*/ids.npy",
    "index/*/shards/*/labels.npy",
    "index/*/shards/*/vectors.f16",
    "index/*/shards/*/entries.arrow",
    "index/*/shards/*/index.faiss",
]
ASKING: dict[str, Verb] = {
    "search": lambda memory, _: memory.search(embeddings=np.eye(16)[:1]),
    "classify": lambda memory, _: memory.classify(embeddings=np.eye(16)[:1]),
    "leave-one-out": lambda memory, _: memory.evaluate(leave_one_out=True),
}


@pytest.mark.parametrize("pattern", FILES)
def test_every_file_that_may_not_be_read_is_named_with_what_to_do(pattern: str, grown: VisualMemory) -> None:
    path = next(Path(grown.uri).glob(pattern))
    named = str(path.relative_to(grown.uri))
    for ask in (ASKING["search"], ASKING["classify"]):
        with unreadable(path), pytest.raises(NotPermitted, match="permission denied") as denied:
            ask(VisualMemory(grown.uri), path)
        assert named in str(denied.value)
        assert "damage" not in str(denied.value)
        assert denied.value.path == named
    ASKING["search"](VisualMemory(grown.uri), path)


@pytest.mark.parametrize("pattern", [*FILES, "index/*/trained.faiss", "segments/*/segment.json"])
def test_verify_says_that_a_file_is_not_readable_rather_than_damaged(pattern: str, grown: VisualMemory) -> None:
    path = next(iter(Path(grown.uri).glob(pattern)), None)
    if path is None:
        pytest.fail(f"the memory has no {pattern}: {[*Path(grown.uri).rglob('*')]}")
    with unreadable(path):
        found = VisualMemory(grown.uri).verify()
    assert not found.sound
    about = {(finding.severity, finding.path) for finding in found.findings if finding.severity != "note"}
    assert about == {("unread", str(path.relative_to(grown.uri)))}
    [unread] = [finding for finding in found.findings if finding.severity == "unread"]
    assert "not readable" in unread.what
    assert "right to read" in unread.advice
    assert VisualMemory(grown.uri).verify().sound


@pytest.mark.parametrize("folder", ["versions", "tombstones", "segments", "index", ""])
def test_a_folder_that_may_not_be_entered_is_no_empty_one(folder: str, grown: VisualMemory) -> None:
    path = Path(grown.uri) / folder
    with unreadable(path), pytest.raises(NotPermitted, match="permission denied"):
        VisualMemory(grown.uri).copy(Path(grown.uri).with_name("copy"))
    with unreadable(path), pytest.raises(NotPermitted, match="permission denied"):
        open_storage(grown.uri).walk()


def test_a_hint_that_may_not_be_read_hinders_nobody(grown: VisualMemory) -> None:
    version = grown.state().version
    hint = Path(grown.uri) / "versions" / "latest"
    hint.write_text(str(version))
    with unreadable(hint):
        assert VisualMemory(grown.uri).state().version == version


WRITING: dict[str, Verb] = {
    "forget": lambda memory, _: memory.forget(labels=["other"]),
    "index": lambda memory, _: memory.index(IndexOptions(key="Flat", rebuild=True)),
    "add": lambda memory, path: memory.add(path),
}


@pytest.mark.parametrize("verb", WRITING)
def test_a_place_that_may_not_be_written_to_is_told_so(verb: str, grown: VisualMemory, tmp_path: Path) -> None:
    source = tmp_path / "more"
    source.mkdir()
    np.save(source / "x.npy", np.eye(16, dtype=np.float16))
    folders = [path for path in (Path(grown.uri), *Path(grown.uri).rglob("*")) if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    try:
        with held_back_by_modes(), pytest.raises(NotPermitted, match="may not write to .* the right to"):
            WRITING[verb](VisualMemory(grown.uri), source)
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_what_an_object_store_denies_is_told_from_damage(
    s3: SeaweedFS, grown: VisualMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = s3.uri()
    grown.copy(uri)
    for pattern in ("tombstones/*", "segments/00000003/entries/*", "index/*/shards/*/index.faiss"):
        path = str(next(Path(grown.uri).glob(pattern)).relative_to(grown.uri))

        def deny(_command: str, asked: str, status: int, path: str = path) -> int:
            return 403 if path in asked else status

        with behind_proxy(s3, monkeypatch, deny):
            with pytest.raises(NotPermitted, match=f"permission denied: these credentials may not read .*{path}"):
                ASKING["search"](VisualMemory(uri), Path())
            found = VisualMemory(uri).verify()
        about = {(finding.severity, finding.path) for finding in found.findings if finding.severity != "note"}
        assert about == {("unread", path)}


def test_local_copies_of_another_user_are_told_so(grown: VisualMemory, tmp_path: Path) -> None:
    storage = open_storage(grown.uri)
    [kept] = list(storage.walk("tombstones"))
    file = describe(kept, Path(grown.uri) / kept)
    copy = FileCache(tmp_path / "copies", 1 << 20).get(storage, file)
    with unreadable(copy), pytest.raises(StorageError, match="permission denied: .*name another folder"):
        FileCache(tmp_path / "copies", 1 << 20).get(storage, file)


def test_a_file_that_is_gone_is_damage_still(grown: VisualMemory) -> None:
    next(Path(grown.uri).glob("tombstones/*")).unlink()
    with held_back_by_modes(), pytest.raises(DamagedFile, match="is missing"):
        ASKING["search"](VisualMemory(grown.uri), Path())


def test_weights_given_that_may_not_be_read_are_told_so(weights: str, digits: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(weights, tmp_path / "weights.pth"))
    with unreadable(copy), pytest.raises(VisualMemoryError, match="permission denied"):
        VisualMemory(tmp_path / "memory").add(digits / "ask", encoder=ENCODER, weights=str(copy))

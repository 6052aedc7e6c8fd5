"""Thumbnails of single adds: kept in the commit, folded, packed, copied, rolled back and erased with their entry."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import VisualMemory
from pipeline.edits import compact, singles
from pipeline.edits.erasure.all_versions import facts_of
from pipeline.edits.fold import fold_singles
from pipeline.store.checks.consistency import Consistency
from pipeline.store.checks.file_contents import FileFacts
from pipeline.store.checks.id_runs import IdRuns
from pipeline.store.checks.inventory import Inventory
from pipeline.store.log import single_adds as stored_singles
from pipeline.store.log.state import State
from pipeline.store.lookup.thumbnails import read_thumbnails

AUDIT = Path(__file__).parents[1] / "end_to_end" / "erasure_audit.py"


@pytest.fixture
def memory(digits_memory: VisualMemory, tmp_path: Path) -> VisualMemory:
    return VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "memory"))


@pytest.fixture
def asked(digits: Path) -> list[Path]:
    return sorted((digits / "ask").rglob("*.png"))


@pytest.fixture
def small_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that happens at thousands of entries happens at a few."""
    monkeypatch.setattr(singles, "FOLD_EVERY", 3)
    monkeypatch.setattr(stored_singles, "TIER_ROWS", (9, 27))
    monkeypatch.setattr(stored_singles, "FILES_A_TIER", (2, 2))
    monkeypatch.setattr(compact, "SMALL_ROWS", 20)
    monkeypatch.setattr(compact, "PACK_ROWS", 60)


def noise(seed: int) -> bytes:
    """A PNG that no other is like."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 48, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def teach(memory: VisualMemory, seeds: Sequence[int], *, thumbnails: bool = True) -> list[int]:
    """One commit an image."""
    return [memory.add_images([noise(seed)], labels=["noise"], thumbnails=thumbnails)[0] for seed in seeds]


def kept(memory: VisualMemory, ids: Sequence[int]) -> dict[int, bytes]:
    return read_thumbnails(memory.log.storage, memory.log.latest(), ids)


def assert_sound(memory: VisualMemory) -> None:
    assert [finding for finding in memory.verify().findings if finding.severity == "damage"] == []


def files_with(place: str, jpeg: bytes) -> list[str]:
    """Files of a folder in which a thumbnail stands, as it is or in base64 at any offset."""
    middle = jpeg[len(jpeg) // 2 :][:300]
    needles = [middle, *(base64.b64encode(middle[skip:])[4:-4] for skip in range(3))]
    files = [path for path in Path(place).rglob("*") if path.is_file()]
    return [str(path) for path in files if any(needle in path.read_bytes() for needle in needles)]


def test_a_single_add_keeps_a_thumbnail_only_when_told(memory: VisualMemory) -> None:
    [with_one] = teach(memory, [1])
    [without] = teach(memory, [2], thumbnails=False)
    pictures = kept(memory, [with_one, without])
    assert pictures.keys() == {with_one}
    assert pictures[with_one].startswith(b"\xff\xd8")
    assert_sound(memory)


def test_a_thumbnail_costs_some_kilobytes(memory: VisualMemory) -> None:
    sizes = []
    for thumbnails in (False, True):
        teach(memory, [3 + thumbnails], thumbnails=thumbnails)
        version = memory.log.latest().version
        sizes.append((Path(memory.uri) / "versions" / f"{version:020d}.json").stat().st_size)
    assert 500 < sizes[1] - sizes[0] < 8_000, sizes


def test_one_file_added_with_thumbnails_is_one_small_commit(memory: VisualMemory, tmp_path: Path) -> None:
    photo = tmp_path / "new.png"
    photo.write_bytes(noise(5))
    before = set(Path(memory.uri).rglob("*.parquet"))
    command = [sys.executable, "-m", "jobs.cli", "add", memory.uri, str(photo), "--thumbnails", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    assert json.loads(done.stdout)["entries"] == 1
    assert set(Path(memory.uri).rglob("*.parquet")) == before, "the commit carries it"
    photo.unlink()
    decision = memory.classify([noise(5)], k=1)[0]
    assert kept(memory, [decision.neighbors[0].id])
    assert "data:image/jpeg" in memory.explanation_page(decision)


def test_folding_and_packing_lose_no_thumbnail(memory: VisualMemory, small_tiers: None) -> None:
    first = teach(memory, [10])
    pictures = kept(memory, first)
    ids = [*first, *teach(memory, range(11, 15)), *teach(memory, range(15, 18), thumbnails=False)]
    ids += teach(memory, range(18, 31))
    have = [*ids[:5], *ids[8:]]
    assert set(kept(memory, ids)) == set(have)
    assert kept(memory, first) == pictures
    state = memory.log.latest()
    files = [file for segment in state.segments for file in segment.thumbnails]
    assert 1 < len(files) < 6, "small files become larger ones"
    before = kept(memory, ids)
    memory.compact()
    assert kept(memory, ids) == before
    assert not memory.log.latest().pending
    teach(memory, range(31, 33))
    memory.index()
    assert kept(memory, ids) == before
    assert_sound(memory)


def test_rollback_and_copy_keep_what_the_version_had(memory: VisualMemory, small_tiers: None, tmp_path: Path) -> None:
    ids = teach(memory, range(40, 42))
    version, before = memory.log.latest().version, kept(memory, ids)
    more = teach(memory, range(42, 50))
    memory.rollback(version)
    assert kept(memory, [*ids, *more]) == before
    teach(memory, range(50, 56))
    assert kept(memory, ids) == before
    assert_sound(memory)
    memory.copy(tmp_path / "copy")
    copied = VisualMemory(tmp_path / "copy")
    assert kept(copied, ids) == before
    assert_sound(copied)


def test_erasing_takes_the_thumbnails_wherever_they_lie(
    memory: VisualMemory, small_tiers: None, tmp_path: Path
) -> None:
    ids = teach(memory, range(60, 68))
    memory.compact()
    ids += teach(memory, [68, 69])  # these lie in their commits
    doomed = [ids[0], ids[4], ids[-1]]
    pictures = kept(memory, ids)
    assert all(files_with(memory.uri, jpeg) for jpeg in pictures.values()), "what is looked for can be found"
    version = memory.log.latest().version
    facts = facts_of(memory.log, Inventory.of(memory.log, last=version), np.array(sorted(doomed)))
    report = memory.forget(ids=doomed, erase=True, verify=True)
    assert report.receipt is not None
    assert report.receipt.proven
    for entry_id in ids:
        assert bool(files_with(memory.uri, pictures[entry_id])) == (entry_id not in doomed)
    np.save(tmp_path / "vectors.npy", facts.vectors_ND)
    for name, lines in (("ids", facts.ids_N.tolist()), ("uris", facts.uris), ("hashes", facts.hashes)):
        (tmp_path / f"{name}.txt").write_text("\n".join(map(str, lines)))
    lists = [str(tmp_path / name) for name in ("vectors.npy", "ids.txt", "uris.txt", "hashes.txt")]
    command = [sys.executable, str(AUDIT), memory.uri, *lists]
    audit = subprocess.run(command, capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout
    assert kept(memory, ids) == {entry_id: jpeg for entry_id, jpeg in pictures.items() if entry_id not in doomed}
    assert_sound(memory)


def test_verify_notices_a_thumbnail_that_is_none(memory: VisualMemory) -> None:
    teach(memory, [80])
    state = memory.log.latest()
    [single] = state.pending
    for thumbnail in ("no base64!", base64.b64encode(b"GIF89a").decode()):
        spoiled = state.model_copy(update={"pending": (single.model_copy(update={"thumbnail": thumbnail}),)})
        assert any("thumbnails cannot be read" in what for what in _disagreements(spoiled))


def _disagreements(state: State) -> list[str]:
    return list(Consistency({})._pending(state, State()))


def test_a_thumbnail_without_an_entry_is_damage(memory: VisualMemory, small_tiers: None) -> None:
    ids = teach(memory, range(90, 92))
    state = fold_singles(memory.log, memory.log.latest())
    [segment] = [segment for segment in state.segments if segment.thumbnails]
    facts = {file.path: FileFacts(IdRuns.of(np.array(ids, np.int64))) for file in segment.entries}
    facts |= {file.path: FileFacts(IdRuns.of(np.array([*ids, 7], np.int64))) for file in segment.thumbnails}
    assert any("thumbnails" in what for what in Consistency(facts)._singles(state, segment))
    facts |= {file.path: FileFacts(IdRuns.of(np.array(ids, np.int64))) for file in segment.thumbnails}
    assert not any("thumbnails" in what for what in Consistency(facts)._singles(state, segment))

"""Images whose bytes the memory holds already: counted, or left out as rejected rows, whatever happens on the way."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import VisualMemory
from pipeline.edits import duplicates as finding
from pipeline.edits.add import AddOptions, AddReport
from pipeline.errors import SourceError, UsageError
from pipeline.store.log.records import Segment
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.lookup import frozen_digests
from pipeline.store.lookup.digests import Digests, live_rows
from pipeline.store.lookup.entry_lookup import EntryLookup
from pipeline.store.lookup.frozen_digests import FrozenDigests, freeze_digests
from pipeline.store.tables.schemas import read_table
from tests.conftest import MakeMemory, add_vectors, unit


@pytest.fixture
def memory(digits_memory: VisualMemory, tmp_path: Path) -> VisualMemory:
    """A copy of the digits' memory that a test may change."""
    return VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "memory"))


@pytest.fixture
def mixed(digits: Path, tmp_path: Path) -> Path:
    """Of each digit five images that the memory holds, under other names, and ten that are new."""
    for digit in range(5):
        folder = tmp_path / "mixed" / str(digit)
        folder.mkdir(parents=True)
        for number, path in enumerate(sorted((digits / "remember" / str(digit)).iterdir())[:5]):
            shutil.copy(path, folder / f"held-{number}.png")
        for path in (digits / "ask" / str(digit)).iterdir():
            shutil.copy(path, folder)
    return tmp_path / "mixed"


def rejected(memory: VisualMemory, report: AddReport) -> list[dict]:
    state = memory.state()
    [segment] = [segment for segment in state.segments if segment.number == report.segment]
    return [row for file in segment.rejected for row in read_table(memory.log.storage, file).to_pylist()]


def test_an_add_tells_how_many_images_the_memory_holds(memory: VisualMemory, mixed: Path) -> None:
    report = memory.add(mixed)
    assert (report.planned, report.entries, report.duplicates, report.left_out) == (75, 75, 25, 0)
    assert report.to_json()["duplicates"] == 25


def test_skipped_duplicates_are_rejected_with_what_holds_them(memory: VisualMemory, mixed: Path, digits: Path) -> None:
    before = memory.state()
    uris = {
        entry_id: uri for block in memory.live().blocks for entry_id, uri in zip(block.ids_N, block.uris, strict=True)
    }
    report = memory.add(mixed, duplicates="skip")
    assert (report.planned, report.entries, report.rejected, report.duplicates) == (75, 50, 25, 25)
    rows = rejected(memory, report)
    assert {row["stage"] for row in rows} == {"duplicate"}
    for row in rows:
        holder = uris[int(row["reason"].rpartition(" ")[2])].as_py()
        assert Path(row["uri"]).read_bytes() == Path(holder).read_bytes()
    assert memory.verify().sound
    assert not list(Path(memory.uri).glob("segments/*/plan/*.npy"))
    assert memory.state().num_live == before.num_live + 50


def test_none_are_found_in_a_new_memory_nor_among_what_was_forgotten(
    memory: VisualMemory, mixed: Path, digits: Path, weights: str, tmp_path: Path
) -> None:
    memory.forget(datasets=["remember"])
    report = memory.add(mixed, duplicates="skip")
    assert (report.entries, report.duplicates) == (75, 0)


def test_an_add_of_duplicates_alone_is_no_failure_and_stays_quiet(memory: VisualMemory, digits: Path) -> None:
    again = shutil.copytree(digits / "remember", Path(memory.uri).with_name("again"))
    report = memory.add(again, duplicates="skip", max_rejected=0.0)
    assert (report.planned, report.entries, report.rejected, report.left_out) == (100, 0, 100, 100)
    assert memory.verify().sound
    repeated = memory.add(again, duplicates="skip")
    assert (repeated.segment, repeated.already) == (None, report.segment)
    assert memory.state().version == report.version
    assert len(memory.search([next((digits / "ask" / "0").iterdir())], k=200)[0]) == 100


def test_duplicates_do_not_count_as_failures_and_failures_do(memory: VisualMemory, mixed: Path) -> None:
    for number in range(12):
        (mixed / "0" / f"broken-{number}.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"12 of the first .* were rejected \(such as .*broken-"):
        memory.add(mixed, duplicates="skip")
    report = memory.add(mixed, duplicates="skip", max_rejected=0.2)
    assert (report.entries, report.rejected, report.left_out) == (50, 37, 25)


def test_images_doubled_within_the_source_are_told(memory: VisualMemory, mixed: Path) -> None:
    for digit in range(3):
        path = next(path for path in (mixed / str(digit)).iterdir() if not path.name.startswith("held"))
        for copy in range(2):
            shutil.copy(path, path.with_name(f"copy-{copy}.png"))
    report = memory.add(mixed, duplicates="skip")
    assert (report.entries, report.duplicates, report.duplicates_within) == (56, 25, 6)


@pytest.mark.parametrize("value", ["drop", "", None])
def test_another_word_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="give keep or skip"):
        AddOptions(duplicates=value)  # type: ignore[arg-type]


def test_keeping_changes_no_fingerprint(memory: VisualMemory, digits: Path) -> None:
    kept = memory.plan_add(digits / "remember", AddOptions(duplicates="keep"))
    assert kept.already is not None
    assert memory.plan_add(digits / "remember", AddOptions(duplicates="skip")).already is None


def test_vectors_given_are_duplicates_of_equal_vectors(tmp_path: Path) -> None:
    vectors_ND = unit(np.random.default_rng(0).normal(size=(600, 16)))
    for name, rows in (("first", slice(0, 400)), ("second", slice(300, 600))):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", vectors_ND[rows])
    memory = VisualMemory(tmp_path / "memory")
    assert memory.add(tmp_path / "first").duplicates == 0
    report = memory.add(tmp_path / "second", duplicates="skip")
    assert (report.entries, report.duplicates) == (200, 100)
    assert memory.verify().sound


def test_members_of_tars_and_rows_of_parquet_are_duplicates(memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    paths = [path for digit in range(2) for path in sorted((digits / "remember" / str(digit)).iterdir())[:4]]
    paths += sorted((digits / "ask" / "0").iterdir())[:3]
    source = tmp_path / "tables"
    source.mkdir()
    pq.write_table(
        pa.table({"image": [path.read_bytes() for path in paths], "label": ["x"] * 11}), source / "a.parquet"
    )
    report = memory.add(source, duplicates="skip")
    assert (report.planned, report.entries, report.left_out) == (11, 3, 8)


def test_single_images_are_looked_up_by_what_is_nearest(memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    held_path = next((digits / "remember" / "3").iterdir())
    copy = Path(shutil.copy(held_path, tmp_path / "copy.png"))
    new = next((digits / "ask" / "3").iterdir())
    version = memory.state().version
    report = memory.add(copy, duplicates="skip")
    assert (report.segment, report.entries, report.rejected, report.duplicates) == (None, 0, 1, 1)
    assert report.rejects[0].stage == "duplicate"
    assert memory.state().version == version
    assert memory.add(new, duplicates="skip").entries == 1
    told = memory.add(copy)
    assert (told.entries, told.duplicates, told.left_out) == (1, 1, 0)


def test_pending_singles_hold_their_bytes(memory: VisualMemory, digits: Path, mixed: Path) -> None:
    new = next(path for path in sorted((mixed / "1").iterdir()) if not path.name.startswith("held"))
    memory.add_images([new.read_bytes()], labels=["1"])
    report = memory.add(mixed, duplicates="skip")
    assert report.duplicates == 26


KILLED = """
import os, signal, sys
from pipeline import VisualMemory
from pipeline.embeddings import parts
publish, done = parts.publish_part, []
def dying(*arguments, **options):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(publish(*arguments, **options))
    return done[0]
parts.publish_part = dying
VisualMemory(sys.argv[1]).add(sys.argv[2], duplicates="skip")
"""


def test_killed_and_repeated_it_leaves_out_what_it_would_have(make_memory: MakeMemory, tmp_path: Path) -> None:
    """What was added in between, and what was forgotten, changes nothing: the plan was frozen with what it is about."""
    rng = np.random.default_rng(0)
    first, second = unit(rng.normal(size=(300, 8))), unit(rng.normal(size=(900, 8)))
    second[::3] = first
    source = tmp_path / "source"
    for part in range(3):
        (source / str(part)).mkdir(parents=True)
        np.save(source / str(part) / "x.npy", second[300 * part : 300 * (part + 1)])
    outcomes = []
    for name in ("whole", "killed"):
        (tmp_path / f"first-{name}").mkdir()
        np.save(tmp_path / f"first-{name}" / "x.npy", first)
        memory = VisualMemory(tmp_path / name)
        memory.add(tmp_path / f"first-{name}", dataset="first")
        if name == "killed":
            command = [sys.executable, "-c", KILLED, memory.uri, str(source)]
            assert subprocess.run(command, check=False, env=dict(os.environ)).returncode == -signal.SIGKILL
            (tmp_path / "between").mkdir()
            np.save(tmp_path / "between" / "x.npy", second[1::3])
            memory.add(tmp_path / "between")
            memory.forget(ids=memory.live().live_ids()[:50].tolist())
        report = memory.add(source, duplicates="skip")
        assert memory.verify().sound
        [segment] = [segment for segment in memory.state().segments if segment.number == report.segment]
        storage = memory.log.storage
        entries = [read_table(storage, file).column("id").to_pylist() for file in segment.entries]
        outcomes.append([report.entries, report.left_out, *([i & (1 << 39) - 1 for i in ids] for ids in entries)])
    assert outcomes[0][:2] == [600, 300]
    assert outcomes[0] == outcomes[1]


def test_an_erasure_lets_no_hash_stay_with_an_interrupted_add(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("first", "second/a", "second/b"):
        (tmp_path / name).mkdir(parents=True)
        np.save(tmp_path / name / "x.npy", unit(rng.normal(size=(300, 8))))
    memory = VisualMemory(tmp_path / "memory")
    memory.add(tmp_path / "first")
    command = [sys.executable, "-c", KILLED, memory.uri, str(tmp_path / "second")]
    assert subprocess.run(command, check=False, env=dict(os.environ)).returncode == -signal.SIGKILL
    assert list(Path(memory.uri).glob("segments/*/plan/*.held.npy"))
    memory.forget(ids=memory.live().live_ids()[:1].tolist(), erase=True)
    assert not list(Path(memory.uri).glob("segments/*/plan/*.held.npy"))
    assert memory.add(tmp_path / "second", duplicates="skip").entries == 600


@pytest.mark.parametrize("bucket_rows", [100, 1 << 22])
def test_what_is_held_is_looked_up_in_files_of_any_size(
    bucket_rows: int, make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_digests, "BUCKET_ROWS", bucket_rows)
    rng = np.random.default_rng(0)
    base = unit(rng.normal(size=(1_000, 8)))
    memory = make_memory(np.concatenate([base, base[:100]]), ["a"] * 1_100)
    state = memory.state()
    file = freeze_digests(memory.log.storage, "segments/00000009/plan/x.held.npy", state)
    assert file is not None
    assert file.rows == 1_100
    ids_N = memory.live().live_ids()
    digests_N = Digests(memory.log.storage, state).of(ids_N)
    found = FrozenDigests(memory.log.storage, file).holders(np.append(digests_N, np.uint64(7)))
    assert found.tolist() == [*ids_N[:1_000], *ids_N[:100], -1]
    assert sum(len(ids) for ids, _ in live_rows(memory.log.storage, state)) == 1_100


def test_a_large_memory_is_not_looked_through_for_few(make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    base = unit(np.random.default_rng(0).normal(size=(500, 8)))
    memory = make_memory(base, ["a"] * 500)
    monkeypatch.setattr(finding, "LOOKED_THROUGH", 100)
    before: State = memory.state()
    for rows, wanted in ((10, None), (25, 25)):
        state = add_vectors(memory.log, base[:rows], ["a"] * rows, name=f"more {rows}")
        [added] = state.segments[-1:]
        assert finding.find_duplicates(memory.log.storage, before, added.entries).held == wanted
        assert bool(finding.is_looked_for(before, rows)) == (wanted is not None)


def counts_of(log: VersionLog, segment: Segment) -> pa.Table:
    ids_N = np.concatenate([read_table(log.storage, file, ["id"])["id"].to_numpy() for file in segment.entries])
    return EntryLookup(log.storage, log.latest()).counts_of(ids_N)


def test_an_add_of_a_class_far_smaller_than_the_others_says_so(make_memory: MakeMemory, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    memory = make_memory(unit(rng.normal(size=(600, 8))), [f"class {row % 3}" for row in range(600)])
    log = memory.log
    for name, rows, wanted in (("wolf", 20, [("wolf", 20)]), ("even", 150, [])):
        state = add_vectors(log, unit(rng.normal(size=(rows, 8))), [name] * rows, name=name)
        found = finding.find_small_classes(log.storage, state, counts_of(log, state.segments[-1]))
        assert [(small.label, small.entries) for small in found] == wanted
    memory.relabel(ids=memory.live().matching(label="wolf").tolist(), label="class 0")
    state = add_vectors(log, unit(rng.normal(size=(30, 8))), ["wolf"] * 30, name="wolves")
    memory.forget(ids=memory.live().matching(label="wolf")[:20].tolist())
    [small] = finding.find_small_classes(log.storage, memory.state(), counts_of(log, state.segments[-1]))
    assert (small.label, small.entries) == ("wolf", 10)
    assert {small.label for small in memory.small_classes()} == {"wolf"}


def test_an_add_goes_on_beside_a_damaged_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", unit(np.random.default_rng(0).normal(size=(50, 8))))
    memory = VisualMemory(tmp_path / "memory")
    memory.add(tmp_path / "first")
    next(Path(memory.uri).glob("segments/00000001/entries/*")).unlink()
    report = memory.add(tmp_path / "second")
    assert (report.entries, report.duplicates) == (50, None)
    assert "is missing from the memory" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_on_ray_the_same_images_are_left_out(tmp_path: Path) -> None:
    from jobs.ray_cluster.on_ray import start_ray

    vectors_ND = unit(np.random.default_rng(0).normal(size=(1_200, 8)))
    for name, rows in (("first", vectors_ND[::3]), ("second/a", vectors_ND[:700]), ("second/b", vectors_ND[700:])):
        (tmp_path / name).mkdir(parents=True)
        np.save(tmp_path / name / "x.npy", rows)
    start_ray()
    left_out = []
    for runner in ("here", "ray"):
        memory = VisualMemory(tmp_path / runner)
        memory.add(tmp_path / "first")
        report = memory.add(tmp_path / "second", duplicates="skip", runner=runner)  # type: ignore[arg-type]
        assert (report.entries, report.duplicates) == (800, 400)
        assert memory.verify().sound
        left_out.append([(row["uri"], row["reason"]) for row in rejected(memory, report)])
    assert left_out[0] == left_out[1]

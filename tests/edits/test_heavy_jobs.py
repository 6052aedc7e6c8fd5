"""Compactions, exports and copies as jobs over parts: killed they go on, and on Ray they make the same."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from jobs.cli import main
from pipeline import VisualMemory
from pipeline.edits import compact as compacting
from pipeline.edits import copy_files
from pipeline.edits.export_files import ExportWork
from pipeline.edits.pack_marks import key_of, make_and_mark, take_up
from pipeline.errors import DamagedFile, MemoryMissing, SourceError, UsageError
from pipeline.index.build.plan import IndexOptions
from pipeline.progress import Progress
from pipeline.store.checks.garbage import remove_garbage, take_census
from pipeline.store.layout import PACK_MARKS
from pipeline.store.log.label_counts import by_dataset, by_label
from pipeline.store.log.version_log import VersionLog
from pipeline.store.lookup.entry_lookup import EntryLookup
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.local import LocalStorage
from pipeline.store.storage.open_storage import open_storage
from tests.conftest import add_vectors
from tests.edits.given import add_given, vectors
from tests.edits.test_compact import answers
from tests.store.seaweed import SeaweedFS

PACKS_MADE = 5


@pytest.fixture
def memory(tmp_path: Path) -> VisualMemory:
    """Ten segments of one small file each, forgotten and corrected entries; five packs of two segments."""
    memory = VisualMemory(tmp_path / "memory")
    for number in range(10):
        labels = [f"l{row % 4}" for row in range(40)]
        add_vectors(memory.log, vectors(40, seed=number), labels, dataset=f"d{number}", name=f"n{number}")
    ids = memory.live().live_ids()
    memory.forget(ids=ids[5:25].tolist())
    memory.forget(ids=ids[100:130].tolist())
    memory.relabel(ids=ids[30:60].tolist(), label="corrected")
    memory.relabel(ids=ids[50:70].tolist(), label="corrected again")
    memory.relabel(label_set="parity", map={"l0": "even", "l1": "odd"})
    return memory


@pytest.fixture(autouse=True)
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compacting, "PACK_ROWS", 80)


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=False, cwd=Path(__file__).parents[2], capture_output=True, text=True)


def again(memory: VisualMemory) -> VisualMemory:
    return VisualMemory(memory.uri)


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Compactions

KILLED_COMPACT = """
import os, signal, sys
from pipeline import VisualMemory
from pipeline.edits import compact as compacting

compacting.PACK_ROWS = 80
pack, left = compacting._pack, [int(sys.argv[2])]

def dies(*arguments):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return pack(*arguments)

compacting._pack = dies
VisualMemory(sys.argv[1]).compact()
"""


@pytest.fixture
def killed(memory: VisualMemory) -> VisualMemory:
    """The memory after a compaction that was killed over its fourth pack of five."""
    assert run(KILLED_COMPACT, memory.uri, 3).returncode == -signal.SIGKILL
    return memory


def counted_packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first ids of the packs that are made from now on."""
    made: list[int] = []
    pack = compacting._pack

    def counts(storage: object, nonce: str, version: int, group: compacting.Sequence) -> object:
        made.append(group[0].first_id)
        return pack(storage, nonce, version, group)  # type: ignore[arg-type]

    monkeypatch.setattr(compacting, "_pack", counts)
    return made


def test_a_killed_compaction_goes_on(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    before, told = memory.state(), answers(memory)
    assert run(KILLED_COMPACT, memory.uri, 3).returncode == -signal.SIGKILL
    assert again(memory).state() == before, "no reader sees anything of it"
    assert answers(again(memory)) == told
    made, moments = counted_packs(monkeypatch), list[Progress]()
    report = again(memory).compact(on_progress=moments.append)
    assert (report.committed, len(made)) == (True, PACKS_MADE - 3)
    assert [(m.done, m.total) for m in moments if m.stage == "packing"] == [(3, 5), (4, 5), (5, 5)]
    assert answers(again(memory)) == told
    state = again(memory).state()
    assert len(state.entries_files()) == PACKS_MADE
    assert not again(memory).compact().committed
    assert not memory.log.storage.list(PACK_MARKS)
    assert again(memory).verify().sound
    again(memory).verify(clean=True)  # the lease of the dead process
    assert again(memory).verify().findings == ()
    assert answers(again(memory)) == told


def test_a_segment_added_meanwhile_leaves_finished_packs_of_use(
    killed: VisualMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_vectors(killed.log, vectors(40, seed=70), ["l1"] * 40, name="later")
    add_vectors(killed.log, vectors(40, seed=71), ["l1"] * 40, name="later still")
    told, made = answers(killed), counted_packs(monkeypatch)
    assert again(killed).compact().committed
    assert len(made) == PACKS_MADE + 1 - 3
    assert answers(again(killed)) == told
    assert again(killed).verify().sound


def test_a_clean_up_removes_what_was_packed(killed: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    found = killed.verify()
    assert found.garbage_bytes
    assert len(killed.log.storage.list(PACK_MARKS)) == 3
    report = killed.verify(clean=True)
    assert report.removed
    assert killed.verify().findings == ()
    assert not killed.log.storage.walk("packs")
    made = counted_packs(monkeypatch)
    assert again(killed).compact().committed
    assert len(made) == PACKS_MADE
    assert killed.verify().findings == ()


def test_an_erasure_reaches_what_was_packed(killed: VisualMemory) -> None:
    packed = [path for path in killed.log.storage.walk("packs") if path.endswith(".parquet")]
    assert len(packed) == 3
    [doomed] = killed.live().live_ids()[:1].tolist()
    report = killed.forget(ids=[doomed], erase=True, verify=True)
    assert report.receipt is not None
    assert report.receipt.proven
    assert not killed.log.storage.walk("packs")
    again(killed).compact()
    assert again(killed).verify().findings == ()


def test_what_a_live_compaction_packs_is_left_to_it(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = memory.log.storage
    [first, second, *_] = memory.state().entries_files()
    key = key_of("pack", [first, second])
    made = counted_packs(monkeypatch)
    with Lease(storage, "compact") as lease:
        make_and_mark(storage, key, lambda: compacting._pack(storage, lease.nonce, 1, [first, second]))
        made.clear()
        assert again(memory).compact().committed
        assert len(made) == PACKS_MADE
    assert again(memory).verify().sound


@pytest.mark.parametrize("in_time", [True, False])
def test_a_clean_up_beside_a_compaction_that_goes_on(killed: VisualMemory, *, in_time: bool) -> None:
    """Packs are taken up while a clean-up, which has seen nobody at work, is about to remove them."""
    census = take_census(killed.log)
    storage = LocalStorage(Path(killed.uri))
    keys = [key_of("pack", files) for files in compacting._groups(storage, killed.state())]

    class Beside(LocalStorage):
        taken: dict | None = None

        def delete(self, paths: Iterable[str]) -> None:
            paths = list(paths)
            if self.taken is None and any(path.startswith(PACK_MARKS) for path in paths):
                self.taken = {}
                if not in_time:
                    super().delete(paths)
                self.taken, _ = take_up(storage, lease, keys)
            super().delete(paths)

    with Lease(storage, "compact") as lease:
        cleaning = Beside(Path(killed.uri))
        remove_garbage(VersionLog(cleaning), census, "verify --clean")
        taken = cleaning.taken
        assert taken is not None
        assert len(taken) == (3 if in_time else 0), "marks go first"
        assert all(storage.exists(file.path) for made in taken.values() for file in made.files)


def numbers_of(memory: VisualMemory) -> dict:
    """The number of live entries by label, and by dataset, from the files of counts."""
    rows = EntryLookup(memory.log.storage, memory.state()).counts()
    found, live = by_label(rows), memory.live()
    counted = zip(live.labels, live.label_counts().tolist(), strict=True)
    assert found == {name: number for name, number in sorted(counted) if number}
    return found | by_dataset(rows)


@pytest.fixture
def changes_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change writes a file of counts that adds to the earlier ones, as in a memory with many labels."""
    monkeypatch.setattr("pipeline.store.log.label_counts.FOLDED_BYTES", 0)


@pytest.mark.usefixtures("changes_counted")
def test_counts_become_one_file(memory: VisualMemory) -> None:
    add_given(memory.log, vectors(3, seed=60), ["l1", None, "new"], name="single")
    add_given(memory.log, vectors(3, seed=61), ["l1", None, "new"], name="single 2")
    before, state = numbers_of(memory), memory.state()
    assert state.pending
    assert len(state.counts or ()) > 8
    memory.compact()
    assert len(memory.state().counts or ()) == 1
    assert numbers_of(again(memory)) == before
    assert not memory.compact().committed
    add_given(memory.log, vectors(1, seed=62), ["l1"], name="single 3")
    memory.compact()
    assert len(memory.state().counts or ()) == 1
    assert numbers_of(again(memory))["l1"] == before["l1"] + 1
    memory.verify(clean=True)
    assert memory.verify().findings == ()


def test_a_version_names_few_files_after_it(memory: VisualMemory) -> None:
    """Besides what each add has of its own, the number of files does not depend on how many edits there were."""
    for number in range(12):
        ids = memory.live().live_ids()
        memory.forget(ids=ids[-1 - number :][:1].tolist())
        memory.relabel(ids=ids[number : number + 1].tolist(), label=f"new {number}")
        add_given(memory.log, vectors(1, seed=80 + number), ["l1"], name=f"single {number}")
    memory.compact()
    state = memory.state()
    assert (len(state.tombstones), len(state.labels), len(state.counts or ()), state.pending) == (1, 1, 1, ())
    rows = sum(file.rows for file in state.entries_files())
    assert len(state.entries_files()) <= 2 * rows / compacting.PACK_ROWS + 1
    assert all(len(s.uris) <= 1 and len(s.sha256s) <= 1 and len(s.rejected) <= 1 for s in state.segments)


PEAK = """
import sys
import pyarrow as pa
from pipeline import VisualMemory
from pipeline.edits import compact as compacting

compacting.PACK_ROWS = 2_000
memory = VisualMemory(sys.argv[1])
if sys.argv[2] == "compact":
    assert memory.compact().committed
else:
    memory.export(sys.argv[2], "parquet", rows_per_file=2_000)
print(pa.default_memory_pool().max_memory())
"""


@pytest.mark.parametrize("verb", ["compact", "export"])
def test_memory_is_that_of_a_part(tmp_path: Path, verb: str) -> None:
    peaks = []
    for parts in (2, 8):
        memory = VisualMemory(tmp_path / f"{parts}")
        rows = 2_000 * parts
        add_vectors(memory.log, vectors(rows, dimension=256), ["a"] * rows)
        done = run(PEAK, memory.uri, verb if verb == "compact" else tmp_path / f"out{parts}")
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[0] > 1_000 * 256 * 2
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.slow
def test_on_ray_they_make_the_same(memory: VisualMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.ray_cluster.on_ray import start_ray

    monkeypatch.setattr(copy_files, "STEP_FILES", 7)
    start_ray()
    moments: list[Progress] = []
    report = memory.copy(tmp_path / "other", runner="ray", on_progress=moments.append)
    assert (report.already, moments[-1].done, moments[-1].total) == (0, report.files, report.files)
    other = VisualMemory(tmp_path / "other")
    memory.copy(tmp_path / "alone")
    assert hashes(tmp_path / "other") == hashes(tmp_path / "alone")
    assert other.verify().findings == ()
    moments.clear()
    memory.export(tmp_path / "here", rows_per_file=60)
    other.export(tmp_path / "ray", rows_per_file=60, runner="ray", on_progress=moments.append)
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "here")
    assert [m.done for m in moments] == sorted(m.done for m in moments)
    assert moments[-1].done == moments[-1].total == 350
    told = answers(memory)
    for one, runner in ((memory, "here"), (other, "ray")):
        assert one.compact(runner=runner).committed  # type: ignore[arg-type]
        assert answers(VisualMemory(one.uri)) == told
    files = [[(f.sha256, f.rows, f.first_id) for f in one.state().entries_files()] for one in (memory, other)]
    assert files[0] == files[1]
    other.index(IndexOptions(key="IVF4,Flat", target_recall=0.1))
    moments.clear()
    assert other.verify(runner="ray", on_progress=moments.append).findings == ()
    assert moments[-1].done == moments[-1].total > 20
    [shard] = other.state().index.shards  # type: ignore[union-attr]
    for file in (other.state().entries_files()[0], shard.labels, shard.index):
        assert file is not None
        with (tmp_path / "other" / file.path).open("r+b") as stream:
            stream.truncate(file.num_bytes - 1)
    alone = VisualMemory(tmp_path / "alone")
    reports = [
        one.forget(datasets=["d3"], erase=True, verify=True, runner=runner)  # type: ignore[arg-type]
        for one, runner in ((VisualMemory(shutil.copytree(alone.uri, tmp_path / "third")), "here"), (alone, "ray"))
    ]
    assert reports[0].erased == reports[1].erased > 0
    assert all(each.receipt is not None and each.receipt.proven for each in reports)
    assert alone.verify().findings == ()
    broken = other.verify(runner="ray")
    assert not broken.sound
    assert {*broken.findings} == {*other.verify().findings}


# Copies

KILLED_COPY = """
import os, signal, sys
from pipeline import VisualMemory
from pipeline.edits import copy_files

copy_files.STEP_FILES = 7
copy, left = copy_files.CopyWork.copy, [2]

def dies(work, batch):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return copy(work, batch)

copy_files.CopyWork.copy = dies
VisualMemory(sys.argv[1]).copy(sys.argv[2])
"""


def test_a_killed_copy_goes_on(memory: VisualMemory, tmp_path: Path) -> None:
    assert run(KILLED_COPY, memory.uri, tmp_path / "copy").returncode == -signal.SIGKILL
    with pytest.raises(DamagedFile, match="a copy of a memory that was not finished"):
        VisualMemory(tmp_path / "copy").status()
    moments: list[Progress] = []
    report = memory.copy(tmp_path / "copy", on_progress=moments.append)
    assert report.already == 14, "two steps of seven files"
    copying = [moment.done for moment in moments if moment.stage == "copying"]
    assert copying == list(range(report.already + report.files + 1))
    assert VisualMemory(tmp_path / "copy").verify().findings == ()


def test_steps_of_a_copy_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_files, "STEP_FILES", 3)
    monkeypatch.setattr(copy_files, "STEP_BYTES", 100)
    sizes = [10, 10, 10, 10, 95, 200, 1, 99, 1]
    files = [FileRef(path=f"packs/{place}", num_bytes=size, sha256="0" * 64) for place, size in enumerate(sizes)]
    batches = copy_files.batches_of([copy_files.ToCopy(file, None) for file in files])
    assert [[each.file.num_bytes for each in batch] for batch in batches] == [[10] * 3, [10], [95], [200], [1, 99], [1]]


# Exports

KILLED_EXPORT = """
import os, signal, sys
from pipeline import VisualMemory
from pipeline.edits.export_files import ExportWork

write = ExportWork.write

def dies(work, part):
    if part.number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(work, part)

ExportWork.write = dies
VisualMemory(sys.argv[1]).export(sys.argv[2], sys.argv[3], rows_per_file=60)
"""


def counted_files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    written: list[int] = []
    write = ExportWork.write

    def counts(work: ExportWork, part: object) -> int:
        written.append(part.number)  # type: ignore[attr-defined]
        return write(work, part)  # type: ignore[arg-type]

    monkeypatch.setattr(ExportWork, "write", counts)
    return written


@pytest.mark.parametrize("file_format", ["clip-retrieval", "parquet"])
def test_a_killed_export_goes_on(
    memory: VisualMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    whole = memory.export(tmp_path / "whole", file_format, rows_per_file=60)  # type: ignore[arg-type]
    assert run(KILLED_EXPORT, memory.uri, tmp_path / "out", file_format).returncode == -signal.SIGKILL
    with pytest.raises(SourceError, match="holds an export that was not finished"):
        VisualMemory(tmp_path / "back").add(tmp_path / "out")
    memory.forget(labels=["l0"])
    memory.compact()
    written, moments = counted_files(monkeypatch), list[Progress]()
    report = memory.export(tmp_path / "out", file_format, rows_per_file=60, on_progress=moments.append)  # type: ignore[arg-type]
    assert written == [2, 3, 4, 5]
    assert (moments[0].done, moments[-1].done, moments[-1].total) == (120, 350, 350)
    assert report.version == whole.version, "it goes on by the version that it began with"
    assert (report.already, report.entries, report.files, report.num_bytes) == (2, 350, 6, whole.num_bytes)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    back = VisualMemory(tmp_path / "back")
    back.add(tmp_path / "out")
    assert back.status()["entries"] == 350


def test_another_export_is_refused_there(memory: VisualMemory, tmp_path: Path) -> None:
    assert run(KILLED_EXPORT, memory.uri, tmp_path / "out", "parquet").returncode == -signal.SIGKILL
    with pytest.raises(UsageError, match=r"holds an unfinished export of version 15 .* 60 rows in a file: repeat"):
        memory.export(tmp_path / "out", "parquet", rows_per_file=61)
    with pytest.raises(UsageError, match="holds an unfinished export"):
        memory.export(tmp_path / "out", rows_per_file=60)
    with pytest.raises(UsageError, match="holds an unfinished export"):
        VisualMemory(memory.uri, at=3).export(tmp_path / "out", "parquet", rows_per_file=60)
    with pytest.raises(UsageError, match="runner bus is unknown"):
        memory.export(tmp_path / "out", "parquet", rows_per_file=60, runner="bus")  # type: ignore[arg-type]
    memory.compact()
    memory.expire(1)
    with pytest.raises(MemoryMissing, match="has no version 15"):
        memory.export(tmp_path / "out", "parquet", rows_per_file=60)
    (tmp_path / "out/exporting.json").unlink()
    with pytest.raises(UsageError, match="has other files in it"):
        memory.export(tmp_path / "out", "parquet", rows_per_file=60)


def test_on_the_command_line(memory: VisualMemory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*command: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            main([*command])
        said = capsys.readouterr()
        return ended.value.code, said.err if ended.value.code else said.out

    assert run(KILLED_EXPORT, memory.uri, tmp_path / "out", "parquet").returncode == -signal.SIGKILL
    again_there = ["export", memory.uri, str(tmp_path / "out"), "--format", "parquet", "--rows-per-file", "60"]
    code, said = answer(*again_there)
    assert (code, "(2 files had been before)" in said) == (0, True)
    code, said = answer("compact", memory.uri, "--runner", "here", "--json")
    assert (code, json.loads(said)["committed"]) == (0, True)
    for verb in (["compact", memory.uri], ["export", memory.uri, str(tmp_path / "new")]):
        code, said = answer(*verb, "--runner", "bus")
        assert (code, "--runner bus is unknown: give auto, here or ray" in said) == (2, True)


def test_every_live_entry_is_in_one_file(memory: VisualMemory, tmp_path: Path) -> None:
    """Files that end within an entries file, at its end, or hold several."""
    add_given(memory.log, vectors(5, seed=60), ["l1"] * 5, name="single")
    live = np.sort(memory.live().live_ids())
    for rows in (1, 7, 35, 40, 1_000):
        memory.export(tmp_path / f"{rows}", rows_per_file=rows)
        found = [np.load(path) for path in sorted((tmp_path / f"{rows}/img_emb").iterdir())]
        assert [len(one) for one in found[:-1]] == [rows] * (len(found) - 1)
        assert np.array_equal(np.concatenate(found), memory.live().vectors_of(live).astype(np.float16))
    assert os.listdir(tmp_path / "7") == os.listdir(tmp_path / "35")


def test_in_an_object_store(memory: VisualMemory, s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    there, told = s3.uri(), answers(memory)
    memory.copy(there)
    assert run(KILLED_COMPACT, there, 3).returncode == -signal.SIGKILL
    made = counted_packs(monkeypatch)
    assert VisualMemory(there).compact().committed
    assert len(made) == PACKS_MADE - 3
    assert answers(VisualMemory(there)) == told
    assert VisualMemory(there).verify().sound
    out = s3.uri()
    assert run(KILLED_EXPORT, there, out, "parquet").returncode == -signal.SIGKILL
    written = counted_files(monkeypatch)
    report = VisualMemory(there).export(out, "parquet", rows_per_file=60)
    assert (written, report.already) == ([2, 3, 4, 5], 2)
    assert "exporting.json" not in open_storage(out).list("")

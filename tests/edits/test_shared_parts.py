"""Small containers share parts: the entries are the same, and there are fewer files and marks."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import VisualMemory
from pipeline.edits.add import AddOptions, run
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.progress import Progress
from pipeline.runner import Here
from pipeline.store.lookup.originals import read_originals
from pipeline.store.segments import reservations
from pipeline.store.segments.part_marks import PartMark, marks_of, uncounted_parts
from pipeline.store.tables import ids
from pipeline.store.tables.ids import split_id
from pipeline.store.tables.schemas import embedding_column
from tests.conftest import ENCODER, IMAGE_SIZE, unit
from tests.edits.test_add import rows_of
from tests.images.archives import tar_of

TARS, INSIDE, LARGE = 14, 3, 40


@pytest.fixture
def options(weights: str) -> AddOptions:
    choice = EncoderChoice(ENCODER, weights, "positional", IMAGE_SIZE)
    return AddOptions(encoder=choice, max_rejected=1.0, labels="parent")


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Many archives of three images, one that is broken, one that is empty, and a large one between them."""
    monkeypatch.setattr(ids, "ROWS_MULTIPLE", 4)
    monkeypatch.setattr(ids, "MIN_PART_ROWS", 4)  # as many small archives, which count for one image each
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(TARS):
        members = {f"of {number % 5}/{n}.png": picture(number * INSIDE + n) for n in range(INSIDE)}
        data = tar_of(members)
        if number == 7:
            data = data[: 512 + 100]
        (folder / f"{number:04d}.tar").write_bytes(data)
    (folder / "0008.tar").write_bytes(tar_of({}))
    (folder / "0010.tar").write_bytes(tar_of({f"large/{n:03d}.png": picture(10_000 + n) for n in range(LARGE)}))
    (folder / "0011.tar").write_bytes(tar_of({"x.png": picture(1), "x.cls": b"5", "junk.dat": b"-", "y.dat": b"-"}))
    return folder


def one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as the release before did."""
    monkeypatch.setattr(reservations, "share_parts", lambda _containers: ())


def described(memory: VisualMemory) -> list[dict]:
    """What a memory has, apart from ids."""
    return rows_of(memory).drop_columns("id").to_pylist()


def rejected(memory: VisualMemory) -> list[tuple[str, str, str]]:
    [segment] = memory.state().segments
    tables = [pq.read_table(memory.log.storage.local_path(file.path)) for file in segment.rejected]
    return [(row["uri"], row["stage"], row["reason"]) for table in tables for row in table.to_pylist()]


def test_small_archives_share_parts_and_give_the_same(
    tars: Path, tmp_path: Path, options: AddOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, alone = VisualMemory(tmp_path / "together"), VisualMemory(tmp_path / "alone")
    plan = together.plan_add(tars, options)
    moments: list[Progress] = []
    report = run(together.log, None, plan, Here(), "add", moments.append)
    with monkeypatch.context() as patch:
        one_each(patch)
        other = alone.carry_out(alone.plan_add(tars, options))
    assert described(together) == described(alone)
    assert rejected(together) == rejected(alone)
    [segment], [before] = together.state().segments, alone.state().segments
    assert (len(segment.entries), len(before.entries)) == (
        plan.num_parts,
        TARS - 2,
    )  # the empty and the broken one have none
    assert plan.num_parts == 5
    assert sum(segment.container_parts) == TARS
    assert before.container_parts == ()
    left = [each.to_json() for each in (report, other)]
    for name in ("seconds", "images_per_second", "stages", "bound_by", "planned_at"):
        del left[0][name], left[1][name]
    assert left[0] == left[1]
    assert report.entries == (TARS - 4) * INSIDE + LARGE + 1
    archives = [(each.archives_done, each.archives) for each in moments if each.stage == "embedding"]
    assert (archives[0], archives[-1]) == ((0, TARS), (TARS, TARS))
    assert len(archives) == plan.num_parts + 1
    assert together.verify().findings == ()
    assert alone.verify().findings == ()


def test_every_image_is_found_in_its_archive(tars: Path, tmp_path: Path, options: AddOptions) -> None:
    memory = VisualMemory(tmp_path / "memory")
    memory.carry_out(memory.plan_add(tars, options))
    rows = rows_of(memory).select(["id", "uri", "sha256"]).to_pylist()
    found = read_originals(memory.log.storage, memory.state(), [row["id"] for row in rows])
    for row in rows:
        original = found[row["id"]]
        assert (original.read_from, original.uri, original.vector) == ("tar", row["uri"], False)
        assert original.offset is not None
        assert original.num_bytes is not None


class Stopping(Here):
    """A runner that is killed after some parts."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def do_parts(self, work: object, parts: Sequence[int], encoder: object) -> Iterable[PartMark]:
        yield from super().do_parts(work, parts[: self.parts], encoder)  # type: ignore[arg-type]
        raise KeyboardInterrupt


@pytest.mark.parametrize("planned_by", ["this release", "the release before"])
def test_a_killed_add_goes_on_with_the_parts_of_its_plan(
    tars: Path, tmp_path: Path, options: AddOptions, monkeypatch: pytest.MonkeyPatch, planned_by: str
) -> None:
    memory, whole = VisualMemory(tmp_path / "memory"), VisualMemory(tmp_path / "whole")
    with monkeypatch.context() as patch:
        if planned_by == "the release before":
            one_each(patch)
        plan = memory.plan_add(tars, options)
        with pytest.raises(KeyboardInterrupt):
            run(memory.log, memory.log.newest(), plan, Stopping(2), "add")
        whole.carry_out(whole.plan_add(tars, options))
    assert ("container_parts" in (tmp_path / "memory/segments/00000001/segment.json").read_text()) == (
        planned_by == "this release"
    )
    [under_way] = memory.status()["under_way"]
    reservation = reservations.read_reservation(memory.log.storage, 1)
    assert reservation is not None
    done = sum(reservation.num_containers_in(part) for part in range(2))
    assert (under_way["archives_done"], under_way["archives"], under_way["counted"]) == (done, TARS, False)
    assert (under_way["parts_done"], under_way["parts"]) == (2, reservation.num_parts)
    assert len(uncounted_parts(memory.log.storage, reservation)) == reservation.num_parts
    (tars / "0000a.tar").write_bytes(tar_of({"new.png": picture(5)}))  # is not in the plan, and moves nothing
    again = VisualMemory(memory.uri)
    continued = again.plan_add(tars, options)
    assert continued.num_parts == reservation.num_parts
    report = again.carry_out(continued)
    assert (report.continued, report.entries) == (True, len(rows_of(whole)))
    assert rows_of(again).equals(rows_of(whole))
    assert len(marks_of(again.log.storage, reservation)) == reservation.num_parts


def test_small_files_of_vectors_share_parts_and_images_are_apart_from_them(
    tmp_path: Path, options: AddOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vectors"
    folder.mkdir()
    for number in range(200):
        rows = 3_000 if number == 50 else 5
        table = pa.table(
            {
                "embedding": embedding_column(unit(np.random.default_rng(number).normal(size=(rows, 8)))),
                "label": [f"label {row % 3}" for row in range(rows)],
            }
        )
        pq.write_table(table, folder / f"{number:03d}.parquet")
    together, alone = VisualMemory(tmp_path / "together"), VisualMemory(tmp_path / "alone")
    report = together.add(folder)
    with monkeypatch.context() as patch:
        one_each(patch)
        assert alone.add(folder).entries == report.entries == 199 * 5 + 3_000
    assert described(together) == described(alone)
    [segment] = together.state().segments
    assert segment.container_parts[2:4] == (1, 25)  # the large one is alone
    assert max(segment.container_parts) == 25  # 128 vectors
    entry_ids = rows_of(together)["id"].to_pylist()
    assert {split_id(each)[1] for each in entry_ids} == set(range(len(segment.container_parts)))
    assert all(each.vector for each in read_originals(together.log.storage, together.state(), entry_ids[:300]).values())
    assert together.verify().findings == ()


@pytest.mark.slow
def test_ray_and_this_process_make_the_same_of_shared_parts(tars: Path, tmp_path: Path, options: AddOptions) -> None:
    from jobs.ray_cluster.on_ray import start_ray

    start_ray()
    here, there = VisualMemory(tmp_path / "here"), VisualMemory(tmp_path / "there")
    here.carry_out(here.plan_add(tars, options))
    there.carry_out(there.plan_add(tars, options), runner="ray")
    assert rows_of(here).equals(rows_of(there))


def test_labels_that_come_late_stay_with_the_images_of_their_own_archive(
    tmp_path: Path, options: AddOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "late"
    folder.mkdir()
    for number in range(6):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for name, data in [("a.png", picture(number)), ("b.png", picture(9)), ("a.cls", f"{number}".encode())]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    together, alone = VisualMemory(tmp_path / "together"), VisualMemory(tmp_path / "alone")
    mapped = AddOptions(encoder=options.encoder, labels="folder")
    assert together.plan_add(folder, mapped).num_parts == 1
    together.carry_out(together.plan_add(folder, mapped))
    with monkeypatch.context() as patch:
        one_each(patch)
        alone.carry_out(alone.plan_add(folder, mapped))
    assert described(together) == described(alone)
    assert [row["label"] for row in described(together)][::2] == [str(number) for number in range(6)]

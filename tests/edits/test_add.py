"""Adding: planned equals entries plus rejected, again adds nothing, killed and repeated ends with the same rows."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import VisualMemory
from pipeline.edits.add import AddOptions
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.errors import (
    CommitConflict,
    DamagedFile,
    IdentityMismatch,
    MemoryMissing,
    SourceError,
    UsageError,
)
from pipeline.progress import Progress
from pipeline.store.lookup.thumbnails import read_thumbnails
from pipeline.store.tables import ids
from tests.conftest import ENCODER, IMAGE_SIZE
from tests.images.pictures import encoded, gradient, write_assortment


@pytest.fixture
def options(weights: str) -> dict:
    return {"encoder": ENCODER, "weights": weights, "weights_order": "positional", "image_size": IMAGE_SIZE}


def _choice(options: dict) -> dict:
    return {"name" if key == "encoder" else key: value for key, value in options.items()}


def many_pictures(folder: Path, count: int) -> Path:
    """Small distinct pictures in three classes, one in fifty unreadable."""
    generator = np.random.default_rng(0)
    for i in range(count):
        path = folder / str(i % 3) / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shift = int(generator.integers(0, 200))
        picture = gradient(24, 24).point(lambda value, shift=shift: (value + shift) % 256)
        path.write_bytes(b"broken" if i % 50 == 7 else encoded(picture, "PNG"))
    return folder


def rows_of(memory: VisualMemory) -> pa.Table:
    files = [file for segment in memory.state().segments for file in segment.entries]
    tables = [pq.read_table(memory.log.storage.local_path(file.path)) for file in files]
    return pa.concat_tables(tables).sort_by("id")


def test_every_planned_image_is_an_entry_or_a_reject(tmp_path: Path, options: dict) -> None:
    good = write_assortment(tmp_path / "photos")
    moments: list[Progress] = []
    memory = VisualMemory(tmp_path / "memory")
    report = memory.add(tmp_path / "photos", on_progress=moments.append, **options)
    assert report.planned == len(good) == report.entries + report.rejected
    rejected = {Path(reject.uri).name: reject.reason for reject in report.rejects}
    assert set(rejected) == {name for name, fine in good.items() if not fine}
    assert rejected["zero.jpg"] == "the file is empty"
    assert "truncated" in rejected["truncated.jpg"].lower()
    last = [moment for moment in moments if moment.stage == "embedding"][-1]
    assert (last.done, last.total, last.rejected) == (13, 13, report.rejected)
    [segment] = memory.state().segments
    stored = pq.read_table(memory.log.storage.local_path(segment.rejected[0].path))
    assert stored.column_names == ["id", "uri", "stage", "reason"]
    planned = ids.part_ids(segment.number, 0, 13).tolist()
    assert sorted(rows_of(memory).column("id").to_pylist() + stored.column("id").to_pylist()) == planned


def test_entries_hold_what_the_design_says(digits_memory: VisualMemory, digits: Path) -> None:
    table = rows_of(digits_memory)
    assert table.column_names == ["id", "uri", "label", "dataset", "embedding", "sha256", "width", "height"]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: halffloat not null>[1280]"
    assert set(table.column("dataset").to_pylist()) == {"remember"}
    assert table.column("uri")[0].as_py() == str(sorted((digits / "remember").rglob("*.png"))[0])
    assert set(table.column("width").to_pylist()) == {28}


def test_adding_again_adds_nothing(digits_memory: VisualMemory, digits: Path) -> None:
    before = digits_memory.state()
    report = digits_memory.add(digits / "remember")
    assert (report.entries, report.already, report.segment) == (0, 1, None)
    assert digits_memory.state() == before


def test_what_was_all_forgotten_can_be_added_again(tmp_path: Path, digits: Path, options: dict) -> None:
    memory = VisualMemory(tmp_path / "memory")
    memory.add(digits / "ask", **options)
    memory.forget(datasets=["ask"])
    assert memory.status()["entries"] == 0
    report = memory.add(digits / "ask")
    assert (report.entries, report.segment) == (50, 2)
    assert memory.status()["entries"] == 50


def test_two_folders_become_two_datasets(tmp_path: Path, digits: Path, options: dict) -> None:
    memory = VisualMemory(tmp_path / "memory")
    memory.add(digits / "ask", **options)
    memory.add(digits / "remember", dataset="train")
    status = memory.status()
    assert status["datasets"] == {"ask": 50, "train": 100}
    assert (status["entries"], status["fresh"], status["labels"], status["version"]) == (150, 150, 5, 2)


def test_a_memory_of_scaled_decoding_decodes_queries_alike(tmp_path: Path, options: dict) -> None:
    path = tmp_path / "photos/red/photo.jpg"
    path.parent.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(noise).resize((1_200, 900)).save(path)
    exact, scaled = VisualMemory(tmp_path / "exact"), VisualMemory(tmp_path / "scaled")
    for memory, decoding in ((exact, "exact"), (scaled, "scaled")):
        memory.add(tmp_path / "photos", decoding=decoding, **options)
        [found] = memory.search([path], k=1)
        assert found[0].similarity == pytest.approx(1, abs=1e-3)
        assert (
            memory.state().identity.preprocessing.pixel_path == {"exact": "pillow", "scaled": "pillow-draft"}[decoding]
        )
    one, other = rows_of(exact), rows_of(scaled)
    assert one.column("width").equals(other.column("width"))
    assert not one.column("embedding").equals(other.column("embedding"))
    with pytest.raises(IdentityMismatch, match="decoding scaled.*not of decoding exact: leave out"):
        scaled.add(tmp_path / "photos", dataset="again", decoding="exact")
    assert scaled.add(tmp_path / "photos", dataset="again", **options).entries == 1


def test_thumbnails_outlive_the_files(tmp_path: Path, digits: Path, options: dict) -> None:
    shutil.copytree(digits / "ask", tmp_path / "photos")
    memory = VisualMemory(tmp_path / "memory")
    report = memory.add(tmp_path / "photos", thumbnails=True, **options)
    shutil.rmtree(tmp_path / "photos")
    asked = next((digits / "remember/1").iterdir())
    decision = memory.explain(asked, k=6, html=tmp_path / "why.html")
    page = (tmp_path / "why.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 7
    assert "no picture" not in page
    ids = [neighbor.id for neighbor in decision.neighbors]
    kept = read_thumbnails(memory.log.storage, report.state, ids)
    assert list(kept) == sorted(ids)
    assert {Image.open(io.BytesIO(jpeg)).size for jpeg in kept.values()} == {(112, 112)}


def test_one_image_counts_at_once(tmp_path: Path, digits: Path, options: dict) -> None:
    memory = VisualMemory(tmp_path / "memory")
    memory.add(digits / "remember", **options)
    image = next((digits / "ask/3").iterdir())
    memory.add(image)
    [neighbors] = memory.search([image], k=1)
    assert neighbors[0].uri == str(image)
    assert neighbors[0].label == "3"
    assert neighbors[0].similarity == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"encoder": "resnet18"}, "not of resnet18 at 64 pixels"),
        ({"image_size": 96}, "not of tf_efficientnet_lite0 at 96 pixels"),
    ],
)
def test_another_encoder_is_refused(digits_memory: VisualMemory, digits: Path, asked: dict, message: str) -> None:
    before = digits_memory.state()
    with pytest.raises(IdentityMismatch, match=message):
        digits_memory.add(digits / "ask", **asked)
    assert digits_memory.state() == before


def test_other_weights_are_refused(digits_memory: VisualMemory, digits: Path, tmp_path: Path, weights: str) -> None:
    import torch

    tensors = torch.load(weights, weights_only=True)
    tensors["_conv_stem.weight"] = tensors["_conv_stem.weight"] * 1.001
    torch.save(tensors, tmp_path / "other.pth")
    with pytest.raises(IdentityMismatch, match=r"is one of tf_efficientnet_lite0 \(weights"):
        digits_memory.add(digits / "ask", weights=tmp_path / "other.pth", weights_order="positional")


def test_nothing_readable_adds_nothing_and_can_be_mended(tmp_path: Path, options: dict) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"broken")
    memory = VisualMemory(tmp_path / "memory")
    with pytest.raises(SourceError, match=r"none of the 1 images of .* could be read .* nothing was added"):
        memory.add(tmp_path / "photos", **options)
    with pytest.raises(MemoryMissing):
        memory.status()
    (tmp_path / "photos/a.jpg").write_bytes(encoded(gradient(), "JPEG"))
    assert memory.add(tmp_path / "photos", **options).entries == 1


def test_a_folder_of_other_files_is_not_taken_for_a_memory(tmp_path: Path, digits: Path, options: dict) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(MemoryMissing, match="it comes before SOURCE"):
        VisualMemory(tmp_path / "home").add(digits / "ask", **options)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]


def test_the_past_cannot_be_changed(digits_memory: VisualMemory, digits: Path) -> None:
    with pytest.raises(UsageError, match="can only be read"):
        VisualMemory(digits_memory.uri, at=1).add(digits / "ask")


def interrupted(memory: VisualMemory, source: Path, parts: int, **options: object) -> None:
    """An add that is stopped once some parts are done."""

    def stop(moment: Progress) -> None:
        if moment.done >= parts * 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory.add(source, on_progress=stop, **options)


def test_segments_that_finish_out_of_order_are_found_as_well(tmp_path: Path, options: dict, digits: Path) -> None:
    memory = VisualMemory(tmp_path / "memory")
    late = many_pictures(tmp_path / "late", 200)
    interrupted(memory, late, 1, **options)
    memory.add(digits / "ask", **options)
    memory.add(late)
    assert [segment.number for segment in memory.state().segments] == [1, 2]
    for _ in range(2):
        live = memory.live()
        ids = live.live_ids()
        truth = dict(
            zip(rows_of(memory).column("id").to_pylist(), rows_of(memory).column("label").to_pylist(), strict=True)
        )
        assert [live.labels[code] for code in live.codes_of(ids)] == [truth[i] for i in ids.tolist()]
        [decision] = memory.classify([next((digits / "ask/0").iterdir())], k=5, exclude=ids[:3].tolist())
        assert not {n.id for n in decision.neighbors} & set(ids[:3].tolist())
        memory.index()


def test_another_encoder_set_meanwhile_is_refused(tmp_path: Path, options: dict, digits: Path) -> None:
    ours, theirs = VisualMemory(tmp_path / "memory"), VisualMemory(tmp_path / "memory")
    plan = ours.plan_add(digits / "ask", AddOptions(encoder=EncoderChoice(**_choice(options))))
    theirs.add(digits / "remember", **options | {"image_size": 32})
    with pytest.raises(IdentityMismatch):
        ours.carry_out(plan)
    assert len(ours.state().segments) == 1


def test_the_same_source_added_meanwhile_is_not_added_twice(tmp_path: Path, options: dict, digits: Path) -> None:
    ours, theirs = VisualMemory(tmp_path / "memory"), VisualMemory(tmp_path / "memory")
    plan = ours.plan_add(digits / "ask", AddOptions(encoder=EncoderChoice(**_choice(options))))
    theirs.add(digits / "ask", **options)
    assert ours.carry_out(plan).already == 1

    def other_writer(moment: Progress) -> None:
        if moment.stage != "embedding":
            return
        with pytest.raises(CommitConflict, match="is adding .*/ask right now: wait until it is done"):
            theirs.add(digits / "ask", dataset="second")

    ours.add(digits / "ask", dataset="second", on_progress=other_writer)
    assert ours.status()["datasets"] == {"ask": 50, "second": 50}


def test_a_crash_before_the_first_reservation_does_not_lock_the_memory(
    tmp_path: Path, options: dict, digits: Path
) -> None:
    memory = VisualMemory(tmp_path / "memory")
    plan = memory.plan_add(digits / "ask", AddOptions(encoder=EncoderChoice(**_choice(options))))
    path = memory.log.storage.local_path(plan.encoder.keep(memory.log.storage).path)
    path.write_bytes(path.read_bytes()[:-100])  # not even the weights came to their end
    assert memory.add(digits / "ask", **options).entries == 50
    assert VisualMemory(memory.uri).classify([next((digits / "ask/2").iterdir())], k=1)[0].label == "2"


@pytest.mark.parametrize("refresh", [False, True])
def test_an_interrupted_add_goes_on_with_its_frozen_plan(tmp_path: Path, options: dict, refresh: bool) -> None:
    source = many_pictures(tmp_path / "pictures", 200)
    memory = VisualMemory(tmp_path / "memory")
    interrupted(memory, source, 1, **options)
    (source / "0/new.png").write_bytes(encoded(gradient(), "PNG"))
    report = memory.add(source, refresh=refresh, **options)
    assert (report.segment, report.planned, report.unplanned) == (1, 200, 1 if refresh else None)
    assert report.continued
    assert report.planned_at is not None
    again = memory.add(source)
    assert (again.unplanned, again.continued, again.planned_at) == (1, False, None)


def test_a_plan_whose_images_are_gone_is_given_up_when_asked(tmp_path: Path, options: dict) -> None:
    source = many_pictures(tmp_path / "pictures", 200)
    memory = VisualMemory(tmp_path / "memory")
    interrupted(memory, source, 1, **options)
    for path in list(source.rglob("*.png"))[:150]:
        path.unlink()
    with pytest.raises(SourceError, match=r"were rejected .*no such file.*`refresh` lists it again"):
        memory.add(source, **options)
    report = memory.add(source, refresh=True, **options)
    assert (report.segment, report.planned, report.unplanned, report.continued) == (2, 50, 0, False)


@pytest.mark.slow
def test_an_actor_tells_what_the_library_would(tmp_path: Path, options: dict, digits: Path) -> None:
    from jobs.ray_cluster.on_ray import start_ray

    memory = VisualMemory(tmp_path / "memory")
    plan = memory.plan_add(digits / "ask", AddOptions(encoder=EncoderChoice(**_choice(options))))

    def damage(_: Progress) -> None:
        [path] = Path(memory.uri).glob("encoder/*.safetensors")
        path.write_bytes(path.read_bytes()[:-100])

    start_ray()
    with pytest.raises(DamagedFile, match="does not hold the weights it is named after"):
        memory.carry_out(plan, runner="ray", on_progress=damage)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_and_this_process_make_the_same_rows(tmp_path: Path, options: dict) -> None:
    from jobs.ray_cluster.on_ray import start_ray

    source = many_pictures(tmp_path / "pictures", 300)
    here, there = VisualMemory(tmp_path / "here"), VisualMemory(tmp_path / "there")
    here.add(source, **options)
    start_ray()
    moments: list[Progress] = []
    report = there.add(source, runner="ray", on_progress=moments.append, **options)
    assert (report.entries, report.rejected) == (294, 6)
    assert [moment.done for moment in moments if moment.stage == "embedding"][-1] == 300
    assert rows_of(there).equals(rows_of(here))


KILLED = """
import sys
from pipeline import VisualMemory
source, memory, weights = sys.argv[1:]
VisualMemory(memory).add(source, encoder={encoder!r}, weights=weights, weights_order="positional", image_size={size})
"""


@pytest.mark.timeout(300)
def test_killed_and_repeated_ends_with_the_rows_of_an_undisturbed_run(
    tmp_path: Path, options: dict, weights: str
) -> None:
    source = many_pictures(tmp_path / "pictures", 1_000)
    undisturbed = VisualMemory(tmp_path / "undisturbed")
    undisturbed.add(source, **options)
    memory = VisualMemory(tmp_path / "killed")
    marks = Path(memory.uri) / "segments/00000001/done"
    script = KILLED.format(encoder=ENCODER, size=IMAGE_SIZE)
    process = subprocess.Popen([sys.executable, "-c", script, str(source), memory.uri, weights])
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if marks.is_dir() and len([path for path in marks.iterdir() if path.suffix == ".json"]) >= 2:
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert memory.log.newest() is None
    finished = len(memory.log.storage.list("segments/00000001/done"))
    assert 2 <= finished < 8
    times = {path.name: path.stat().st_mtime_ns for path in marks.iterdir() if path.suffix == ".json"}
    report = memory.add(source, **options)
    assert (report.segment, report.entries, report.rejected) == (1, 980, 20)
    assert report.resumed == finished * 128
    assert {name: (marks / name).stat().st_mtime_ns for name in times} == times
    assert rows_of(memory).equals(rows_of(undisturbed))

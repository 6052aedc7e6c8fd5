"""Adding from every kind of source: files, tar archives and Parquet files, in folders and on S3."""

import io
import os
import random
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import VisualMemory
from pipeline.embeddings import tally
from pipeline.errors import SourceError, StorageError, UsageError
from pipeline.images.containers.container import ImageChoice
from pipeline.images.decoding.decode import decode
from pipeline.images.entry_pictures import read_image
from pipeline.images.labels.labels import Labels
from pipeline.images.reading import files
from pipeline.images.sources.listing import list_source
from pipeline.images.sources.ordering import SortSizes
from pipeline.store.tables.ids import split_id
from tests.conftest import ENCODER, IMAGE_SIZE
from tests.edits.test_add import rows_of
from tests.images.pictures import bomb, encoded, gradient
from tests.store.proxy import behind_proxy
from tests.store.seaweed import SeaweedFS


@pytest.fixture
def options(weights: str) -> dict:
    return {"encoder": ENCODER, "weights": weights, "weights_order": "positional", "image_size": IMAGE_SIZE}


def picture(number: int, kind: str = "PNG") -> bytes:
    return encoded(gradient(24, 24).point(lambda value: (value + 7 * number) % 256), kind)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, images: list[bytes | None], labels: list[str], rows_a_group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"image": pa.array(images, pa.binary()), "label": labels}), path, row_group_size=rows_a_group
    )
    return path


def write_mixed(folder: Path) -> Path:
    """Loose files, two archives and a Parquet file: 6 + 5 + 9 images, one of each kind unreadable."""
    for number, name in enumerate(["cat/1.png", "cat/2.JPG", "dog/100%.webp", "dog/a#b ü.png", "dog/5.gif", "bad.png"]):
        path = folder / "loose" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".png": "PNG", ".JPG": "JPEG", ".webp": "WEBP", ".gif": "GIF"}[path.suffix]
        path.write_bytes(b"broken" if name == "bad.png" else picture(number, kind))
    first = {"a.png": picture(10), "a.cls": b"cat", "b.png": picture(11), "b.json": b'{"label": "dog"}', "c.png": b"?"}
    write_tar(folder / "tars/0.tar", first)
    write_tar(folder / "tars/1.tar", {"cat/x#1.png": picture(13), "dog/y.png": picture(14)})
    images: list[bytes | None] = [picture(20 + row) for row in range(9)]
    images[5] = None
    write_parquet(folder / "tables/t.parquet", images, ["cat", "dog", "cat"] * 3)
    return folder


def entries_of(memory: VisualMemory) -> dict[str, tuple[int, str | None, str]]:
    """id, label and dataset of every live entry by uri."""
    found = {}
    for block in memory.live().blocks:
        rows = zip(block.uris.to_pylist(), block.ids_N, block.codes_N, block.datasets.to_pylist(), strict=True)
        names = memory.live().labels
        found |= {uri: (int(i), names[code] if code >= 0 else None, dataset) for uri, i, code, dataset in rows}
    return found


def use(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be one that knows the server and its credentials."""
    for name, value in s3.admin.items():
        monkeypatch.setenv(name, value)
    files._file_system.cache_clear()


@pytest.fixture(params=["folder", "s3"])
def mixed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The mixed source, in a folder and in a bucket."""
    folder = write_mixed(tmp_path / "mixed")
    if request.param == "folder":
        return str(folder)
    s3: SeaweedFS = request.getfixturevalue("s3")
    use(s3, monkeypatch)
    uri = s3.uri()
    there = fsspec.filesystem("s3", skip_instance_cache=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            there.put_file(str(path), f"{uri.removeprefix('s3://')}/{path.relative_to(folder)}")
    return uri


def test_a_mixed_bucket_becomes_one_memory_with_three_datasets(mixed: str, tmp_path: Path, options: dict) -> None:
    memory = VisualMemory(tmp_path / "memory")
    for dataset in ("loose", "tars", "tables"):
        report = memory.add(f"{mixed}/{dataset}", **options)
        assert report.planned == report.entries + report.rejected
        assert report.rejected == 1
    found = memory.status()
    assert found["datasets"] == {"loose": 5, "tables": 8, "tars": 4}
    assert (found["planned"], found["entries"], found["rejected"], found["under_way"]) == (20, 17, 3, [])
    entries = entries_of(memory)
    below = {uri.partition(mixed.rpartition("/")[2] + "/")[2]: entry[1:] for uri, entry in entries.items()}
    assert below["loose/dog/100%25.webp"] == ("dog", "loose")
    assert below["loose/dog/a%23b ü.png"] == ("dog", "loose")
    assert below["loose/cat/2.JPG"] == ("cat", "loose")
    assert (below["tars/0.tar#a.png"], below["tars/0.tar#b.png"]) == (("cat", "tars"), ("dog", "tars"))
    assert below["tars/1.tar#cat/x%231.png"] == ("cat", "tars")
    assert below["tables/t.parquet#row=4"] == ("dog", "tables")
    assert "tables/t.parquet#row=5" not in below
    assert not memory.verify().findings
    for dataset in ("loose", "tars", "tables"):
        again = memory.add(f"{mixed}/{dataset}")
        assert (again.segment, again.unplanned) == (None, 0)
    [decision] = memory.classify([picture(10)], k=1)
    assert (decision.label, decision.neighbors[0].similarity) == ("cat", pytest.approx(1, abs=1e-3))


def test_a_whole_bucket_in_one_add(mixed: str, tmp_path: Path, options: dict) -> None:
    memory = VisualMemory(tmp_path / "memory")
    report = memory.add(mixed, **options)
    assert (report.planned, report.entries, report.rejected) == (20, 17, 3)
    numbers = {uri.rpartition("/")[2]: split_id(entry[0])[1:] for uri, entry in entries_of(memory).items()}
    assert numbers["1.png"] == (0, 1)  # bad.png is the first
    assert numbers["t.parquet#row=0"] == (1, 0)
    assert numbers["t.parquet#row=4"] == (1, 4)  # row groups that are small go together
    assert (numbers["0.tar#b.png"], numbers["y.png"]) == ((1, 10), (1, 13))
    assert not memory.verify().findings


def test_forgetting_and_erasing_what_came_in_containers(tmp_path: Path, options: dict) -> None:
    memory = VisualMemory(tmp_path / "memory")
    folder = write_mixed(tmp_path / "mixed")
    memory.add(folder, **options)
    entries = entries_of(memory)
    gone = [uri for uri in entries if uri.endswith(("0.tar#a.png", "t.parquet#row=0", "loose/cat/1.png"))]
    report = memory.forget(uris=gone, erase=True, verify=True)
    assert report.receipt is not None
    assert report.receipt.proven
    assert set(entries_of(memory)) == set(entries) - set(gone)
    assert not memory.verify().findings
    assert memory.status()["planned"] == 17
    assert memory.add(folder).segment is None


def test_what_is_ours_below_a_source_is_no_part_of_it(tmp_path: Path, options: dict) -> None:
    folder = write_mixed(tmp_path / "mixed")
    memory = VisualMemory(folder / "my.memory")
    assert memory.add(folder, **options).planned == 20
    memory.classify_source(folder, folder / "decided", k=3)
    again = memory.add(folder, dataset="again")
    assert (again.planned, again.rejected) == (20, 3)


def test_labels_from_a_file_for_files_and_members(tmp_path: Path, options: dict) -> None:
    folder = write_mixed(tmp_path / "mixed")
    named = {"loose/cat/1.png": "tom", f"{folder}/tars/0.tar#b.png": "rex", f"{folder}/tables/t.parquet#row=3": "kit"}
    (tmp_path / "labels.csv").write_text("uri,label\n" + "".join(f"{uri},{label}\n" for uri, label in named.items()))
    memory = VisualMemory(tmp_path / "memory")
    memory.add(folder, labels=f"file:{tmp_path / 'labels.csv'}", **options)
    found = {label: uri for uri, (_, label, _) in entries_of(memory).items() if label}
    assert {label: uri.removeprefix(f"{folder}/") for label, uri in found.items()} == {
        label: uri.removeprefix(f"{folder}/") for uri, label in named.items()
    }
    memory.add(folder, dataset="none", labels="none")
    assert memory.status()["labels"] == 3
    with pytest.raises(SourceError, match="there is no file|cannot be read"):
        memory.add(folder, labels="file:nowhere.csv")
    with pytest.raises(UsageError, match="column:NAME"):
        memory.add(folder, labels="columns")


def test_a_list_of_uris_is_added_asked_and_decided(tmp_path: Path, options: dict) -> None:
    folder = write_mixed(tmp_path / "mixed")
    named = [f"{folder}/loose/cat/1.png", "mixed/loose/dog/a#b ü.png", f"{folder}/tars/1.tar", "mixed/loose/bad.png"]
    table = {"path": named, "label": ["tom", "rex", None, "tom"], "year": [2024, 2025, None, 2026]}
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    memory = VisualMemory(tmp_path / "memory")
    report = memory.add(tmp_path / "list.parquet", keep=["year"], **options)
    assert (report.planned, report.entries, report.rejected) == (5, 4, 1)
    found = {uri.removeprefix(f"{folder}/"): entry[1:] for uri, entry in entries_of(memory).items()}
    assert found["loose/cat/1.png"] == ("tom", "list")
    assert found["loose/dog/a%23b ü.png"] == ("rex", "list")
    assert found["tars/1.tar#dog/y.png"] == ("dog", "list")
    [[nearest]] = memory.search([picture(0)], k=1, where="year = 2024")
    assert nearest.uri.endswith("cat/1.png")
    assert memory.add(tmp_path / "list.parquet", keep=["year"]).already == report.segment
    asked = memory.evaluate(tmp_path / "list.parquet", ks=[1], votings=["plurality"])
    assert (asked.num_queries, asked.accuracy["plurality"][1]) == (4, 100.0)
    memory.classify_source(tmp_path / "list.parquet", tmp_path / "out", k=1)
    assert pq.read_table(tmp_path / "out/decisions").num_rows == 4
    assert not memory.verify().findings


def test_a_column_for_labels(tmp_path: Path, options: dict) -> None:
    path = tmp_path / "t.parquet"
    table = {"jpg": pa.array([picture(row) for row in range(4)]), "breed": ["a", "b", None, "b"], "label": [1, 2, 3, 4]}
    pq.write_table(pa.table(table), path)
    memory = VisualMemory(tmp_path / "memory")
    memory.add(path, labels="column:breed", **options)
    assert memory.status()["entries_by_label"] == {"a": 1, "b": 2}
    with pytest.raises(SourceError, match="breeds"):
        memory.add(path, labels="column:breeds")


def test_an_unsorted_archive_is_remembered_asked_and_decided_by_its_labels(tmp_path: Path, options: dict) -> None:
    images = {f"data/{row}.png": picture(row) for row in range(6)}
    labels = {f"data/{row}.cls": b"even" if row % 2 == 0 else b"odd" for row in range(6)}
    write_tar(tmp_path / "a/unsorted.tar", images | labels)
    memory = VisualMemory(tmp_path / "memory")
    report = memory.add(tmp_path / "a", **options)
    assert report.census.counts == {"even": 3, "odd": 3}
    assert {label for _, label, _ in entries_of(memory).values()} == {"even", "odd"}
    asked = memory.evaluate(tmp_path / "a/unsorted.tar", ks=[1], votings=["plurality"])
    assert (asked.num_queries, asked.accuracy["plurality"][1]) == (6, 100.0)
    memory.classify_source(tmp_path / "a", tmp_path / "out")
    decided = pq.read_table(tmp_path / "out/decisions").to_pylist()
    assert sorted(row["source_label"] for row in decided) == ["even"] * 3 + ["odd"] * 3
    # A picture of a member is that member's, a mask's too.
    write_tar(tmp_path / "b/m.tar", {"1.png": picture(1), "1.seg.png": picture(2), "x/3.png": picture(3)})
    masks = memory.add(tmp_path / "b", image_extension="seg.png", exclude=["x"], label="mask")
    assert (masks.entries, masks.census.counts, masks.passed_over.excluded) == (1, {"mask": 1}, 1)
    assert read_image(f"{tmp_path}/b/m.tar#1.seg.png") == picture(2)
    assert memory.add(tmp_path / "b", image_extension="seg.png", exclude=["x"], label="mask").already == masks.segment
    assert memory.add(tmp_path / "b", label="picture").entries == 2
    pictures = memory.add(tmp_path / "b", image_extension="png", label="picture")
    assert (pictures.entries, pictures.notes.masks) == (2, {".seg.png": 1}), "a mask is no .png"


def test_evaluating_a_source_with_splits(tmp_path: Path, options: dict) -> None:
    for number, name in enumerate(["train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "@eaDir/x/4.png"]):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(picture(number))
    memory = VisualMemory(tmp_path / "memory")
    memory.add(tmp_path / "images/train", **options)
    asked = memory.evaluate(tmp_path / "images", labels="parent", exclude_files=["test"], ks=[1])
    assert (asked.num_queries, asked.accuracy["rank"][1]) == (2, 100.0)


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.7])
def test_truncated_archives_and_tables_lose_nothing_silently(tmp_path: Path, options: dict, cut: float) -> None:
    tar = write_tar(tmp_path / "s/a.tar", {f"{row}.png": picture(row) for row in range(30)})
    table = write_parquet(tmp_path / "s/b.parquet", [picture(row) for row in range(30)], ["x"] * 30)
    for path in (tar, table):
        os.truncate(path, int(path.stat().st_size * cut))
    write_tar(tmp_path / "s/c.tar", {"fine.png": picture(1)})
    memory = VisualMemory(tmp_path / "memory")
    report = memory.add(tmp_path / "s", **options)
    assert report.planned == report.entries + report.rejected
    rejected = {reject.uri.rpartition("/")[2].partition("#")[0]: reject.reason for reject in report.rejects}
    assert set(rejected) == {"a.tar", "b.parquet"}
    assert "not a Parquet file" in rejected["b.parquet"]
    assert report.entries > 30 * cut * 0.5
    assert not memory.verify().findings


def test_bombs_and_twins_in_containers(tmp_path: Path, options: dict) -> None:
    """A bomb is rejected by what its header claims; images that are twice in a source are two entries."""
    write_tar(tmp_path / "s/a.tar", {"1.png": picture(1), "2.png": bomb(), "3.png": picture(1), "3.PNG": picture(3)})
    write_parquet(tmp_path / "s/b.parquet", [picture(1), bomb(), picture(1)], ["x"] * 3)
    memory = VisualMemory(tmp_path / "memory")
    report = memory.add(tmp_path / "s", **options)
    assert (report.entries, report.rejected) == (5, 2)
    assert {(r.uri.rpartition("/")[2], r.reason) for r in report.rejects} == {
        ("a.tar#2.png", "more than 178,956,970 pixels"),
        ("b.parquet#row=1", "more than 178,956,970 pixels"),
    }
    assert len({n.id for n in memory.search([picture(1)], k=10)[0] if n.similarity > 0.9999}) == 4


def test_wrong_tables_are_named_at_once(tmp_path: Path, options: dict) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(SourceError, match="text"):
        VisualMemory(tmp_path / "memory").add(tmp_path / "t.parquet", **options)
    assert not (tmp_path / "memory").exists()


def test_too_many_rejected_stop_an_add_and_keep_what_is_done(tmp_path: Path, options: dict) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in range(300):
        (folder / f"{row:03d}.png").write_bytes(b"broken" if 128 <= row < 160 else picture(row))
    memory = VisualMemory(tmp_path / "memory")
    with pytest.raises(SourceError, match=r"32 of the first 256 images .*/128.png: not an image.*`max_rejected`"):
        memory.add(folder, **options)
    [add] = memory.status()["under_way"]
    assert (add["planned"], add["done"], add["rejected"], add["left"], add["running"]) == (300, 256, 32, 44, False)
    report = memory.add(folder, max_rejected=0.2, **options)
    assert (report.resumed, report.entries, report.rejected) == (256, 268, 32)
    assert memory.status()["under_way"] == []


def test_a_handful_of_rejects_stops_nothing_unless_told(tmp_path: Path, options: dict) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in range(4):
        (folder / f"{row}.png").write_bytes(b"broken" if row else picture(row))
    with pytest.raises(SourceError, match="3 of the first 4"):
        VisualMemory(tmp_path / "strict").add(folder, max_rejected=0, **options)
    assert VisualMemory(tmp_path / "memory").add(folder, **options).rejected == 3
    with pytest.raises(UsageError, match="is not a share"):
        VisualMemory(tmp_path / "memory").add(folder, max_rejected=5)


def test_all_rejects_are_counted_and_the_first_told(
    tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/0.png").write_bytes(picture(0))
    for number in range(1, 6):
        (tmp_path / f"s/{number}.png").write_bytes(b"broken")
    monkeypatch.setattr(tally, "REJECTS_REPORTED", 2)
    report = VisualMemory(tmp_path / "memory").add(tmp_path / "s", **options)
    assert (report.entries, report.rejected, report.to_json()["rejected"]) == (1, 5, 5)
    assert [reject.uri.rpartition("/")[2] for reject in report.rejects] == ["1.png", "2.png"]


def test_an_object_that_vanishes_is_rejected(
    s3: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    use(s3, monkeypatch)
    uri = s3.uri()
    there = fsspec.filesystem("s3", skip_instance_cache=True)
    for row in range(3):
        there.pipe_file(f"{uri}/{row}.png", picture(row))
    there.pipe_file(f"{uri}/z.tar", b"".join([write_tar(tmp_path / "z.tar", {"a.png": picture(5)}).read_bytes()]))
    memory = VisualMemory(tmp_path / "memory")
    plan = memory.plan_add(uri, _options(options))
    there.rm_file(f"{uri}/1.png")
    there.rm_file(f"{uri}/z.tar")
    report = memory.carry_out(plan)
    [[nearest]] = memory.search([f"{uri}/0.png"], k=1)
    assert nearest.uri == f"{uri}/0.png"
    assert (report.entries, {reject.reason for reject in report.rejects}) == (2, {"there is no such file"})
    assert report.planned == 4


def _options(options: dict):
    from pipeline.edits.add import AddOptions
    from pipeline.embeddings.encoder_choice import EncoderChoice

    names = {"encoder": "name"}
    return AddOptions(encoder=EncoderChoice(**{names.get(key, key): value for key, value in options.items()}))


def test_what_is_wrong_with_a_bucket_is_said_at_once(
    s3: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    use(s3, monkeypatch)
    memory = VisualMemory(tmp_path / "memory")
    with pytest.raises(SourceError, match="there is nothing at"):
        memory.add(f"{s3.uri()}/nothing", **options)
    with pytest.raises(StorageError, match="there is no bucket"):
        memory.add("s3://no-such-bucket/photos", **options)
    with pytest.raises(SourceError, match="fsspec"):
        memory.add("what://is/this", **options)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    files._file_system.cache_clear()
    with pytest.raises(StorageError, match="refuses these credentials"):
        memory.add(s3.uri(), **options)


def test_what_a_user_writes_for_a_bucket_is_taken_as_it_is(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(s3, monkeypatch)
    uri = s3.uri()
    there = fsspec.filesystem("s3", skip_instance_cache=True)
    keys = ["my%20pics/cat/1.png", "per%cent/c#t/1.png", "ds//cat/1.png", "ds//dog//2.png", "ds//3.png"]
    keys += ["nas/cat/1.png", "nas/cat/@eaDir/1.png/x.png", "nas/cat/@eaDir/2.png/x.png", "nas/#recycle/3.png"]
    for number, key in enumerate(keys):
        there.pipe_file(f"{uri}/{key}", picture(number))
    for name, label, below in (("my%20pics", "cat", "my%2520pics"), ("per%cent", "c#t", "per%25cent")):
        listing = list_source(f"{uri}/{name}", Labels())
        assert (listing.uri, listing.labels) == (f"{uri}/{below}", [label])
        assert list_source(f"{uri}/{name}/{label}/1.png", Labels()).planned == 1
        decode(files.read_file(listing.images.column("uri").to_pylist()[0]))
    doubled = list_source(f"{uri}/ds", Labels())
    assert doubled.images.column("label").to_pylist() == [None, "cat", "dog"]
    for image in doubled.images.column("uri").to_pylist():
        decode(files.read_file(image))
    found = list_source(f"{uri}/nas", Labels(), (), ImageChoice(("3.png",)))
    assert (found.planned, found.labels) == (1, ["cat"])
    assert found.passed_over.leftovers == {"@eaDir": 1, "#recycle": 1}


def test_plans_of_any_length_are_listed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.images.sources.gathering.SORT", SortSizes(batch_rows=7))
    names = ["a/b.png", "a.png", "a/b/c.png", "a-b.png", "A.PNG", "b.png", "a/z.jpeg", "é/x.png", "a%/y.png", "a#.png"]
    for name in [*names, *(f"many/{row}.gif" for row in range(40))]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if not (tmp_path / name).is_dir():
            (tmp_path / name).touch()
    uris = list_source(str(tmp_path), Labels()).images.column("uri").to_pylist()
    assert uris == sorted(uris)
    assert len(uris) == 50
    there = fsspec.filesystem("memory")
    for name in names:
        there.pipe_file(f"/bucket/{name}", b"x")
    remote = list_source("memory://bucket", Labels())
    below = [uri.partition("bucket/")[2] for uri in remote.images.column("uri").to_pylist()]
    assert below == sorted(below)
    assert len(below) == 10
    assert remote.labels == ["a", "a%", "é"]


def test_a_store_that_fails_now_and_then_loses_nothing(
    s3: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    use(s3, monkeypatch)
    uri = s3.uri()
    there = fsspec.filesystem("s3", skip_instance_cache=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: there.pipe_file(f"{uri}/x/{row:03d}.png", picture(row)), range(200)))
    write_tar(tmp_path / "a.tar", {f"y/{row}.png": picture(row) for row in range(60)})
    write_parquet(tmp_path / "b.parquet", [picture(row) for row in range(60)], ["z"] * 60)
    for name in ("a.tar", "b.parquet"):
        there.put_file(str(tmp_path / name), f"{uri}/{name}")
    undisturbed = VisualMemory(tmp_path / "undisturbed")
    undisturbed.add(uri, **options)
    spoiled = 0

    def judge(_method: str, _path: str, status: int) -> int | Literal["cut"]:
        nonlocal spoiled
        chance = random.Random(spoiled * 7 + len(asked)).random()
        asked.append(chance)
        if chance > 0.06 or status >= 400:
            return status
        spoiled += 1
        return 503 if chance < 0.03 else "cut"

    asked: list[float] = []
    files._file_system.cache_clear()
    with behind_proxy(s3, monkeypatch, judge):
        memory = VisualMemory(tmp_path / "memory")
        report = memory.add(uri, **options)
    files._file_system.cache_clear()
    assert spoiled > 5
    assert (report.entries, report.rejected) == (320, 0)
    assert rows_of(memory) == rows_of(undisturbed)


def test_one_object_that_never_comes_is_rejected_and_an_outage_ends_the_add(
    s3: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    use(s3, monkeypatch)
    monkeypatch.setattr(files, "WAIT", 0.01)
    files._file_system.cache_clear()
    uri = s3.uri()
    there = fsspec.filesystem("s3", skip_instance_cache=True)
    for row in range(6):
        there.pipe_file(f"{uri}/{row}.png", picture(row))
    outage = threading.Event()

    def judge(method: str, path: str, status: int) -> int | Literal["cut"]:
        sick = method == "GET" and path.endswith("/3.png")
        return 500 if sick or outage.is_set() else status

    memory = VisualMemory(tmp_path / "memory")
    files._file_system.cache_clear()
    with behind_proxy(s3, monkeypatch, judge):
        plan = memory.plan_add(uri, _options(options))
        outage.set()
        with pytest.raises(StorageError, match="could not be read in 5 attempts"):
            memory.carry_out(plan)
        outage.clear()
        report = memory.carry_out(plan)
    files._file_system.cache_clear()
    assert (report.entries, report.rejected) == (5, 1)
    assert report.rejects[0].reason == "the store did not give it out in 5 attempts"

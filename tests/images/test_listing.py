"""The folder source: what counts as an image, what its label is, and in which order it comes."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SourceError, UsageError
from pipeline.images.labels.labels import Labels
from pipeline.images.names.leftovers import Exclusion, PassedOver
from pipeline.images.names.uris import path_of_uri, uri_of_path
from pipeline.images.sources import listing as listing_module
from pipeline.images.sources import part_limit
from pipeline.images.sources.listing import list_source
from pipeline.images.sources.source_files import Walk
from pipeline.images.sources.walk import walk_source
from pipeline.store.tables import ids

ROOT = Path(__file__).parents[2]


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def test_labels_are_the_first_folder_and_order_is_by_uri(tmp_path: Path) -> None:
    make(tmp_path / "photos", "dog/b.jpg", "cat/deep/a.PNG", "cat/z.webp", "flat.tif", "notes.txt", ".hidden.jpg")
    listing = list_source(str(tmp_path / "photos"), Labels())
    root = str(tmp_path / "photos")
    assert listing.images.column("uri").to_pylist() == [
        f"{root}/cat/deep/a.PNG",
        f"{root}/cat/z.webp",
        f"{root}/dog/b.jpg",
        f"{root}/flat.tif",
    ]
    assert listing.images.column("label").to_pylist() == ["cat", "cat", "dog", None]
    assert (listing.skipped, listing.name, listing.num_bytes) == (1, "photos", 4)


def test_labels_none(tmp_path: Path) -> None:
    make(tmp_path, "dog/b.jpg")
    assert list_source(str(tmp_path), Labels("none")).images.column("label").to_pylist() == [None]


def test_a_single_image_is_labelled_by_its_folder(tmp_path: Path) -> None:
    make(tmp_path, "dog/b.jpg", "dog/c.jpg")
    listing = list_source(str(tmp_path / "dog/b.jpg"), Labels())
    assert listing.images.num_rows == 1
    assert listing.images.column("label").to_pylist() == ["dog"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    make(tmp_path / "real", "dog/a.jpg")
    (tmp_path / "real/again").symlink_to(tmp_path / "real")
    (tmp_path / "real/broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    uris = list_source(str(tmp_path / "real"), Labels()).images.column("uri").to_pylist()
    assert uris == [str(tmp_path / "real/broken.jpg"), str(tmp_path / "real/dog/a.jpg")]


def test_a_link_to_itself_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "cat/round.jpg").symlink_to("round.jpg")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    listing = list_source(str(tmp_path), Labels())
    assert listing.images.column("uri").to_pylist() == [f"{tmp_path}/cat/1.jpg", f"{tmp_path}/cat/round.jpg"]
    assert listing.passed_over.endings == Counter({"": 3})
    with pytest.raises(SourceError, match="cannot be read .Too many levels"):
        list_source(str(tmp_path / "self"), Labels())


def as_somebody(source: Path) -> dict:
    """What a process that may read no files of others lists of a source: root could read them all."""
    code = (
        "import json, sys; from pipeline.images.labels.labels import Labels\n"
        "from pipeline.images.sources.listing import list_source\n"
        "try:\n"
        "    found = list_source(sys.argv[1], Labels())\n"
        "    print(json.dumps({'uris': found.images['uri'].to_pylist(), 'passed': found.passed_over.to_json()}))\n"
        "except Exception as error:\n"
        "    print(json.dumps({'error': str(error)}))"
    )
    capabilities = "-dac_override,-dac_read_search"
    root = ["setpriv", f"--bounding-set={capabilities}", f"--inh-caps={capabilities}"] if os.geteuid() == 0 else []
    done = subprocess.run([*root, sys.executable, "-c", code, source], capture_output=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["lost+found", "secret", "no entry"])
def test_a_folder_that_cannot_be_read_is_named_and_the_rest_goes_on(tmp_path: Path, name: str) -> None:
    make(tmp_path, "cat/1.jpg", f"{name}/x.jpg", f"cat/{name}/y.jpg")
    for folder in (tmp_path / name, tmp_path / "cat" / name):
        folder.chmod(0o600 if name == "no entry" else 0o000)
    try:
        found = as_somebody(tmp_path)
        denied = [{"uri": str(tmp_path / below / name), "reason": "Permission denied"} for below in ("cat", "")]
        if name == "no entry":  # its files are listed, and rejected with their reason
            assert len(found["uris"]) == 3
        else:
            assert found["uris"] == [f"{tmp_path}/cat/1.jpg"]
            assert sorted(found["passed"]["unreadable"], key=str) == sorted(denied, key=str)
        error = as_somebody(tmp_path / name).get("error", "")
        assert ("give this user the right to read it" in error) == (name != "no entry")
    finally:
        for folder in (tmp_path / name, tmp_path / "cat" / name):
            folder.chmod(0o700)


def test_a_folder_that_vanishes_is_named(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "b/1.jpg", "c/1.jpg")
    passed = PassedOver()
    found = []
    for file in walk_source(str(tmp_path), Exclusion(), passed).files:
        found.append(file.below)
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
    assert found == ["a/1.jpg", "c/1.jpg"]
    assert passed.unreadable == {str(tmp_path / "b"): "No such file or directory"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "there is no source at"),
        ("empty", "is empty"),
        ("texts", "holds 1 files but no image"),
        ("texts/a.txt", "is no image file"),
    ],
)
def test_sources_without_images_are_named(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path, "texts/a.txt")
    with pytest.raises(SourceError, match=message):
        list_source(source if "://" in source else str(tmp_path / source), Labels())


def test_unknown_labels_option() -> None:
    with pytest.raises(UsageError, match="give folder"):
        Labels("breed")


def test_labels_are_the_folders_names_as_they_are(tmp_path: Path) -> None:
    make(tmp_path, "C#/a.jpg", "100%/b.jpg")
    assert list_source(str(tmp_path), Labels()).labels == ["100%", "C#"]
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"), "wb"):
        pass
    os.rename(os.path.join(os.fsencode(tmp_path), b"C#"), os.path.join(os.fsencode(tmp_path), b"\xe9t\xe9"))
    assert list_source(str(tmp_path), Labels()).labels == ["%E9t%E9", "100%"]


def test_pipes_are_no_images_and_paths_are_normalised(tmp_path: Path) -> None:
    make(tmp_path, "a/x.jpg")
    os.mkfifo(tmp_path / "a/pipe.jpg")
    direct = list_source(str(tmp_path / "a"), Labels("none"))
    detour = list_source(f"{tmp_path}/b/../a", Labels("none"))
    assert direct.images.num_rows == 1
    assert (direct.uri, direct.images) == (detour.uri, detour.images)


def test_undecodable_and_reserved_names_keep_their_files(tmp_path: Path) -> None:
    names = [b"100%.jpg", b"a#b.jpg", b"caf\xe9.jpg", "ünï çødé.jpg".encode()]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as stream:
            stream.write(name)
    uris = list_source(str(tmp_path), Labels()).images.column("uri").to_pylist()
    assert len(uris) == 4
    assert sum("#" in uri for uri in uris) == 0
    found = set()
    for uri in uris:
        with open(path_of_uri(uri), "rb") as stream:
            found.add(stream.read())
    assert found == set(names)


@given(st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name))
def test_uris_round_trip_for_any_file_name(name: bytes) -> None:
    path = os.fsdecode(b"/" + name)
    uri = uri_of_path(path)
    uri.encode("utf-8")
    assert "#" not in uri
    assert path_of_uri(uri) == path


def counting_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that a listing has drawn from its walk so far."""
    drawn: list[str] = []
    real = listing_module.walk_source

    def walk(*arguments: Any) -> Walk:
        found = real(*arguments)
        return dataclasses.replace(found, files=(drawn.append(file.below) or file for file in found.files))

    monkeypatch.setattr(listing_module, "walk_source", walk)
    return drawn


def test_too_many_archives_are_told_while_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"{number:02d}.tar" for number in range(20)))
    for path in tmp_path.iterdir():
        os.truncate(path, 300 << 20)  # a part of its own: small ones share parts
    monkeypatch.setattr(ids, "MAX_PARTS", 7)
    drawn = counting_files(monkeypatch)
    with pytest.raises(SourceError, match="more than 7 parts .0 image files and 8 archives.*add its folders one after"):
        list_source(str(tmp_path), Labels())
    assert len(drawn) == 8


def test_too_many_images_are_told_while_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"{number:03d}.jpg" for number in range(300)))
    monkeypatch.setattr(ids, "MAX_PARTS", 1)
    monkeypatch.setattr(part_limit, "FILES_BETWEEN", 50)
    drawn = counting_files(monkeypatch)
    with pytest.raises(SourceError, match="more than 1 parts .150 image files and 0 archives"):
        list_source(str(tmp_path), Labels())
    assert len(drawn) == 150


def test_too_many_slices_are_told_before_all_footers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(60):
        table = pa.table({"image": pa.array([b"x", b"y"], pa.binary()), "label": ["a", "b"]})
        pq.write_table(table, tmp_path / f"{number:02d}.parquet")
    monkeypatch.setattr(ids, "MAX_PART_ROWS", 4)  # two files share a part
    monkeypatch.setattr(ids, "MAX_PARTS", 28)
    with pytest.raises(SourceError, match="more than 28 parts .0 image files and 57 archives or slices"):
        list_source(str(tmp_path), Labels())
    monkeypatch.setattr(ids, "MAX_PARTS", 30)
    assert list_source(str(tmp_path), Labels()).planned == 120


def test_parts_that_cannot_be_filled_are_counted_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(60):  # three of four rows fill a part, so that no part has two files
        table = pa.table({"image": pa.array([b"x"] * 3, pa.binary())})
        pq.write_table(table, tmp_path / f"{number:02d}.parquet")
    monkeypatch.setattr(ids, "MAX_PART_ROWS", 4)
    monkeypatch.setattr(ids, "MAX_PARTS", 59)
    with pytest.raises(SourceError, match="more than 59 parts .0 image files and 60 archives or slices"):
        list_source(str(tmp_path), Labels())


SLOW_LISTING = """
import sys, time, fsspec
from fsspec.spec import AbstractFileSystem
from pipeline.images.labels.labels import Labels
from pipeline.images.sources.listing import list_source

class Slow(AbstractFileSystem):
    protocol = "slow"
    async_impl = sys.argv[1] == "16"
    def ls(self, path, detail=True, **_):
        if path.count("/") == 0:
            return [{"name": f"{path}/{n:03d}", "size": 0, "type": "directory"} for n in range(500)]
        time.sleep(0.2)
        return [{"name": f"{path}/{n}.jpg", "size": 1, "type": "file"} for n in range(3)]

fsspec.register_implementation("slow", Slow, clobber=True)
print("begun", flush=True)
list_source("slow://root", Labels(), on_progress=lambda moment: print(moment.stage, moment.done, flush=True))
"""


@pytest.mark.parametrize("requests", ["1", "16"])
def test_a_long_listing_is_told_from_the_first_second_and_ends_when_interrupted(requests: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_LISTING, requests],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        stage, done = process.stdout.readline().split()
        listed_in_two_seconds = int(requests) * 10 * 3
        assert (stage, 0 < int(done) <= listed_in_two_seconds) == ("listing", True)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        assert "KeyboardInterrupt" in process.stderr.read()

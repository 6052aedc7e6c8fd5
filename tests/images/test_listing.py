"""The folder source: what counts as an image, what its label is, and in which order it comes."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SourceError, UsageError
from pipeline.images.labels import Labels
from pipeline.images.listing import list_source
from pipeline.images.uris import path_of_uri, uri_of_path


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

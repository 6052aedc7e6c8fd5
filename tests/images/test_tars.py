"""Tar archives: every image is yielded or rejected with its reason, however the archive is made, cut or damaged."""

import bz2
import gzip
import io
import json
import lzma
import random
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from pipeline.errors import SourceError
from pipeline.images.containers import tar_links, tars
from pipeline.images.containers.items import Item
from pipeline.images.containers.notes import ContainerNotes
from pipeline.images.containers.tars import Members, read_tar
from pipeline.images.decoding.decode import Rejected, decode
from pipeline.images.names.leftovers import Exclusion
from pipeline.images.names.uris import split_member
from pipeline.store.tables.kept_columns import KeptColumn
from tests.images.archives import Dribble, Lost, tar_of
from tests.images.pictures import encoded, gradient

URI = "s3://bucket/a.tar"
COMPRESSIONS = {"plain": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def items_of(content: bytes, labels: str = "folder") -> list[Item]:
    return list(read_tar(cast("BinaryIO", Dribble(content, 8_000)), URI, Members(labels)))


def labels_of(members: dict[str, bytes], labels: str = "folder") -> list[str | None]:
    return [item.label for item in items_of(tar_of(members), labels)]


def reason_of(item: Item) -> str:
    assert isinstance(item.content, Rejected)
    return item.content.reason


def member_of(item: Item) -> str:
    name = split_member(item.uri)[1]
    assert name is not None
    return name


# What is read


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("at_most", [1, 7, 100_000])
def test_a_stream_of_any_compression_in_pieces_of_any_size(compression: str, at_most: int) -> None:
    members = {"a/1.jpg": b"one" * 300, "a/1.cls": b"3", "b/2.PNG": b"two", "b/readme.md": b"no image", "3.webp": b"3"}
    content = COMPRESSIONS[compression](tar_of(members))
    stream = cast("BinaryIO", Dribble(content, at_most))
    assert list(read_tar(stream, URI)) == [
        Item(f"{URI}#a/1.jpg", "3", b"one" * 300),
        Item(f"{URI}#b/2.PNG", "b", b"two"),
        Item(f"{URI}#3.webp", None, b"3"),
    ]


def test_real_images_come_back_whole() -> None:
    jpeg, png = encoded(gradient(), "JPEG"), encoded(gradient(), "PNG")
    found = items_of(tar_of({"a.jpg": jpeg, "b.png": png}, "w:gz"))
    assert [item.content for item in found] == [jpeg, png]
    assert decode(jpeg).image.size == (60, 40)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_compressed_in_several_streams(compression: str) -> None:
    """As pigz and pbzip2 do, and `cat` of compressed pieces: tarfile as a stream stops after the first."""
    plain = tar_of({f"{i}.jpg": bytes([i]) * 1_000 for i in range(20)})
    pieces = [COMPRESSIONS[compression](plain[i : i + 5_000]) for i in range(0, len(plain), 5_000)]
    assert [item.uri for item in items_of(b"".join(pieces))] == [f"{URI}#{i}.jpg" for i in range(20)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_strange_names_in_every_format(form: int) -> None:
    long = "/".join(["folder" * 5] * 6) + "/picture.jpg"
    names = ["with space.jpg", "100%.jpg", "a#b.jpg", "naïve/日本.png", "tab\tand\nline.gif", long]
    found = items_of(tar_of(dict.fromkeys(names, b"x"), format=form))
    assert [member_of(item) for item in found] == names
    assert [item.uri.count("#") for item in found] == [1] * len(names)
    assert found[1].uri == f"{URI}#100%25.jpg"
    assert found[2].uri == f"{URI}#a%23b.jpg"
    assert [item.label for item in found] == [None, None, None, "naïve", None, "folder" * 5]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_not_utf_8_keep_their_bytes(form: int) -> None:
    content = tar_of({"caf\udce9/\udcff.jpg": b"x"}, format=form, encoding="utf-8", errors="surrogateescape")
    (found,) = items_of(content)
    assert found == Item(f"{URI}#caf%E9/%FF.jpg", "caf%E9", b"x")
    assert member_of(found) == "caf\udce9/\udcff.jpg"


def test_names_are_only_names() -> None:
    names = ["../../etc/x.jpg", "/absolute/x.jpg", "./dot/x.jpg", "a/../b/x.jpg", "//x.jpg"]
    found = items_of(tar_of(dict.fromkeys(names, b"x")))
    assert [member_of(item) for item in found] == names
    assert [item.label for item in found] == ["etc", "absolute", "dot", "a", None]


def test_what_a_desktop_leaves_behind_is_passed_over() -> None:
    members = {"._1.jpg": b"x", "__MACOSX/a/1.jpg": b"x", ".git/1.jpg": b"x", "a/.1.jpg": b"x", "a/1.jpg": b"image"}
    assert items_of(tar_of(members)) == [Item(f"{URI}#a/1.jpg", "a", b"image")]


def test_an_archive_without_images_has_no_items() -> None:
    assert items_of(tar_of({})) == []
    assert items_of(tar_of({"readme.md": b"x"}, "w:gz")) == []
    assert items_of(bytes(10_240)) == []


def test_what_gnu_tar_writes(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "1.jpg").write_bytes(b"cat")
    (tmp_path / "cats" / ("long" * 40 + ".jpg")).write_bytes(b"long")
    (tmp_path / "cats" / "link.jpg").symlink_to("1.jpg")
    with open(tmp_path / "cats" / "holes.tif", "wb") as stream:
        stream.truncate(1 << 20)
    for form in ("gnu", "pax"):
        options = ["--sparse", f"--format={form}", "--sort=name"]
        done = subprocess.run(["tar", "-cz", *options, "-C", tmp_path, "./cats"], capture_output=True, check=True)
        found = {member_of(item): item for item in items_of(done.stdout)}
        assert list(found) == ["./cats/1.jpg", "./cats/holes.tif", "./cats/link.jpg", f"./cats/{'long' * 40}.jpg"]
        assert [item.label for item in found.values()] == ["cats"] * 4
        assert found["./cats/1.jpg"].content == b"cat"
        assert "sparse" in reason_of(found["./cats/holes.tif"])
        assert found[f"./cats/{'long' * 40}.jpg"].content == b"long"


# What is rejected


def test_links_and_devices_are_rejected_and_folders_are_not_images() -> None:
    stream = io.BytesIO()
    kinds = {"sym": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE, "disk": tarfile.BLKTYPE}
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind in {**kinds, "folder": tarfile.DIRTYPE, "strange": b"Z"}.items():
            info = tarfile.TarInfo(f"{name}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    found = {member_of(item): reason_of(item) for item in items_of(stream.getvalue())}
    assert list(found) == ["sym.jpg", "hard.jpg", "pipe.jpg", "disk.jpg", "strange.jpg"]
    assert found["sym.jpg"] == "a link, not an image"
    assert found["hard.jpg"] == "a hard link to /etc/passwd, which is not in the archive before it"
    assert "not a plain file" in found["pipe.jpg"]


def test_empty_and_repeated_members() -> None:
    content = tar_of([("1.jpg", b"first"), ("2.jpg", b""), ("1.jpg", b"second"), ("./1.jpg", b"another name")])
    found = items_of(content)
    assert [item.uri for item in found] == [f"{URI}#{name}" for name in ("1.jpg", "2.jpg", "1.jpg", "./1.jpg")]
    assert found[0].content == b"first"
    assert reason_of(found[1]) == "the file is empty"
    assert reason_of(found[2]) == "its name is in the archive already"
    assert cast("Rejected", found[2].content).stage == "plan"
    assert found[3].content == b"another name"


def test_too_large_a_member_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_links, "MAX_FILE_BYTES", 1_000)
    found = items_of(tar_of({"1.jpg": b"x" * 1_001, "2.jpg": b"x" * 1_000}))
    assert reason_of(found[0]) == "1,001 bytes is more than 1,000"
    assert found[1].content == b"x" * 1_000


def test_a_size_that_is_only_claimed_takes_no_memory() -> None:
    info = tarfile.TarInfo("1.jpg")
    info.size = 500 << 20
    found = items_of(info.tobuf() + b"x" * 1_000)
    assert [reason_of(item) for item in found] == ["the archive is cut off here"]


def test_too_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MAX_IMAGES", 3)
    members = {f"{i}.jpg": b"x" for i in range(4)}
    assert len(items_of(tar_of(dict(list(members.items())[:3])))) == 3
    reading = read_tar(io.BytesIO(tar_of(members)), URI, Members("none"))
    assert len([next(reading) for _ in range(3)]) == 3
    with pytest.raises(SourceError, match="a.tar holds more than 3 images: split it"):
        next(reading)


# Labels


@pytest.mark.parametrize(
    ("sidecars", "label"),
    [
        ({}, "train"),
        ({"cls": b" 7\n"}, "7"),
        ({"cls": b"7", "json": b'{"label": "cat"}', "txt": b"a cat"}, "7"),
        ({"json": b'{"label": "cat", "cls": 1}', "txt": b"a cat"}, "cat"),
        ({"json": b'{"cls": 1, "class": "x"}'}, "1"),
        ({"json": b'{"class": true}'}, "true"),
        ({"json": b'{"label": 2.5}'}, "2.5"),
        ({"json": b'{"label": 2.0}'}, "2"),
        ({"json": b'{"label": NaN}'}, None),
        ({"json": b'{"label": null}', "txt": b"a cat"}, None),
        ({"json": b'{"label": ["cat"]}'}, None),
        ({"json": b'{"label": {"a": 1}}'}, None),
        ({"json": b'{"label": ""}'}, None),
        ({"json": b'{"label": "half \\ud83d pair"}'}, "half ? pair"),
        ({"json": b'{"caption": "a cat"}', "txt": b"a cat"}, "a cat"),
        ({"json": b'["label"]'}, "train"),
        ({"json": b"{broken"}, "train"),
        ({"json": b"[" * 100_000}, "train"),
        ({"json": b'{"label": ' + b"9" * 5_000 + b"}"}, "train"),
        ({"txt": b"\xef\xbb\xbfa cat\r\n"}, "a cat"),
        ({"txt": b"caf\xe9"}, "caf\ufffd"),
        ({"txt": b" \n"}, None),
        ({"cls": b"", "txt": b"a cat"}, None),
        ({"CLS": b"7"}, "7"),
        ({"seg.txt": b"no sidecar of ours"}, "train"),
        ({"txt": b"x" * (1 << 20) + b"x"}, "train"),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_what_a_source_says_by_itself(sidecars: dict[str, bytes], label: str | None, before: bool) -> None:
    beside = {f"./train/0.{extension}": content for extension, content in sidecars.items()}
    image = {"./train/0.jpg": b"x"}
    neighbours = {"./train/1.jpg": b"x"}
    assert labels_of((beside | image if before else image | beside) | neighbours) == [label, "train"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("none", [None, None]),
        ("column:kind", ["3", "from the file"]),
        ("column:absent", [None, None]),
        ("column:nothing", [None, None]),
        ("column:cls", ["9", None]),
    ],
)
def test_a_named_column(labels: str, expected: list[str | None]) -> None:
    described = json.dumps({"kind": 3, "nothing": None}).encode()
    members = {
        "a/0.kind": b"hidden by the json",
        "a/0.jpg": b"x",
        "a/0.json": described,
        "a/0.cls": b"9",
        "a/1.jpg": b"x",
        "a/1.kind": b"from the file\n",
    }
    assert labels_of(members, labels) == expected


def test_a_key_reaches_to_the_first_dot_and_is_of_its_folder() -> None:
    members = {"a/1.left.jpg": b"l", "a/1.right.jpg": b"r", "a/1.cls": b"7", "b/1.cls": b"8", "b/1.jpg": b"x"}
    assert labels_of(members) == ["7", "7", "8"]


def test_sidecars_that_are_not_adjacent_are_not_found() -> None:
    assert labels_of({"1.jpg": b"x", "2.jpg": b"x", "1.cls": b"7", "2.cls": b"8"}) == [None, None]
    assert labels_of({"1.jpg": b"x", "._1.jpg": b"", "1.cls": b"7"}) == ["7"]


def test_images_of_one_key_are_not_held_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "HELD_BYTES", 1_000)
    members = {f"a.{i}.jpg": b"x" * 400 for i in range(5)}
    with_sidecars = {"a.txt": b"early", **members, "a.cls": b"late"}
    assert labels_of(with_sidecars) == ["early", "early", "early", "early", "late"]
    assert labels_of({"b.jpg": b"x" * 2_000, "b.cls": b"7"}) == ["7"]


# Samples whose members lie apart, or share a name


def amended(members: dict[str, bytes] | bytes, of: Members = Members()) -> tuple[list[Item], ContainerNotes]:
    notes = ContainerNotes()
    content = members if isinstance(members, bytes) else tar_of(members)
    return notes.amended(list(read_tar(io.BytesIO(content), URI, of, notes))), notes


IMAGES_THEN_LABELS = {f"data/{i}.jpg": b"x" for i in range(4)} | {f"data/{i}.cls": b"%d" % i for i in range(4)}


@pytest.mark.parametrize("order", ["images first", "labels first", "shuffled"])
def test_sidecars_that_lie_apart_find_their_image(order: str) -> None:
    names = list(IMAGES_THEN_LABELS)
    names = names[::-1] if order == "labels first" else names
    random.Random(2).shuffle(names if order == "shuffled" else [])
    found, _ = amended({name: IMAGES_THEN_LABELS[name] for name in names})
    assert {member_of(item): item.label for item in found} == {f"data/{i}.jpg": str(i) for i in range(4)}
    assert all(item.content == b"x" for item in found)


def test_kept_values_that_come_late() -> None:
    members = {"a.jpg": b"x", "b.jpg": b"y", "a.json": b'{"label": "cat", "stars": 3}', "b.json": b'{"stars": 4}'}
    found, _ = amended(members, Members("folder", (KeptColumn(name="stars", type="int64"),)))
    assert [(item.label, item.kept) for item in found] == [("cat", (3,)), (None, (4,))]


def test_dots_in_the_names_of_a_sample() -> None:
    members = {}
    for day in range(4):
        members |= {f"IMG_2024.05.0{day}.jpg": b"x", f"IMG_2024.05.0{day}.cls": b"%d" % day}
    assert [item.label for item in amended(members)[0]] == ["0", "1", "2", "3"]
    members = {"a.b.jpg": b"1", "a.c.jpg": b"2", "a.cls": b"all", "a.c.cls": b"c"}
    assert [item.label for item in amended(members)[0]] == ["all", "c"]


def test_masks_beside_a_picture_are_no_images_of_their_own() -> None:
    members = {"1.cls": b"cat", "1.jpg": b"x", "1.seg.png": b"m", "1.depth_0.png": b"d", "2.mask.png": b"only"}
    found, notes = amended(members)
    assert [(member_of(item), item.label) for item in found] == [("1.jpg", "cat"), ("2.mask.png", None)]
    assert notes.masks == Counter({".seg.png": 1, ".depth_0.png": 1})
    found, notes = amended(members, Members(extension="seg.png"))
    assert [(member_of(item), item.label, item.content) for item in found] == [("1.seg.png", "cat", b"m")]
    assert notes.masks == Counter({".jpg": 1, ".depth_0.png": 1, ".mask.png": 1})
    found, notes = amended({"1.jpg": b"x", "1.png": b"y", "2.input.jpg": b"x", "2.output.jpg": b"y"})
    assert (len(found), notes.together) == (4, Counter({".jpg": 1, ".png": 1}))


def test_members_that_are_no_images_are_counted_and_sidecars_are_not() -> None:
    members = {
        "1.avif": b"x",
        "1.cls": b"3",
        "2.AVIF": b"x",
        "inner.tar": b"x",
        "3.jpg": b"x",
        "3.txt": b"t",
        "no": b"x",
    }
    found, notes = amended(members | {"__MACOSX/4.jpg": b"x", "x/5.jpg": b"x"}, Members(exclusion=Exclusion(("x",))))
    assert len(found) == 1
    assert notes.counts() == {
        "endings": {".avif": 2, ".tar": 1, "": 1},
        "leftovers": {"__MACOSX": 1},
        "excluded": {"": 1},
    }


def test_labels_in_other_encodings_and_reasons_for_those_that_are_none() -> None:
    members = {"1.jpg": b"x", "1.cls": "k\u00e4tze".encode("utf-16"), "2.jpg": b"x", "2.cls": b"a\0b", "3.jpg": b"x"}
    found, _ = amended(members | {"3.json": b'{"label": ["a"]}', "4.jpg": b"x", "4.cls": b" ", "5.jpg": b"x"})
    assert [item.label for item in found] == ["k\u00e4tze", None, None, None, None]
    assert [item.no_label for item in found[1:]] == [
        "its .cls holds a NUL character",
        "label in its .json holds a list",
        "its .cls is empty",
        "no sidecar that was understood lies beside it, and no folder holds it in the archive",
    ]


APART: list[tuple[dict[str, bytes], dict[str, str | None]]] = [
    # A .json lies beside each image, and what names its label elsewhere.
    (
        {
            "d/a.jpg": b"x",
            "d/a.json": b'{"w": 3}',
            "d/b.jpg": b"x",
            "d/b.json": b"{}",
            "d/a.cls": b"cat",
            "d/b.cls": b"dog",
        },
        {"d/a.jpg": "cat", "d/b.jpg": "dog"},
    ),
    (
        {"a.jpg": b"x", "a.txt": b"a caption", "b.jpg": b"x", "b.txt": b"b", "a.cls": b"cat", "b.cls": b"dog"},
        {"a.jpg": "cat", "b.jpg": "dog"},
    ),
    (
        {"a.cls": b"cat", "b.cls": b"dog", "a.jpg": b"x", "a.json": b'{"w": 3}', "b.jpg": b"x", "b.json": b"{}"},
        {"a.jpg": "cat", "b.jpg": "dog"},
    ),
    # Names are written in several ways.
    (
        {
            "./x/a.jpg": b"x",
            "x//a.cls": b"cat",
            "./c.cls": b"cup",
            ".//c.jpg": b"x",
            "e\u0301.jpg": b"x",
            "\u00e9.cls": b"e",
        },
        {"./x/a.jpg": "cat", ".//c.jpg": "cup", "e\u0301.jpg": "e"},
    ),
    (
        {"a.jpg": b"x", "a.jpg.cls": b"cat", "b.png": b"x", "b.png.json": b'{"category": "dog"}'},
        {"a.jpg": "cat", "b.png": "dog"},
    ),
    # Words of masks that are no masks here.
    (
        {"lung.normal.1.jpg": b"x", "lung.normal.1.cls": b"well", "lung.covid.1.jpg": b"x", "lung.covid.1.cls": b"ill"},
        {"lung.normal.1.jpg": "well", "lung.covid.1.jpg": "ill"},
    ),
    (
        {"face.jpg": b"x", "face.cls": b"a", "face.mask.jpg": b"x", "face.mask.cls": b"masked"},
        {"face.jpg": "a", "face.mask.jpg": "masked"},
    ),
    # Masks that lie apart from their picture.
    (
        {"1.jpg": b"x", "2.jpg": b"x", "1.seg.png": b"m", "2.seg.png": b"m", "1.cls": b"cat", "2.cls": b"dog"},
        {"1.jpg": "cat", "2.jpg": "dog"},
    ),
]


@pytest.mark.parametrize(("members", "labels"), APART)
def test_members_that_lie_apart_or_are_named_alike(members: dict[str, bytes], labels: dict[str, str | None]) -> None:
    found, _ = amended(members)
    assert {member_of(item): item.label for item in found} == labels


def test_what_cannot_be_understood_beside_an_image_is_noted() -> None:
    members = {"1_mask.png": b"x", "1.jpg": b"x", "1.json": b"{broken", "2.jpg": b"x", "2.txt": b"t" * ((1 << 20) + 1)}
    found, notes = amended(members)
    assert len(found) == 3
    assert notes.mask_like == Counter({"_mask.png": 1})
    assert notes.sidecars == Counter({"a .json that is none": 1, "more than 1 MiB": 1})
    found, notes = amended({"1.mask.png": b"x", "2.jpg": b"x", "1.jpg": b"x"})  # a mask that comes before its picture
    assert (len(found), notes.together) == (3, Counter({".jpg": 1}))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hard_links_to_long_names_and_to_members_that_come_later(form: int) -> None:
    long = "/".join(["folder" * 5] * 6) + "/picture.jpg"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, target in (("early.jpg", f"./{long}"), (long, None), ("cat/late.jpg", long), ("none.jpg", "nowhere")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.LNKTYPE, target) if target else (tarfile.REGTYPE, "")
            info.size = 0 if target else 4
            archive.addfile(info, io.BytesIO(b"long"))
    found, _ = amended(stream.getvalue())
    contents = {member_of(item): item.content for item in found}
    assert [contents[name] for name in ("early.jpg", long, "cat/late.jpg")] == [b"long"] * 3
    assert reason_of(next(item for item in found if member_of(item) == "none.jpg")).endswith(
        "which is not in the archive"
    )


def with_links(*members: tuple[str, bytes | str]) -> bytes:
    """An archive in which a text in place of bytes is the target of a hard link."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_hard_links_are_their_target(compression: str) -> None:
    content = with_links(
        ("cat/1.jpg", b"one"), ("blob", b"two"), ("dog/2.jpg", "cat/1.jpg"), ("3.jpg", "dog/2.jpg"), ("4.jpg", "blob"),
        ("4.cls", b"4"), ("5.jpg", b"five"), ("5.cls", "4.cls"), ("6.jpg", "absent.jpg"),
    )  # fmt: skip
    found, _ = amended(COMPRESSIONS[compression](content))
    by_name = {member_of(item): (item.label, item.content) for item in found}
    assert {name: said for name, said in by_name.items() if name != "6.jpg"} == {
        "cat/1.jpg": ("cat", b"one"),
        "dog/2.jpg": ("dog", b"one"),
        "3.jpg": (None, b"one"),
        "4.jpg": ("4", b"two"),
        "5.jpg": ("4", b"five"),
    }
    assert reason_of(found[[member_of(item) for item in found].index("6.jpg")]).startswith("a hard link to absent.jpg")


def test_a_hard_link_in_a_stream_that_ends_is_rejected_with_the_reason() -> None:
    content = with_links(("1.jpg", b"one"), ("2.jpg", "1.jpg"))
    assert reason_of(items_of(content)[1]) == "a hard link, and this stream cannot be read a second time"


# Archives that end too early, or are none


def cut_archive() -> tuple[bytes, list[str], list[int]]:
    """An archive with its images' names, and where each image's bytes end."""
    members = {"a/0.jpg": b"0" * 700, "a/0.cls": b"7", "b/" + "n" * 120 + ".png": b"1" * 512, "notes.md": b"n" * 600}
    members["last.gif"] = b"2"
    content = tar_of(members, format=tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        ends = {info.name: info.offset_data + info.size for info in archive}
    images = [name for name in members if not name.endswith((".cls", ".md"))]
    return content, images, [ends[name] for name in images]


def test_cut_anywhere_yields_what_came_before_and_says_so() -> None:
    content, names, ends = cut_archive()
    end_mark = ends[-1] + 511 + 2 * 512  # the last image's padding, then two blocks of zeros
    assert ends[-1] % 512 == 1
    whole = items_of(content)
    assert [member_of(item) for item in whole] == names
    for size in range(len(content)):
        found = list(read_tar(io.BytesIO(content[:size]), URI, Members("none")))
        complete = sum(end <= size for end in ends)
        assert [item.content for item in found[:complete]] == [item.content for item in whole[:complete]], size
        assert [item.uri for item in found[:complete]] == [item.uri for item in whole[:complete]], size
        if size >= end_mark:
            assert len(found) == complete
            continue
        assert len(found) == complete + 1, size
        broken = found[-1]
        if broken.uri != URI:
            assert member_of(broken) == names[complete]
            assert reason_of(broken) == "the archive is cut off here"
        elif size < 512:
            assert reason_of(broken) == ("not a tar archive" if size else "the file is empty")
        else:
            assert reason_of(broken).startswith(f"the archive breaks off after {complete:,} images: it is cut off")


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_compressed_and_cut_anywhere(compression: str) -> None:
    names = [f"{i:02}.jpg" for i in range(8)]
    plain = tar_of({name: random.Random(name).randbytes(600) for name in names})
    content = COMPRESSIONS[compression](plain)
    whole = items_of(content)
    for size in range(0, len(content), 7):
        found = items_of(content[:size])
        complete = [item for item in found if isinstance(item.content, bytes)]
        assert complete == whole[: len(complete)]
        assert len(found) == len(complete) + 1
        assert isinstance(found[-1].content, Rejected)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_damaged_anywhere_never_raises(compression: str) -> None:
    names = [f"{i:02}.jpg" for i in range(4)]
    content = COMPRESSIONS[compression](tar_of({name: name.encode() * 100 for name in names}))
    rng = random.Random(0)
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        found = items_of(bytes(damaged))
        assert all(item.uri.startswith(URI) for item in found)
        if compression in ("gz", "xz") and any(isinstance(item.content, Rejected) for item in found):
            assert isinstance(found[-1].content, Rejected)


def test_gzip_with_altered_bytes_that_still_decompress() -> None:
    content = bytearray(gzip.compress(tar_of({"1.jpg": b"one", "2.jpg": b"two"}), compresslevel=0))
    content[content.index(b"two")] ^= 1
    found = items_of(bytes(content))
    assert [item.uri for item in found] == [f"{URI}#1.jpg", f"{URI}#2.jpg", URI]
    assert reason_of(found[-1]) == "the archive breaks off after 2 images: it has damaged compressed data"


def test_garbage_between_members() -> None:
    first, second = tar_of({"1.jpg": b"one"})[:1_024], tar_of({"2.jpg": b"two"})
    found = items_of(first + b"garbage!" * 64 + second)
    assert found[0].content == b"one"
    assert reason_of(found[1]) == "the archive breaks off after 1 images: it has a damaged header (invalid header)"
    assert len(found) == 2
    found = items_of(first + bytes(512) + second)
    assert reason_of(found[1]).endswith("it has a block of zeros where a header should be")


def test_joined_archives_are_not_silently_halved() -> None:
    found = items_of(tar_of({"1.jpg": b"one"}) + tar_of({"2.jpg": b"two"}))
    assert found[0].content == b"one"
    assert reason_of(found[1]).startswith("the archive breaks off after 1 images: it goes on after the mark of its end")


@pytest.mark.parametrize(
    "content",
    [
        b"short",
        b"\xff\xd8\xff\xe0" * 1_000,
        encoded(gradient(), "PNG"),
        gzip.compress(b"not a tar" * 1_000),
        b"\x1f\x8b" + b"\xff" * 1_000,
        b"BZh9" + b"\xff" * 1_000,
        b"\xfd7zXZ\0" + b"\xff" * 1_000,
        bytes(600),
    ],
    ids=["short", "jpeg", "png", "gz-of-text", "no-gz", "no-bz2", "no-xz", "zeros"],
)
def test_no_tar_at_all(content: bytes) -> None:
    (found,) = items_of(content)
    assert (found.uri, found.label, reason_of(found)) == (URI, None, "not a tar archive")


def with_headers(*headers: tuple[bytes, bytes]) -> bytes:
    """An image, then extended headers of a type and content each, then a second image."""
    content = tar_of({"1.jpg": b"one"})[:1_024]
    for kind, said in headers:
        info = tarfile.TarInfo("header")
        info.type, info.size = kind, len(said)
        content += info.tobuf(tarfile.USTAR_FORMAT) + said + bytes(-len(said) % 512)
    return content + tar_of({"2.jpg": b"two"})


@pytest.mark.parametrize(
    "said",
    [
        b"12 path=x.jpg",
        b"99 path=x.jpg\n",
        b"0 path=x.jpg\n",
        b"path=x.jpg\n",
        b"\0" * 20,
        b"9 noequal\n",
        b"9" * 5_000,
        b"11 size=-1\n",
        b"15 size=999999999999999999999999\n",
        b"34 size=" + b"9" * 25 + b"\n",
        b"9" * ((1 << 20) + 1),
    ],
)
def test_hostile_pax_headers_end_the_archive(said: bytes) -> None:
    found = items_of(with_headers((tarfile.XHDTYPE, said)))
    assert found[0].content == b"one"
    assert reason_of(found[1]).startswith("the archive breaks off after 1 images: it has a ")
    assert len(found) == 2


def test_pax_and_gnu_headers_name_the_next_member() -> None:
    assert member_of(items_of(with_headers((tarfile.XHDTYPE, b"14 path=x.jpg\n")))[1]) == "x.jpg"
    assert member_of(items_of(with_headers((tarfile.GNUTYPE_LONGNAME, b"y.jpg\0")))[1]) == "y.jpg"
    assert member_of(items_of(with_headers((tarfile.GNUTYPE_LONGLINK, b"y.jpg\0")))[1]) == "2.jpg"
    global_comment = with_headers((tarfile.XGLTYPE, b"19 comment=of git \n"))
    assert member_of(items_of(global_comment)[1]) == "2.jpg"


# Lost connections


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("error", [ConnectionResetError("gone"), EOFError("gone"), RuntimeError("gone")], ids=repr)
def test_an_error_of_the_stream_is_the_callers(compression: str, error: Exception) -> None:
    plain = tar_of({f"{i}.jpg": random.Random(i).randbytes(3_000) for i in range(20)})
    content = COMPRESSIONS[compression](plain)
    for good in (0, 3, 600, 3_500, len(content) // 2, len(content) - 1):
        found = []
        with pytest.raises(type(error)) as raised:
            found.extend(read_tar(Lost(content, good, error), URI, Members("none")))
        assert raised.value is error
        assert not [item for item in found if isinstance(item.content, Rejected)]


def test_nothing_is_read_far_ahead() -> None:
    """The members that have been yielded are all that was taken of the stream, but for a key's neighbours."""
    stream = io.BytesIO(tar_of({f"{i}.jpg": b"x" * 5_000 for i in range(1_000)}))
    reading = read_tar(stream, URI)
    next(reading)
    assert stream.tell() < 20_000

"""Labels of a source: where they come from, what is none, and what is said of those that are missing."""

import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SourceError, UsageError
from pipeline.images.containers.container import Container, ImageChoice, images_in
from pipeline.images.labels.label_text import text_of
from pipeline.images.labels.labels import EMPTY_ROW, NO_FOLDER, NO_ROW, Labels
from pipeline.images.names.leftovers import Exclusion, PassedOver, leftover_of
from pipeline.images.names.partitions import partition_columns
from pipeline.images.sources.listing import Listing, list_source
from tests.images.test_listing import make


def labels_of(listing: Listing) -> dict[str, str | None]:
    below = (uri.removeprefix(f"{listing.uri}/") for uri in listing.images.column("uri").to_pylist())
    return dict(zip(below, listing.images.column("label").to_pylist(), strict=True))


def table(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


# Folders


def test_parent_is_the_folder_that_holds_the_image(tmp_path: Path) -> None:
    root = make(tmp_path / "wolf", "train/cat/1.jpg", "test/cat/x/2.jpg", "3.jpg")
    assert labels_of(list_source(str(root), Labels("parent"))) == {
        "3.jpg": "wolf",
        "test/cat/x/2.jpg": "x",
        "train/cat/1.jpg": "cat",
    }
    assert list_source(str(root / "train/cat/1.jpg"), Labels("parent")).labels == ["cat"]


def test_one_label_for_all(tmp_path: Path) -> None:
    root = make(tmp_path, "a/1.jpg", "2.jpg")
    assert set(labels_of(list_source(str(root), Labels("label:grey wolf"))).values()) == {"grey wolf"}
    with pytest.raises(UsageError, match="`label` is empty"):
        Labels("label: ")


def test_folders_that_are_no_classes_are_questioned(tmp_path: Path) -> None:
    names = ["train", "Test", "val2017", "images", "JPEGImages", "data", "training_set", "IMG_2"]
    root = make(tmp_path, *(f"{name}/1.jpg" for name in [*names, "trainer", "valley", "dog", "image of a cat"]))
    assert sorted(list_source(str(root), Labels()).census.questionable()) == sorted(names)


def test_labels_that_may_be_meant_as_one_are_told(tmp_path: Path) -> None:
    names = ["cat", "Cat", "grey wolf", "grey_wolf", "caf\u00e9", "cafe\u0301", "dog", "dogs"]
    root = make(tmp_path, *(f"{name}/1.jpg" for name in names))
    alike = list_source(str(root), Labels()).census.alike()
    assert sorted(alike) == [["Cat", "cat"], ["cafe\u0301", "caf\u00e9"], ["grey wolf", "grey_wolf"]]


def test_partitions_give_the_label_of_files_of_any_kind(tmp_path: Path) -> None:
    root = make(tmp_path, "split=train/label=c%20t/1.jpg", "label=__HIVE_DEFAULT_PARTITION__/2.jpg", "x=1/3.jpg")
    assert labels_of(list_source(str(root), Labels())) == {
        "label=__HIVE_DEFAULT_PARTITION__/2.jpg": None,
        "split=train/label=c%2520t/1.jpg": "c t",
        "x=1/3.jpg": "x=1",
    }
    by_column = list_source(str(root), Labels("column:split"))
    assert by_column.census.counts == Counter(train=1)
    assert by_column.census.unlabelled == Counter({"no folder split=VALUE holds it": 2})


def test_what_a_path_says_in_partitions() -> None:
    assert partition_columns("/a=1/b/a=2/c%2523=x%2520y/f.parquet#z=1") == {"a": "2", "c%23": "x y"}
    assert partition_columns("/plain/f.parquet") == {}
    assert partition_columns("/=x/a=/f.jpg") == {"a": None}


# Texts


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (b"cat\n", "cat\n"),
        ("cat".encode("utf-16"), "cat"),
        ("cat".encode("utf-16-le"), "cat"),
        ("cat".encode("utf-16-be"), "cat"),
        ("katze ü".encode("utf-8-sig"), "katze ü"),
        ("cat".encode("utf-32"), "cat"),
        (b"cat\0\0\0", "cat"),
        (b"ca\0t", None),
        ("ca\0t", None),
        ("", None),
        ("  ", None),
        (" cat", " cat"),
        ([1], None),
        ({"a": 1}, None),
        (2.0, "2"),
        (float("nan"), None),
        (True, "true"),
        (-1, "-1"),
    ],
)
def test_the_text_of_a_label(value: object, label: str | None) -> None:
    assert text_of(value) == label


# Files of labels

NAMES = ["c#1.jpg", "d%20.jpg", "é.jpg", "sub/1.jpg", "sub/2.jpg", "a b.jpg"]


@pytest.mark.parametrize(
    "written",
    [
        lambda name, _: name,
        lambda name, _: f"./{name}",
        lambda name, _: f" {name} ",
        lambda name, _: name.replace("/", "//"),
        lambda name, _: name.replace("/", "\\"),
        lambda name, _: unicodedata.normalize("NFD", name),
        lambda name, root: f"{root}/{name}",
        lambda name, root: f"{root}/{name}".replace("%", "%25").replace("#", "%23"),
        lambda name, _: name.rpartition("/")[2],
        lambda name, _: name.rpartition("/")[2].rpartition(".")[0],
    ],
    ids=["plain", "dot", "spaces", "doubled", "backslash", "nfd", "path", "uri", "bare", "stem"],
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "utf-16"])
def test_label_files_name_images_as_people_write_them(tmp_path: Path, kind: str, written) -> None:
    import json

    root = make(tmp_path / "imgs", *NAMES)
    names = [written(name, root) for name in NAMES]
    pairs = list(zip(names, [f"class {row}" for row in range(len(names))], strict=True))
    path = tmp_path / ("labels.csv" if kind == "utf-16" else f"labels.{kind}")
    if kind in ("csv", "utf-16"):
        text = "".join(f"{name},{label}\n" for name, label in [("file_name", "label"), *pairs])
        path.write_bytes(text.encode("utf-16" if kind == "utf-16" else "utf-8"))
    elif kind == "tsv":
        path.write_text("".join(f"{name}\t{label}\n" for name, label in [("uri", "label"), *pairs]))
    elif kind == "json":
        path.write_text(json.dumps(dict(pairs)))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"file_name": name, "label": label}) + "\n" for name, label in pairs))
    else:
        table(path, image_path=pa.array([name.encode() for name, _ in pairs]), target=[label for _, label in pairs])
    listing = list_source(str(root), Labels(f"file:{path}"))
    found = labels_of(listing)
    assert [found[uri] for uri in sorted(found)] == [
        label for _, label in sorted(zip(found_names(root), [label for _, label in pairs], strict=True))
    ]
    assert (listing.census.num_unmatched, listing.census.without) == (0, 0)


def found_names(root: Path) -> list[str]:
    return [name.replace("%", "%25").replace("#", "%23") for name in NAMES]


def test_rows_and_images_that_do_not_meet_are_counted(tmp_path: Path) -> None:
    root = make(tmp_path / "imgs", "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "l.csv").write_text("uri,label\n1.jpg,cat\n2.jpg,\ngone.jpg,dog\n")
    census = list_source(str(root), Labels(f"file:{tmp_path / 'l.csv'}")).census
    assert census.counts == Counter(cat=1)
    assert census.unlabelled == Counter({EMPTY_ROW: 1, NO_ROW: 1})
    assert (census.num_rows, census.num_unmatched, census.unmatched) == (3, 1, ("gone.jpg",))


def test_a_file_beside_the_images_names_them_from_its_own_folder(tmp_path: Path) -> None:
    root = make(tmp_path / "set", "train/1.jpg", "train/deep/2.jpg", "test/1.jpg")
    (root / "train/metadata.csv").write_text("file_name,label\n1.jpg,cat\ndeep/2.jpg,dog\n")
    found = labels_of(list_source(str(root), Labels(f"file:{root / 'train/metadata.csv'}")))
    assert found == {"test/1.jpg": None, "train/1.jpg": "cat", "train/deep/2.jpg": "dog"}


def test_a_bare_name_of_several_images_is_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "imgs", "a/1.jpg", "b/1.jpg")
    (tmp_path / "l.csv").write_text("image,label\n1.jpg,cat\n")
    with pytest.raises(SourceError, match=r"'1.jpg' in .* may be .*a/1.jpg or .*b/1.jpg"):
        list_source(str(root), Labels(f"file:{tmp_path / 'l.csv'}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("what,label\na,b\n", "has no column that names images"),
        ("uri,a,b\n1,2,3\n", "has no column label"),
        ("uri,label\n", "names no image"),
        ("uri,label\n,cat\n", "row 1 of .* has no uri"),
        ("uri,label\n1.jpg,cat\n./1.jpg,dog\n", "both 'cat' and 'dog'"),
        ("uri,label\n1.jpg,ca\0t\n", "NUL"),
    ],
)
def test_label_files_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    root = make(tmp_path / "imgs", "1.jpg")
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        list_source(str(root), Labels(f"file:{tmp_path / 'l.csv'}"))


def test_a_table_of_two_columns_and_one_with_semicolons(tmp_path: Path) -> None:
    root = make(tmp_path / "imgs", "1.jpg", "2.jpg")
    for number, text in enumerate(["id,breed\n1,pug\n2,007\n", "image;class\n1.jpg;pug\n2.jpg;007\n"]):
        (tmp_path / f"{number}.csv").write_text(text)
        found = labels_of(list_source(str(root), Labels(f"file:{tmp_path / f'{number}.csv'}")))
        assert found == {"1.jpg": "pug", "2.jpg": "007"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.CSV", "uri,label\n1.jpg,2024-01-01\n2.jpg,2024-01-01T00:00:00\n"),
        ("l.csv", "uri\tlabel\n1.jpg\t2024-01-01\n2.jpg\t2024-01-01T00:00:00\n"),
        ("l.jsonl", '{"uri": "1.jpg", "label": "2024-01-01"}\n{"uri": "2.jpg", "label": "2024-01-01T00:00:00"}\n'),
        ("l.json", '[{"uri": "1.jpg", "label": "2024-01-01"}, {"uri": "2.jpg", "label": "2024-01-01T00:00:00"}]'),
        ("l.csv", "uri,label\nfile://{root}/1.jpg,2024-01-01\n{root}\\2.jpg,2024-01-01T00:00:00\n"),
    ],
)
def test_labels_are_read_as_they_are_written(tmp_path: Path, name: str, text: str) -> None:
    root = make(tmp_path / "imgs", "1.jpg", "2.jpg")
    (tmp_path / name).write_text(text.replace("{root}", str(root)))
    found = labels_of(list_source(str(root), Labels(f"file:{tmp_path / name}")))
    assert found == {"1.jpg": "2024-01-01", "2.jpg": "2024-01-01T00:00:00"}


def test_labels_and_names_that_are_doubtful_are_told(tmp_path: Path) -> None:
    root = make(tmp_path, "nan/1.jpg", "N-A/2.jpg", "None/3.jpg", "cat/4.jpg", "cat/4_mask.jpg", "cat/my_photo.jpg")
    listing = list_source(str(root), Labels())
    assert sorted(listing.census.doubtful()) == ["None", "nan"]
    assert listing.mask_like == Counter({"_mask.jpg": 1})


# Tables


@pytest.mark.parametrize(
    ("column", "labels", "reason"),
    [
        (pa.array([b"cat", b"dog"]), ["cat", "dog"], ""),
        (pa.array([b"cat\0", b"dog\0"], pa.binary(4)), ["cat", "dog"], ""),
        (pa.array(["cat", ""]), ["cat", None], "the column label is empty"),
        (pa.array(["cat", "d\0g"]), ["cat", None], "the column label holds a NUL character"),
        (pa.array(["cat", None]), ["cat", None], "the column label says nothing of it"),
        (pa.array([["cat"], ["dog"]]), [None, None], "the column label holds list<element: string>"),
        (pa.array([{"a": 1}, {"a": 2}]), [None, None], "the column label holds struct<a: int64>"),
        (pa.array(["cat", "dog"]).dictionary_encode(), ["cat", "dog"], ""),
    ],
)
def test_columns_of_labels(tmp_path: Path, column: pa.Array, labels: list, reason: str) -> None:
    path = table(tmp_path / "t.parquet", image=[b"1", b"2"], label=column)
    items = list(images_in(Container(str(path), "parquet", None, None), Labels()))
    assert [item.label for item in items] == labels
    assert [item.no_label for item in items if item.label is None] == [
        item.no_label for item in items if item.label is None and item.no_label.startswith(reason)
    ]
    assert list_source(str(path), Labels()).inside.without == (2 if labels == [None, None] else 0)


def test_hive_partitions_of_tables(tmp_path: Path) -> None:
    table(tmp_path / "label=cat/a.parquet", image=[b"1"])
    table(tmp_path / "Label=d%20g/a.parquet", image=[b"2", b"3"])
    table(tmp_path / "label=cat/own.parquet", image=[b"4"], label=["own"])
    table(tmp_path / "plain.parquet", image=[b"5"])
    listing = list_source(str(tmp_path), Labels())
    rows = [Container(**row) for row in listing.containers.to_pylist()]
    found = {item.content: item.label for row in rows for item in images_in(row, Labels())}
    assert found == {b"1": "cat", b"2": "d g", b"3": "d g", b"4": "own", b"5": None}
    assert listing.inside.counts == Counter({"cat": 1, "d g": 2})
    assert listing.inside.unread == 1
    assert list(listing.inside.unlabelled.values()) == [1]


def test_hive_partitions_are_columns_to_keep_and_to_name(tmp_path: Path) -> None:
    table(tmp_path / "year=2024/breed=pug/a.parquet", image=[b"1"])
    listing = list_source(str(tmp_path), Labels("column:breed"), ["year"])
    [row] = listing.containers.to_pylist()
    [item] = images_in(Container(**row), Labels("column:breed"), listing.kept)
    assert (item.label, item.kept) == ("pug", ("2024",))


# What is passed over


@pytest.mark.parametrize(
    "name", ["@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", ".Trashes", "lost+found", "System Volume Information"]
)
def test_leftovers_are_passed_over_and_counted(tmp_path: Path, name: str) -> None:
    root = make(tmp_path, "cat/1.jpg", f"cat/{name}/2.jpg", f"{name}/deep/3.jpg", "cat/._1.jpg", "cat/.DS_Store")
    listing = list_source(str(root), Labels())
    assert labels_of(listing) == {"cat/1.jpg": "cat"}
    assert listing.passed_over.leftovers == Counter({name: 2, "._*": 1})
    assert leftover_of(["a", name.upper(), "b"]) == name.upper()


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (("masks",), {"a/1.jpg", "a/1_seg.jpg", "#x/1.jpg"}),
        (("*_seg.jpg",), {"a/1.jpg", "a/masks/1.jpg", "#x/1.jpg"}),
        (("/a",), {"#x/1.jpg"}),
        (("a/masks/", "#x"), {"a/1.jpg", "a/1_seg.jpg"}),
        (("**/masks/*.jpg", "*_SEG*"), {"a/1.jpg", "a/1_seg.jpg", "#x/1.jpg"}),
    ],
)
def test_what_is_excluded(tmp_path: Path, patterns: tuple[str, ...], left: set[str]) -> None:
    root = make(tmp_path, "a/1.jpg", "a/1_seg.jpg", "a/masks/1.jpg", "#x/1.jpg")
    listing = list_source(str(root), Labels(), (), ImageChoice(patterns))
    assert set(labels_of(listing)) == {name.replace("#", "%23") for name in left}
    assert listing.passed_over.excluded > 0


def test_patterns_that_say_nothing_are_refused(tmp_path: Path) -> None:
    for pattern in ("", " ", "/"):
        with pytest.raises(UsageError, match="empty pattern"):
            Exclusion((pattern,))
    with pytest.raises(UsageError, match="no ending of an image"):
        ImageChoice((), "cls")
    root = make(tmp_path, "a/1.jpg")
    with pytest.raises(SourceError, match="no image but those excluded"):
        list_source(str(root), Labels(), (), ImageChoice(("*.jpg",)))


def test_files_that_are_no_images_are_counted_by_their_ending(tmp_path: Path) -> None:
    root = make(tmp_path, "1.jpg", "a.AVIF", "b.avif", "c.heic", "noending", "x.strange ending", "labels.csv")
    passed = list_source(str(root), Labels()).passed_over
    assert passed.endings == Counter({".avif": 2, ".heic": 1, ".csv": 1, "": 2})
    assert passed.label_files == [str(root / "labels.csv")]
    assert PassedOver().to_json()["endings"] == {}


def test_images_that_lie_flat_have_a_reason(tmp_path: Path) -> None:
    root = make(tmp_path, "1.jpg", "a/2.jpg")
    assert list_source(str(root), Labels()).census.unlabelled == Counter({NO_FOLDER: 1})
    assert not list_source(str(root), Labels("none")).census.counts

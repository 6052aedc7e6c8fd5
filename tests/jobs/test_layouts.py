"""Ten ways in which people keep images: which labels an add gives them, and what it says where they look wrong."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import VisualMemory
from tests.conftest import ENCODER, IMAGE_SIZE
from tests.images.pictures import encoded, gradient
from tests.jobs.test_cli import Run, run  # noqa: F401, a fixture


def picture(number: int) -> bytes:
    return encoded(gradient(16, 16).point(lambda value: (value + 31 * number) % 256), "PNG")


def write(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def image_folder(root: Path) -> Path:
    return write(root, "cat/1.png", "cat/2.png", "dog/1.png")


def splits(root: Path) -> Path:
    return write(root, "train/cat/1.png", "train/dog/1.png", "test/cat/1.png")


def hugging_face(root: Path) -> Path:
    write(root, "train/0.png", "train/1.png", "test/0.png")
    (root / "train/metadata.csv").write_text("file_name,label\n0.png,cat\n1.png,dog\n")
    return root


def kaggle(root: Path) -> Path:
    write(root, "train/ab12.png", "train/cd34.png")
    (root / "labels.csv").write_text("id,breed\nab12,pug\ncd34,boxer\n")
    return root


def web_dataset(root: Path) -> Path:
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as archive:
        for name, data in [("0.png", picture(0)), ("0.cls", b"cat"), ("1.png", picture(1)), ("2.heic", b"?")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return root


def hive(root: Path) -> Path:
    for number, label in enumerate(("cat", "dog")):
        (root / f"label={label}").mkdir(parents=True)
        pq.write_table(pa.table({"image": [picture(number)]}), root / f"label={label}/part-0.parquet")
    return root


def coco(root: Path) -> Path:
    write(root, "train2017/1.png", "val2017/2.png")
    (root / "annotations").mkdir()
    (root / "annotations/instances.json").write_text("{}")
    return root


def flat(root: Path) -> Path:
    return write(root, "1.png", "2.png")


LAYOUTS: list[tuple[str, Callable[[Path], Path], list[str], dict[str, int], int, str]] = [
    # layout, how it is made, options, labels, images without, what is said
    ("ImageFolder", image_folder, [], {"cat": 2, "dog": 1}, 0, "labels: cat (2), dog (1)"),
    ("train and test", splits, [], {"train": 2, "test": 1}, 0, "look like a split or a folder of images"),
    ("train and test", splits, ["--labels", "parent"], {"cat": 2, "dog": 1}, 0, "labels: cat (2), dog (1)"),
    ("imagefolder", hugging_face, [], {"train": 2, "test": 1}, 0, "look like a split"),
    (
        "imagefolder with its table",
        hugging_face,
        ["--labels", "file:{root}/train/metadata.csv"],
        {"cat": 1, "dog": 1},
        1,
        "1 of these images have no label, which `classify` needs (no row of the label file names it)",
    ),
    ("Kaggle", kaggle, ["--labels", "file:{root}/labels.csv"], {"pug": 1, "boxer": 1}, 0, "labels: boxer (1), pug (1)"),
    ("webdataset", web_dataset, [], {"cat": 1}, 1, "1 file that is no image (1 .heic)"),
    ("Hive", hive, [], {"cat": 1, "dog": 1}, 0, "labels: cat (1), dog (1)"),
    ("COCO", coco, [], {"train2017": 1, "val2017": 1}, 0, "look like a split or a folder of images"),
    ("COCO", coco, ["--labels", "none"], {}, 2, "1 file that is no image (1 .json)"),
    ("flat", flat, [], {}, 2, "no image of these has a label"),
    ("one class", flat, ["--label", "wolf"], {"wolf": 2}, 0, "labels: wolf (2)"),
    ("one class by its folder", flat, ["--labels", "parent"], {"images here": 2}, 0, "labels: images here (2)"),
]


@pytest.fixture
def flags(weights: str) -> list[object]:
    return ["--encoder", ENCODER, "--weights", weights, "--weights-order", "positional", "--image-size", IMAGE_SIZE]


@pytest.mark.parametrize(
    ("make", "options", "labels", "without", "said"),
    [layout[1:] for layout in LAYOUTS],
    ids=[f"{layout[0]} {layout[2]}" for layout in LAYOUTS],
)
def test_labels_of_the_layouts_people_have(
    tmp_path: Path,
    run: Run,  # noqa: F811
    flags: list[object],
    make: Callable[[Path], Path],
    options: list[str],
    labels: dict[str, int],
    without: int,
    said: str,
) -> None:
    root = make(tmp_path / "images here")
    options = [option.format(root=root) for option in options]
    status, out, err = run("add", tmp_path / "memory", root, *options, *flags)
    assert status == 0, err
    assert said in out + err
    found = VisualMemory(tmp_path / "memory").status()
    assert found["entries_by_label"] == labels
    assert found["entries"] == sum(labels.values()) + without
    _, out, _ = run("add", tmp_path / "never", root, *options, *flags, "--dry-run", "--json")
    plan = json.loads(out)
    known = plan if plan["first_images"] is None else plan["first_images"]
    assert (known["label_counts"], known["unlabelled"]) == (labels, without)


def test_splits_are_asked_and_decided_about_by_their_classes(
    tmp_path: Path,
    run: Run,  # noqa: F811
    flags: list[object],
) -> None:
    root, memory = splits(tmp_path / "images"), tmp_path / "memory"
    run("add", memory, root / "train", *flags)
    status, out, err = run("evaluate", memory, root, "--labels", "parent", "--exclude", "test", "-k", 1, "--json")
    assert status == 0, err
    assert json.loads(out)["accuracy"]["plurality"] == {"1": 100.0}
    status, _, err = run("classify", memory, root, "--out", tmp_path / "out", "--exclude-files", "train")
    assert status == 0, err
    assert pq.read_table(tmp_path / "out/decisions").num_rows == 1


def test_the_document_of_an_add_tells_of_labels_and_of_what_was_passed_over(
    tmp_path: Path,
    run: Run,  # noqa: F811
    flags: list[object],
) -> None:
    _, out, _ = run("add", tmp_path / "memory", web_dataset(tmp_path / "images"), *flags, "--json")
    report = json.loads(out)
    assert (report["label_counts"], report["labelled"], report["unlabelled"]) == ({"cat": 1}, 1, 1)
    assert sum(report["why_unlabelled"].values()) == 1
    assert (report["skipped"], report["passed_over"]["endings"]) == (1, {".heic": 1})


def test_a_single_file_says_after_what_it_is_labelled(tmp_path: Path, run: Run, flags: list[object]) -> None:  # noqa: F811
    root = write(tmp_path / "Downloads", "wolf.png")
    _, _, err = run("add", tmp_path / "memory", root / "wolf.png", *flags)
    assert "the image has the label Downloads, the name of its folder: `--label NAME` gives it another" in err
    _, out, err = run("add", tmp_path / "memory", root / "wolf.png", "--label", "wolf")
    assert ("labels: wolf (1)" in out, "has the label" in err) == (True, False)
    assert VisualMemory(tmp_path / "memory").status()["entries_by_label"] == {"Downloads": 1, "wolf": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label", "x", "--labels", "parent"], "leave one of them out"),
        (["--label", " "], "label is empty"),
        (["--exclude", ""], "empty pattern"),
        (["--exclude", "*"], "no image but those excluded"),
        (["--image-extension", "cls"], "no ending of an image"),
        (["--labels", "parents"], "give folder"),
        (["--labels", "file:{root}/none.csv"], "there is no file"),
        (["--labels", "file:{root}"], "is a folder"),
        (["--labels", "column:breed", "--dry-run"], "no folder breed=VALUE holds it"),
    ],
)
def test_mistakes_with_labels_are_told_before_anything_is_done(
    tmp_path: Path,
    run: Run,  # noqa: F811
    flags: list[object],
    options: list[str],
    message: str,
) -> None:
    root = image_folder(tmp_path / "images")
    status, _, err = run("add", tmp_path / "memory", root, *[option.format(root=root) for option in options], *flags)
    assert message in err
    assert status == (0 if "--dry-run" in options else 2 if "file:" not in str(options) and "*" not in options else 1)
    assert not (tmp_path / "memory/versions").exists()

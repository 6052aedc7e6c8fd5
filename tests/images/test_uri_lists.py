"""Lists of uris as a source: tables of people and of other programs, and the inventories of S3."""

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote_plus

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SourceError, UsageError
from pipeline.images.containers.container import ImageChoice
from pipeline.images.labels.labels import NO_LABEL_IN_LIST, Labels
from pipeline.images.reading import files
from pipeline.images.reading.files import read_file
from pipeline.images.sources import list_tables, listing
from pipeline.images.sources.listing import list_source
from tests.images.test_listing import make
from tests.store.seaweed import SeaweedFS


def uris_and_labels(found: listing.Listing) -> dict[str, str | None]:
    table = found.images
    return dict(zip(table.column("uri").to_pylist(), table.column("label").to_pylist(), strict=True))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make(tmp_path / "photos", "cat/1.jpg", "cat/a#b 100%.jpg", "dog/2.jpg", "dog/3", "unlisted.jpg")


def write(path: Path, columns: dict[str, list]) -> Path:
    """The same table as Parquet, CSV, TSV, or CSV compressed, by the ending of its name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=2)
        return path
    separator = "\t" if ".tsv" in path.name else ","
    lines = [separator.join(columns), *(separator.join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["list.parquet", "list.csv", "list.tsv", "list.csv.gz"])
@pytest.mark.parametrize("column", ["path", "URL", "file_name", "uri"])
def test_the_rows_of_a_table_name_images_labels_and_columns_to_keep(
    photos: Path, tmp_path: Path, name: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_tables, "ROWS_AT_ONCE", 2)
    places = [
        f"{photos}/dog/2.jpg",
        "photos/cat/a#b 100%.jpg",
        f"file://{photos}/dog/3",
        "./photos/../photos/cat/1.jpg",
    ]
    if column == "uri":  # encoded already
        places[1] = "photos/cat/a%23b 100%25.jpg"
    columns = {column: places, "label": ["rex", "tom", "rex", "tom"], "camera": ["c2", "c1", "c3", "c0"]}
    source = str(write(tmp_path / name, columns))
    found = list_source(source, Labels(), ["camera"])
    expected = {
        f"{photos}/cat/1.jpg": "tom",
        f"{photos}/cat/a%23b 100%25.jpg": "tom",
        f"{photos}/dog/2.jpg": "rex",
        f"{photos}/dog/3": "rex",
    }
    assert uris_and_labels(found) == expected
    assert [*uris_and_labels(found)] == sorted(expected), "in the order of uris, as a folder is"
    assert [read_file(uri) for uri in expected] == [b"x"] * 4
    assert found.images.column("camera").to_pylist() == ["c0", "c1", "c2", "c3"]
    assert (found.name, found.uri, found.is_file) == ("list", source, False)
    assert [column.name for column in found.kept] == ["camera"]
    assert uris_and_labels(list_source(source, Labels("column:camera")))[f"{photos}/dog/3"] == "c3"
    assert set(uris_and_labels(list_source(source, Labels("none"))).values()) == {None}
    assert list_source(source, Labels(), (), ImageChoice(("cat",))).planned == 2


def test_without_a_column_of_labels_a_list_has_none_but_parent_and_file_give_them(photos: Path, tmp_path: Path) -> None:
    places = [f"{photos}/dog/2.jpg", f"{photos}/cat/1.jpg"]
    source = str(write(tmp_path / "list.csv", {"path": places}))
    found = list_source(source, Labels())
    assert found.census.unlabelled == Counter({NO_LABEL_IN_LIST: 2})
    assert list_source(source, Labels("parent")).census.counts == Counter({"cat": 1, "dog": 1})
    assert list_source(source, Labels("label:pet")).census.counts == Counter({"pet": 2})
    (tmp_path / "labels.csv").write_text(f"uri,label,camera\n{places[0]},rex,leica\n")
    given = list_source(source, Labels(f"file:{tmp_path / 'labels.csv'}"), ["camera"])
    assert uris_and_labels(given) == {places[1]: None, places[0]: "rex"}
    assert given.images.column("camera").to_pylist() == [None, "leica"]
    with pytest.raises(SourceError, match="no column breed"):
        list_source(source, Labels("column:breed"))
    with pytest.raises(SourceError, match="has a column maker, it has path"):
        list_source(source, Labels(), ["maker"])


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_folder_of_lists_is_one_source(photos: Path, tmp_path: Path, ending: str) -> None:
    (tmp_path / "lists").mkdir()
    write(tmp_path / f"lists/1.{ending}", {"path": [f"{photos}/dog/2.jpg"], "label": ["rex"]})
    write(tmp_path / f"lists/0.{ending}", {"label": ["tom"], "path": ["../photos/cat/1.jpg"]})
    found = list_source(str(tmp_path / "lists"), Labels())
    assert uris_and_labels(found) == {f"{photos}/cat/1.jpg": "tom", f"{photos}/dog/2.jpg": "rex"}
    assert (found.name, found.skipped) == ("lists", 0)
    make(tmp_path / "lists", "an.jpg")  # images with their labels beside them are no list
    if ending == "csv":
        assert list_source(str(tmp_path / "lists"), Labels()).planned == 1


def test_a_list_may_name_archives_and_what_is_no_image_is_counted(photos: Path, tmp_path: Path) -> None:
    make(photos, "a.tar", "notes.txt")
    places = [f"{photos}/{name}" for name in ("a.tar", "notes.txt", "cat/1.jpg")]
    found = list_source(str(write(tmp_path / "list.csv", {"path": places})), Labels())
    assert found.containers.column("uri").to_pylist() == [f"{photos}/a.tar"]
    assert (found.images.num_rows, found.skipped) == (1, 1)


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"url": ["https://example.org/1.jpg"]}, "row 1 of .* on the web: download the images first"),
        ({"path": ["/a/1.jpg", ""], "label": ["x", "y"]}, "row 2 of .* names no file"),
        ({"uri": ["s3://bucket/a.tar#1.jpg"]}, "inside an archive"),
        ({"caption": ["a cat"]}, "has no column of uris, but 'caption'"),
    ],
)
def test_rows_that_name_nothing_to_be_read_are_told(tmp_path: Path, columns: dict[str, list], error: str) -> None:
    with pytest.raises(SourceError, match=error):
        list_source(str(write(tmp_path / "list.csv", columns)), Labels())


def test_secrets_and_damage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a password"):
        list_source(str(write(tmp_path / "list.csv", {"path": ["s3://me:secret@bucket/1.jpg"]})), Labels())
    whole = write(tmp_path / "list.csv.gz", {"path": [f"/a/{number}.jpg" for number in range(1_000)]})
    whole.write_bytes(whole.read_bytes()[:-600])
    with pytest.raises(SourceError, match="the list .* cannot be read"):
        list_source(str(whole), Labels())


# S3 Inventory

CSV_SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate"
ROWS = [
    ("pets/cat/a b+c#1.jpg", "true", "false", 5),
    ("pets/cat/old.jpg", "false", "false", 5),
    ("pets/cat/gone.jpg", "true", "true", 0),
    ("pets/dog/", "true", "false", 0),
    ("pets/dog/é%.png", "true", "false", 7),
    ("pets/.thumbs/1.jpg", "true", "false", 1),
    ("pets/.thumbs/2.jpg", "true", "false", 1),
    ("pets/x.tar", "true", "false", 10),
    ("pets/notes", "true", "false", 1),
]


def csv_of(bucket: str) -> bytes:
    rows = (
        (bucket, quote_plus(key, safe="/"), "v", latest, deleted, size, "2026-01-02T03:04:05.000Z")
        for key, latest, deleted, size in ROWS
    )
    lines = [",".join(f'"{value}"' for value in row) for row in rows]
    return gzip.compress(("\n".join(lines) + "\n").encode())


def parquet_of(bucket: str, path: Path) -> None:
    keys, latest, deleted, sizes = zip(*ROWS, strict=True)
    times = pa.array([1_767_323_045_000] * len(ROWS), pa.timestamp("ms", tz="UTC"))
    columns = {
        "bucket": [bucket] * len(ROWS),
        "key": [*keys],
        "is_latest": [text == "true" for text in latest],
        "is_delete_marker": [text == "true" for text in deleted],
        "size": [*sizes],
        "last_modified_date": times,
    }
    pq.write_table(pa.table(columns), path)


def manifest(kind: str, keys: list[str], destination: str) -> str:
    said = {
        "sourceBucket": "of-pets",
        "destinationBucket": f"arn:aws:s3:::{destination}",
        "version": "2016-11-30",
        "fileFormat": kind,
        "fileSchema": CSV_SCHEMA if kind == "CSV" else "message s3.inventory { required binary bucket (STRING); }",
        "files": [{"key": key, "size": 1, "MD5checksum": "0" * 32} for key in keys],
    }
    return json.dumps(said)


def check_inventory(found: listing.Listing) -> None:
    rows = found.images.to_pylist()
    assert [row["uri"] for row in rows] == ["s3://of-pets/pets/cat/a b+c%231.jpg", "s3://of-pets/pets/dog/é%25.png"]
    assert [(row["label"], row["num_bytes"]) for row in rows] == [("cat", 5), ("dog", 7)]
    assert {row["modified"].isoformat() for row in rows} == {"2026-01-02T03:04:05+00:00"}
    assert found.containers.column("uri").to_pylist() == ["s3://of-pets/pets/x.tar"]
    assert (found.name, found.skipped, found.passed_over.leftovers) == ("of-pets", 1, {".thumbs": 1})


@pytest.mark.parametrize("kind", ["CSV", "Parquet"])
def test_an_inventory_that_was_copied_here(tmp_path: Path, kind: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "2026-01-03T00-00Z").mkdir()
    name = "0.csv.gz" if kind == "CSV" else "0.parquet"
    if kind == "CSV":
        (tmp_path / "data" / name).write_bytes(csv_of("of-pets"))
    else:
        parquet_of("of-pets", tmp_path / "data" / name)
    place = tmp_path / "2026-01-03T00-00Z/manifest.json"
    place.write_text(manifest(kind, [f"prefix//of-pets/all/data/{name}"], "of-inventories"))
    check_inventory(list_source(str(place), Labels("parent")))
    (tmp_path / "data" / name).unlink()
    with pytest.raises(SourceError, match="copy it there"):
        list_source(str(place), Labels("parent"))


def test_other_manifests_are_told(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(SourceError, match="is no manifest of an S3 Inventory"):
        list_source(str(tmp_path / "manifest.json"), Labels())
    (tmp_path / "manifest.json").write_text(manifest("ORC", ["a.orc"], "b"))
    with pytest.raises(SourceError, match="configure it as CSV or Parquet"):
        list_source(str(tmp_path / "manifest.json"), Labels())


@pytest.fixture
def server(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[SeaweedFS]:
    for name, value in s3.admin.items():
        monkeypatch.setenv(name, value)
    files._file_system.cache_clear()
    yield s3
    files._file_system.cache_clear()


def test_an_inventory_in_a_bucket_makes_no_listing(server: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    place = server.uri().removeprefix("s3://")
    there = fsspec.filesystem("s3", skip_instance_cache=True)
    there.pipe_file(f"{place}/data/0.csv.gz", csv_of("of-pets"))
    there.pipe_file(
        f"{place}/d1/manifest.json", manifest("CSV", [f"{place.partition('/')[2]}/data/0.csv.gz"], "plain").encode()
    )
    files._file_system.cache_clear()
    bucket, asked = files._file_system(("s3", os.getpid())), []
    real = bucket.call_s3
    monkeypatch.setattr(bucket, "call_s3", lambda method, **options: asked.append(method) or real(method, **options))
    check_inventory(list_source(f"s3://{place}/d1/manifest.json", Labels("parent")))
    assert asked == ["list_objects_v2"], "whether the manifest is a folder"

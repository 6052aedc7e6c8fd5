"""Lists of uris as a source: a CSV, TSV or Parquet file with a column of them, or the manifest of an S3 Inventory.

Nothing is listed then: the files are those that the rows name, in a bucket or on this machine. Rows are read in
batches, so that memory does not grow with a list. A row may name an archive or a table too, as an inventory does.
"""

import contextlib
import datetime
import json
import posixpath
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.errors import SourceError
from pipeline.images.containers.kept_columns import ColumnsFound
from pipeline.images.containers.npy import NoVectors
from pipeline.images.containers.parquet import (
    FileLabel,
    NoImages,
    file_label,
    inspect,
    kept_values,
    open_parquet,
    texts_in,
)
from pipeline.images.containers.vectors import inspect_column
from pipeline.images.decoding.decode import Rejected
from pipeline.images.labels.label_files import describe_list
from pipeline.images.labels.labels import Labels
from pipeline.images.names.leftovers import Exclusion, PassedOver, leftover_of
from pipeline.images.names.suffixes import PARQUET
from pipeline.images.names.uris import path_of_uri, uri_of_path
from pipeline.images.reading.files import is_remote, open_file, read_file
from pipeline.images.reading.parquet_pages import Source
from pipeline.images.sources.list_tables import TABLES, ListTable, batches_in, explained, schema_of
from pipeline.images.sources.source_files import SourceFile
from pipeline.store.storage.open_storage import refuse_secrets
from pipeline.store.tables.kept_columns import KeptColumn

MANIFEST = "manifest.json"
# The first that a table has names the files; case and "_" are ignored. Only "uri" is percent-encoded already.
URI_COLUMNS = ("uri", "url", "imageurl", "imagepath", "path", "filepath", "filename", "key")
_SIZE_COLUMNS, _TIME_COLUMNS = ("size",), ("lastmodified", "lastmodifieddate")  # as an inventory has them
_WEB = re.compile(r"https?://", re.IGNORECASE)


@dataclass(frozen=True)
class _Columns:
    """The columns of a table that say where a file is, and how it was when it was listed; None for what it lacks."""

    uri: str
    bucket: str | None
    size: str | None
    modified: str | None
    is_latest: str | None
    is_deleted: str | None

    @property
    def names(self) -> list[str]:
        every = (self.uri, self.bucket, self.size, self.modified, self.is_latest, self.is_deleted)
        return [name for name in every if name is not None]


@dataclass(frozen=True)
class UriList:
    """A list of uris at `uri`. In an inventory, hidden files and leftovers are passed over as in a bucket."""

    uri: str
    name: str
    tables: tuple[ListTable, ...]
    is_inventory: bool = False

    def note_columns(self, columns: ColumnsFound) -> set[str]:
        """Note the columns of all tables, and return their names. Costs the footer or the header of each."""
        names: set[str] = set()
        for table in self.tables:
            with explained(table.uri):
                schema = schema_of(table)
            columns.note(table.uri, schema)
            names.update(schema.names)
        return names

    def files(
        self, labels: Labels, kept: Sequence[KeptColumn], exclusion: Exclusion, passed: PassedOver
    ) -> Iterator[SourceFile]:
        """The files that the rows name, with their labels and kept values. Reads each table once.

        Raises SourceError for a table that cannot be read, or a row that names nothing that can be.
        """
        for table in self.tables:
            with explained(table.uri):
                yield from self._files_of(table, labels, kept, exclusion, passed)

    def _files_of(
        self, table: ListTable, labels: Labels, kept: Sequence[KeptColumn], exclusion: Exclusion, passed: PassedOver
    ) -> Iterator[SourceFile]:
        schema = schema_of(table)
        columns = _columns_of(schema.names, table.uri)
        label = file_label(schema, table.uri, labels.inside, columns.uri)
        there = [column.name for column in kept if column.name in schema.names]
        wanted = dict.fromkeys([*columns.names, *([label.column] if label.column else []), *there])
        folder, row, last = table.uri.rpartition("/")[0], 0, ""
        for batch in batches_in(table, [*wanted]):
            said = zip(
                _places(batch, columns, table, row, folder),
                _labels_of(batch, label),
                kept_values(batch, kept, schema, table.uri),
                strict=True,
            )
            for place, named, values in said:
                row += 1
                if place is None or place.below.endswith("/"):
                    continue
                steps = place.below.split("/")
                leftover = leftover_of(steps) if self.is_inventory else None
                if leftover is not None:
                    there_now = "/".join(steps[: steps.index(leftover) + 1])
                    if there_now != last:
                        passed.note_leftover(leftover)
                    last = there_now
                elif exclusion.covers(path_of_uri(place.below)):
                    passed.excluded += 1
                else:
                    own = named if named is not None else _label_of_path(place, labels)
                    yield place._replace(label=own, kept=values)


def list_at(uri: str) -> UriList | None:
    """The list of uris in the file at a uri; None if the file is of another kind. Raises SourceError, StorageError."""
    name = uri.rpartition("/")[2]
    if name == MANIFEST:
        return _inventory(uri)
    stem = re.sub(r"(\.csv|\.tsv|\.parquet|\.pq)(\.gz)?$", "", name, flags=re.IGNORECASE)
    if name.lower().endswith(TABLES) or (name.lower().endswith(PARQUET) and is_list(uri)):
        return UriList(uri, stem, (ListTable(uri),))
    return None


def lists_in(folder: str, name: str, uris: Sequence[str]) -> UriList | None:
    """The lists in a folder that holds nothing else; None if the first is none."""
    first = min(uris)
    if not (first.lower().endswith(TABLES) or is_list(first)):
        return None
    with explained(first):
        names = schema_of(ListTable(first)).names
    return UriList(folder, name, tuple(map(ListTable, sorted(uris)))) if _first_of(URI_COLUMNS, names) else None


def is_list(uri: str) -> bool:
    """Whether a Parquet file has a column of uris, and neither images nor vectors. Costs its footer."""
    try:
        with open_file(uri) as stream:
            for look in (inspect, inspect_column):
                with contextlib.suppress(NoImages, NoVectors):
                    look(stream, uri, "none")
                    return False
            return _first_of(URI_COLUMNS, open_parquet(Source(stream), uri).schema_arrow.names) is not None
    except (SourceError, Rejected):
        return False


def _inventory(uri: str) -> UriList | None:
    try:
        said = json.loads(read_file(uri))
        files = [one["key"] for one in said["files"]]
        kind, bucket = said["fileFormat"], said["destinationBucket"].rpartition(":")[2]
        names = tuple(re.sub("[^a-z]", "", name.lower()) for name in said["fileSchema"].split(","))
    except Rejected as error:
        raise SourceError(f"{uri} cannot be read ({error}): check the rights to it") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{uri} is no manifest of an S3 Inventory: name the file of uris itself") from error
    if kind not in ("CSV", "Parquet"):
        raise SourceError(f"the inventory {uri} is in {kind}: configure it as CSV or Parquet")
    if is_remote(uri):
        scheme = uri.partition("://")[0]
        tables = [f"{scheme}://{bucket}/{uri_of_path(key)}" for key in files]
    else:  # copied here, with its data beside it or, as in its bucket, in a folder data beside its own
        folder = uri.rpartition("/")[0]
        tables = [f"{_copied_to(folder, key.rpartition('/')[2])}" for key in files]
    header = names if kind == "CSV" else None
    return UriList(uri, str(said.get("sourceBucket", bucket)), tuple(ListTable(one, header) for one in tables), True)


def _copied_to(folder: str, name: str) -> str:
    above = folder.rpartition("/")[0]
    places = [f"{folder}/{name}", f"{folder}/data/{name}", f"{above}/data/{name}"]
    for place in places:
        with contextlib.suppress(Rejected), open_file(place):
            return place
    raise SourceError(f"the inventory's file {name} is not in {folder} and not in {above}/data: copy it there")


def _first_of(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    plain = {re.sub("[^a-z0-9]", "", name.lower()): name for name in reversed(names)}
    return next((plain[name] for name in wanted if name in plain), None)


def _columns_of(names: Sequence[str], uri: str) -> _Columns:
    bucket = _first_of(("bucket",), names)
    key = _first_of(("key",), names)
    found = key if bucket and key else _first_of(URI_COLUMNS, names)
    if found is None:
        raise SourceError(
            f"{uri} has no column of uris, but {describe_list([*names])}: name it uri, or give a folder of images"
        )
    return _Columns(
        found,
        bucket if found == key else None,
        _first_of(_SIZE_COLUMNS, names),
        _first_of(_TIME_COLUMNS, names),
        _first_of(("islatest",), names),
        _first_of(("isdeletemarker",), names),
    )


def _places(
    batch: pa.RecordBatch, columns: _Columns, table: ListTable, first_row: int, folder: str
) -> Iterator[SourceFile | None]:
    """The file that each row names; None for a version that is not the newest, or a deleted one."""

    def texts(name: str | None) -> list[str | None]:
        return texts_in(batch, name)

    deleted, latest = texts(columns.is_deleted), texts(columns.is_latest)
    sizes, times = texts(columns.size), texts(columns.modified)
    for row, (text, bucket) in enumerate(zip(texts(columns.uri), texts(columns.bucket), strict=True)):
        if (deleted[row] or "").lower() == "true" or (latest[row] or "").lower() == "false":
            yield None
            continue
        if not text or (columns.bucket and not bucket):
            raise SourceError(f"row {first_row + row + 1} of {table.uri} names no file: take the row out")
        if bucket:
            key = urllib.parse.unquote_plus(text) if table.names else text
            uri, below = f"s3://{bucket}/{uri_of_path(key)}", uri_of_path(key)
        else:
            uri = _absolute(text, folder, is_encoded=columns.uri.lower() == "uri")
            below = uri.partition("://")[2].partition("/")[2] if is_remote(uri) else uri.lstrip("/")
            if _WEB.match(uri):
                raise SourceError(
                    f"row {first_row + row + 1} of {table.uri} names {uri[:200]}, which is on the web: download the "
                    "images first, for instance with img2dataset, and add what it wrote"
                )
            if "#" in uri:
                raise SourceError(
                    f"row {first_row + row + 1} of {table.uri} names {uri}, inside an archive or a table: name "
                    "the file, or write %23 for a # in a name"
                )
            if "@" in uri or "?" in uri:
                refuse_secrets(uri)
        size = sizes[row]
        yield SourceFile(uri, below, int(size) if size and size.isdigit() else None, _time_of(times[row]))


def _absolute(text: str, folder: str, *, is_encoded: bool) -> str:
    """The uri that a list means by a text: a uri, a path, or a path relative to the list's folder."""
    text = text.strip()
    scheme, found, rest = text.partition("://")
    encode = str if is_encoded else uri_of_path
    if found and scheme.lower() != "file":
        return text if _WEB.match(text) else f"{scheme.lower()}://{encode(rest)}"
    path = encode(rest if found else text)
    return posixpath.normpath(path) if path.startswith("/") else _joined(folder, path)


def _joined(folder: str, path: str) -> str:
    scheme, found, rest = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(f'{rest}/{path}')}" if found else posixpath.normpath(f"{folder}/{path}")


def _time_of(text: str | None) -> datetime.datetime | None:
    if not text:
        return None
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=datetime.UTC)


def _labels_of(batch: pa.RecordBatch, label: FileLabel) -> list[str | None]:
    return [text for text, _ in label.labels_in(batch)]


def _label_of_path(file: SourceFile, labels: Labels) -> str | None:
    """The label of a file that its row gives none: by its folders, but not the first, since a list has no folder."""
    return labels.of_path(file.uri, file.below if labels.option == "parent" else "", "")

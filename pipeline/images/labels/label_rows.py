"""A label file for the images of a source, and the search for the row that names an image.

A row may name an image by its path relative to the source, by its path relative to the label file's own folder (Hugging
Face's `file_name`), by its uri or whole path, or by its bare name, with or without the ending (Kaggle's `id`).
"""

import functools
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import SourceError
from pipeline.images.labels.label_files import describe_list, last_change, put, read_fields, read_objects, read_rows
from pipeline.images.labels.label_text import clean_label, text_of, text_of_bytes
from pipeline.images.labels.name_index import CHUNK_ROWS, LabelColumn, NameIndex
from pipeline.images.names.uris import path_of_uri, printable

# The first column that exists names the image. `id` is last, because other tools number their rows with it.
NAME_COLUMNS = (
    *("uri", "filename", "file", "filepath", "path", "imagepath", "imagefile", "image", "imagename", "imageid", "img"),
    *("imgpath", "imgname", "imgid", "name", "key", "id"),
)
LABEL_COLUMNS = ("label", "labels", "class", "cls", "category", "target")


@dataclass(frozen=True)
class LabelFile:
    """A label file: `rows` finds the first row by the name in it, `labels` has the label of each row, or None.

    `folder` is the path of the file's folder, `names` the column of names as they are written. Takes the names in Arrow
    and 16 bytes for each row.
    """

    path: str
    folder: str
    rows: NameIndex
    labels: LabelColumn
    names: pa.ChunkedArray = field(repr=False)

    def row_of(self, uri: str, root: str) -> int | None:
        """The row that names the image at a uri, in a source at `root`; None if no row does, or only by a bare name.

        A row may also name an image in a container by its member.
        """
        return next((row for name in _names(uri, root, self.folder) if (row := self.rows.get(name)) is not None), None)

    def row_by_bare_name(self, uri: str) -> int | None:
        """The row that names an image file by its name without folders, with or without its ending; may be None."""
        base = plain_name(path_of_uri(uri).rpartition("/")[2])
        row = self.rows.get(base)
        return row if row is not None else self.rows.get(base.rpartition(".")[0])

    def name_in(self, row: int) -> str:
        """The name in a row, as it is written."""
        return _text(self.names[row].as_py()) or ""

    def label_of(self, uri: str, root: str) -> str | None:
        """The label of the image at a uri; None if no row names it, or its row has no label."""
        row = self.row_of(uri, root)
        return None if row is None else self.labels[row]


def read_label_file(path: str) -> LabelFile:
    """The label file at a path, cached until the file changes. Raises SourceError."""
    return _read(path, last_change(path))


@functools.lru_cache(maxsize=2)
def _read(path: str, change: object) -> LabelFile:
    local = os.path.abspath(os.path.expanduser(path.removeprefix("file://")))
    table, name_column, label_column = label_table(path, change)
    if not table.num_rows:
        raise SourceError(f"{path} names no image: give a row for each image to be labelled")
    rows = NameIndex(map(plain_name, _names_in(table, name_column, path)), table.column(name_column))
    labels = LabelColumn(clean_label(text and printable(text).strip()) for text in _column(table, label_column, path))
    file = LabelFile(path, os.path.dirname(local), rows, labels, table.column(name_column))
    for row, first in rows.repeated():
        put({0: labels[first] or ""}, 0, labels[row] or "", f"{name_column} '{file.name_in(row)}'", path)
    return file


def _names_in(table: pa.Table, name_column: str, path: str) -> Iterator[str]:
    for row, name in enumerate(_column(table, name_column, path)):
        if name is None or not name.strip():
            raise SourceError(f"row {row + 1} of {path} has no {name_column}: give it one or take the row out")
        yield name


def rows_of_images(uris: pa.ChunkedArray, file: LabelFile, root: str) -> np.ndarray:
    """For each image file of a source, the row of a label file that names it; -1 if no row does (int64 [M]).

    A row may name an image by its bare name if only one image has this name. Raises SourceError if several have it.
    Takes 8 bytes for each image and 9 for each row.
    """
    rows_M = np.full(len(uris), -1, np.int64)
    for at, uri in enumerate(_values(uris)):
        row = file.row_of(uri, root)
        if row is not None:
            rows_M[at] = row
    is_taken_N = np.zeros(len(file.rows), bool)
    is_taken_N[rows_M[rows_M >= 0]] = True
    first_N = np.full(len(file.rows), -1, np.int64)
    unnamed_M = rows_M < 0
    for at, uri in enumerate(_values(uris) if unnamed_M.any() else ()):
        row = file.row_by_bare_name(uri) if unnamed_M[at] else None
        if row is None or is_taken_N[row]:
            continue
        if first_N[row] < 0:
            first_N[row] = at
        else:
            first = uris[int(first_N[row])].as_py()
            raise SourceError(
                f"'{file.name_in(row)}' in {file.path} may be {first} or {uri}: give the path from the source on"
            )
        rows_M[at] = row
    return rows_M


def _values(column: pa.ChunkedArray) -> Iterator[Any]:
    for chunk in column.chunks:
        for start in range(0, len(chunk), CHUNK_ROWS):
            yield from chunk.slice(start, CHUNK_ROWS).to_pylist()


@functools.lru_cache(maxsize=1)
def label_table(path: str, _: object) -> tuple[pa.Table, str, str]:
    """A label file as a table, the name of its column of image names, and of its column of labels. Raises SourceError.

    The second argument is the result of `last_change` for the file, a key of the cache.
    """
    objects = read_objects(path) if path.lower().endswith((".json", ".jsonl")) else None
    if objects is None and path.lower().endswith(".json"):
        said = read_fields(path)
        there = dict.fromkeys(["label", *(name for _, fields in said for name in fields)])
        columns = {name: _texts([fields.get(name) for _, fields in said]) for name in there if name != "uri"}
        return pa.table(columns | {"uri": pa.array([uri for uri, _ in said], pa.string())}), "uri", "label"
    table = read_rows(path) if objects is None else _table_of(objects)
    names = _first_of(NAME_COLUMNS, table.column_names)
    labels = _first_of(LABEL_COLUMNS, table.column_names)
    if not names:
        raise SourceError(
            f"{path} has no column that names images, but {describe_list(table.column_names)}: name one of them uri or "
            "file_name"
        )
    if not labels and table.num_columns == 2:  # of two columns, the other one has the labels
        labels = [name for name in table.column_names if name != names[0]]
    if not labels:
        raise SourceError(f"{path} has no column label, but {describe_list(table.column_names)}: name one of them so")
    for name in (names[0], labels[0]):
        if table.column_names.count(name) > 1:
            raise SourceError(f"{path} has two columns {name}: mend its header")
    return table, names[0], labels[0]


def _table_of(objects: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Objects as a table of texts."""
    names = dict.fromkeys(name for row in objects for name in row)
    return pa.table({name: _texts([row.get(name) for row in objects]) for name in names})


def _first_of(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names of columns that are in `wanted`, in the order of `wanted`. Case, "_" and the like are ignored."""
    plain = {name: re.sub("[^a-z0-9]", "", name.lower()) for name in names}
    return sorted((name for name in names if plain[name] in wanted), key=lambda name: wanted.index(plain[name]))


def _texts(values: list[Any]) -> pa.Array:
    return pa.array([text_of(value) for value in values], pa.string())


def _column(table: pa.Table, name: str, path: str | Path) -> Iterator[str | None]:
    """A column of names or labels as texts, one after the other. Raises SourceError for what is no text or number."""
    column = table.column(name)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_nested(kind):
        raise SourceError(f"the column {name} of {path} holds {kind}: write one text or number in each row")
    values = column.cast(kind) if pa.types.is_dictionary(column.type) else column
    for row, value in enumerate(_values(values)):
        if isinstance(value, str | bytes) and "\0" in _decoded(value):
            raise SourceError(f"the {name} in row {row + 1} of {path} holds a NUL character: write it without")
        yield _text(value)


def _decoded(value: str | bytes) -> str:
    return text_of_bytes(value) if isinstance(value, bytes) else value


def _text(value: object) -> str | None:
    return text_of(_decoded(value) if isinstance(value, bytes) else value)


def _names(uri: str, root: str, folder: str) -> Iterator[str]:
    """The names that a row may have for the image at a uri, the most certain name first."""
    container, inside, member = uri.partition("#")
    where = path_of_uri(uri)  # the decoded path, with the "%" and "#" of the file name
    top = path_of_uri(root)
    literal = f"{path_of_uri(container)}#{path_of_uri(member)}" if inside else where
    above = top.rpartition("/")[0]
    is_alone = where == top or path_of_uri(container) == top  # the source is this one file
    tops = [above, above.rpartition("/")[0]] if is_alone else [top]
    yield from (plain_name(literal[len(one) + 1 :]) for one in tops if one and literal.startswith(f"{one}/"))
    if literal.startswith(f"{folder}/"):
        yield plain_name(literal[len(folder) + 1 :])
    yield plain_name(literal)
    yield plain_name(uri)
    if root and uri.startswith(f"{root}/"):  # relative, but encoded like the uris of a memory
        yield plain_name(uri[len(root) + 1 :])
    if inside:
        plain = plain_name(path_of_uri(member))
        yield plain
        yield plain.rpartition(".")[0]


def plain_name(name: str) -> str:
    r"""A name in a normal form, without "./" and "//", with "/" for the "\" of Windows, in Unicode's NFC."""
    text = name.strip().removeprefix("file://")
    if text.isascii() and "\\" not in text and not text.startswith("./") and "//" not in text and "/./" not in text:
        return text
    text = text.replace("\\", "/")
    scheme, found, rest = text.partition("://")
    text, scheme = (rest, f"{scheme}://") if found else (text, "")
    absolute = "/" if text.startswith("/") else ""
    steps = [step for step in re.split("/+", text) if step not in ("", ".")]
    return unicodedata.normalize("NFC", scheme + absolute + "/".join(steps))

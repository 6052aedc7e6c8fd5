"""Label files that users write: a label for each entry, or a map from labels to the labels of a label set.

The formats are CSV and TSV with a header, Parquet, JSON objects and JSON lines. Names are read as they are written: 007
stays 007. Only the spaces around a label that an entry will get are removed.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
from pyarrow import csv, parquet

from pipeline.errors import SourceError
from pipeline.images.labels.label_text import encoding_of, text_of_bytes
from pipeline.images.names.uris import printable
from pipeline.images.reading.parquet_pages import PageBomb, Source, batches_of

SUFFIXES = (".csv", ".tsv", ".parquet", ".json", ".jsonl")
FORMS = "give a .csv or .tsv file with a header, a .parquet file, a .json object, or a .jsonl file of objects"
ROWS_AT_ONCE = 1 << 16
MAX_TABLE_BYTES = 256 << 20  # of rows at once: a table of labels is read whole
HEAD_BYTES = 64 << 10  # of a table, enough for its header
_AN_ID = re.compile(r"\s*[0-9]{1,30}\s*")

Key = TypeVar("Key", int, str)


class _Object(list):
    """A JSON object as pairs, so that a name given twice is detected."""


def read_entry_labels(path: str | Path) -> tuple[dict[int, str], dict[str, str]]:
    """Labels by id, and labels by uri: one of the two is empty. Raises SourceError.

    A table has the columns `id` or `uri` (if it has both, `id` counts) and `label`. JSON is {id: label} or
    {uri: label}; a label may be written as {"label": label, …}.
    """
    local = _local(path)
    if local.endswith(".json"):
        pairs = [
            (key, _text_of(fields.get("label"), f"the label of '{key}' in {path}")) for key, fields in read_fields(path)
        ]
        names, labels = [key for key, _ in pairs], [label for _, label in pairs]
        column = "id" if names and _AN_ID.fullmatch(names[0]) else "uri"
    else:
        table = _read_table(local, path)
        column = "id" if "id" in table.column_names else "uri"
        if column not in table.column_names:
            raise SourceError(
                f"{path} has no column id or uri, but {describe_list(table.column_names)}: name one of them so"
            )
        names, labels = _texts(table, column, path), _texts(table, "label", path)
    if not names:
        raise SourceError(f"{path} names no entry: give a row for each entry to be labelled")
    by_id: dict[int, str] = {}
    by_uri: dict[str, str] = {}
    for row, (name, text) in enumerate(zip(names, labels, strict=True), start=1):
        label = given_label(text)
        if label is None:
            raise SourceError(f"the label of {column} {name} in row {row} of {path} is empty: give it a label")
        if column == "uri":
            put(by_uri, name, label, f"uri '{name}'", path)
            continue
        if not _AN_ID.fullmatch(name):
            raise SourceError(
                f"id '{name}' in row {row} of {path} is not a whole number: give ids as `search --json` shows them"
            )
        put(by_id, int(name), label, f"id {name.strip()}", path)
    return by_id, by_uri


def read_fields(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The ids or uris of a JSON object, each with its label and other fields. Raises SourceError."""
    pairs = _read_object(_local(path), path)
    return [(name, dict(said) if isinstance(said, _Object) else {"label": said}) for name, said in pairs]


def read_objects(path: str | Path) -> list[dict[str, Any]] | None:
    """The objects of a .jsonl file, or of a .json file that is a list of them; None for another .json file.

    Raises SourceError.
    """
    local = _local(path)
    try:
        with open(local, "rb") as stream:
            data = stream.read()
        text = data.decode(encoding_of(data))
        if local.lower().endswith(".jsonl"):
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read as JSON ({error}): {FORMS}") from error
    if not isinstance(found, list):
        return None
    if not all(isinstance(row, dict) for row in found):
        raise SourceError(f'{path} has rows that are no objects: write each as {{"file_name": …, "label": …}}')
    return found


def read_rows(path: str | Path) -> pa.Table:
    """All rows of a label file that is a table. Every column of a CSV or TSV is text. Raises SourceError."""
    return _read_table(_local(path), path)


def last_change(path: str) -> tuple[int, int] | None:
    """The time of the last change and the size of a file, as a key for caches; None if there is no file."""
    try:
        status = os.stat(os.path.expanduser(path.removeprefix("file://")))
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def read_map(source: str | Path | Mapping[str, Any]) -> dict[str, str]:
    """The label of a label set for each stored label. Raises SourceError.

    A table has the columns `label` and `mapped`. JSON, or a mapping, is {label: mapped} or {mapped: [label, …]}.
    """
    place = "the map" if isinstance(source, Mapping) else str(source)
    if isinstance(source, Mapping):
        pairs = list(_pairs(source.items(), place))
    elif (local := _local(source)).endswith(".json"):
        pairs = list(_pairs(_read_object(local, source), place))
    else:
        table = _read_table(local, source)
        pairs = list(zip(_texts(table, "label", source), _texts(table, "mapped", source), strict=True))
    if not pairs:
        raise SourceError(f"{place} is empty: give a label of the set for each label as stored")
    names: dict[str, str] = {}
    for label, text in pairs:
        mapped = given_label(text)
        if mapped is None or not label.strip():
            raise SourceError(f"{place} maps '{label}' to '{text}': neither may be empty")
        put(names, label, mapped, f"the label '{label}'", place)
    return names


def read_names(path: str | Path) -> list[str]:
    """Ids or uris of entries: the column `id` or `uri` of a table, else one per line. Raises SourceError."""
    if str(path).endswith((".csv", ".tsv", ".parquet")):
        table = _read_table(_local(path), path)
        return _texts(table, "id" if "id" in table.column_names else "uri", path)
    local = os.path.expanduser(str(path).removeprefix("file://"))
    try:
        with open(local, encoding="utf-8-sig") as stream:
            return [line.strip() for line in stream if line.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise SourceError(f"{path} cannot be read ({reason}): give a file with an id or a uri a line") from error


def given_label(text: str) -> str | None:
    """A label as it will be stored, or None if it is blank. Raises SourceError if it has a NUL."""
    if "\0" in text:
        raise SourceError("a label holds a NUL character, which no tool shows: give it without")
    return printable(text).strip() or None


def put(labels: dict[Key, str], key: Key, label: str, what: str, place: str | Path) -> None:
    """Set the label of a key. Raises SourceError if the key has another label already."""
    if labels.setdefault(key, label) != label:
        raise SourceError(f"{place} gives {what} both '{labels[key]}' and '{label}': keep one of them")


def _local(path: str | Path) -> str:
    text = str(path)
    if "://" in text and not text.startswith("file://"):
        raise SourceError(f"{text} is not on this machine: download the file first and give its path")
    local = os.path.expanduser(text.removeprefix("file://"))
    if os.path.isdir(local):
        raise SourceError(f"{text} is a folder: {FORMS}")
    if not os.path.exists(local):
        raise SourceError(f"there is no file {text}: check the path")
    if not local.lower().endswith(SUFFIXES):
        raise SourceError(f"{text} is no file of labels: {FORMS}")
    return local


def _read_table(local: str, path: str | Path) -> pa.Table:
    try:
        if local.lower().endswith(".parquet"):
            with open(local, "rb") as stream:
                return _read_parquet(stream)
        with open(local, "rb") as stream:
            head = stream.read(HEAD_BYTES)
        encoding = encoding_of(head)
        header = head.decode(encoding, errors="replace").partition("\n")[0]
        # Spreadsheets write semicolons in countries with decimal commas.
        is_tsv = local.lower().endswith(".tsv") or ("\t" in header and "," not in header)
        separator = "\t" if is_tsv else ";" if ";" in header and "," not in header else ","
        read = csv.ReadOptions(encoding="utf8" if encoding.startswith("utf-8") else encoding)
        parse = csv.ParseOptions(delimiter=separator, newlines_in_values=True)
        with csv.open_csv(local, read, parse) as reader:
            texts = dict.fromkeys(reader.schema.names, pa.string())
        return csv.read_csv(local, read, parse, csv.ConvertOptions(column_types=texts))
    except (OSError, pa.ArrowException, UnicodeError, PageBomb) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{path} cannot be read ({first}): {FORMS}") from error


def _read_parquet(stream: BinaryIO) -> pa.Table:
    """All rows of a table. Raises OSError, ArrowException, and PageBomb for far more bytes than the file has."""
    source = Source(stream)
    file = parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
    groups = range(file.metadata.num_row_groups)
    return pa.Table.from_batches(
        batches_of(file, source, ROWS_AT_ONCE, groups, None, MAX_TABLE_BYTES), file.schema_arrow
    )


def _read_object(local: str, path: str | Path) -> _Object:
    try:
        with open(local, "rb") as stream:
            data = stream.read()
        found = json.loads(data.decode(encoding_of(data)), object_pairs_hook=_Object)
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read as JSON ({error}): {FORMS}") from error
    if not isinstance(found, _Object):
        raise SourceError(f"{path} is no JSON object: write it as a name and a label for each")
    for name, _ in found:
        _text_of(name, f"a name in {path}")
    return found


def _pairs(items: Iterable[tuple[Any, Any]], place: str) -> Iterator[tuple[str, str]]:
    """Pairs (label, mapped) of {label: mapped} or of {mapped: [label, …]}."""
    for key, value in items:
        name = _text_of(key, f"a name in {place}")
        if isinstance(value, list | tuple) and not isinstance(value, _Object):
            yield from ((_text_of(label, f"a label under '{name}' in {place}"), name) for label in value)
        else:
            yield name, _text_of(value, f"what '{name}' is mapped to in {place}")


def _texts(table: pa.Table, name: str, path: str | Path) -> list[str]:
    """A column of names as text."""
    if table.column_names.count(name) != 1:
        problem = f"two columns {name}" if name in table.column_names else f"no column {name}"
        raise SourceError(f"{path} has {problem}, but {describe_list(table.column_names)}: mend its header")
    column = table.column(name)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):  # some writers do not mark texts
        column = pa.chunked_array([[None if b is None else text_of_bytes(b) for b in column.cast(kind).to_pylist()]])
        kind = pa.string()
    if not (kind in (pa.string(), pa.large_string(), pa.null()) or pa.types.is_integer(kind)):
        raise SourceError(f"the column {name} of {path} holds {kind}: write it as strings or whole numbers")
    texts: list[str | None] = column.cast(kind).cast(pa.string()).to_pylist()
    if None in texts:
        raise SourceError(f"row {texts.index(None) + 1} of {path} has no {name}: give it one or take the row out")
    return [text for text in texts if text is not None]


def _text_of(value: object, what: str) -> str:
    """A name given in JSON or by a caller, as text."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise SourceError(f"{what} is {str(value)[:40]}: give a string")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"{what} is no text ({error.reason}): write it in UTF-8") from error
    return text


def describe_list(names: list[str]) -> str:
    """The first names of columns, for a message."""
    return ", ".join(f"'{name}'" for name in names[:8]) + (", …" if len(names) > 8 else "") if names else "none at all"

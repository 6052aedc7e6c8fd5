"""The tables of a list of uris, read in batches: CSV and TSV, also compressed by gzip, and Parquet."""

import contextlib
from collections.abc import Iterator
from csv import reader as csv_rows
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import csv

from pipeline.errors import SourceError
from pipeline.images.containers.parquet import group_rows, open_parquet
from pipeline.images.decoding.decode import Rejected
from pipeline.images.labels.label_text import encoding_of
from pipeline.images.names.suffixes import PARQUET
from pipeline.images.reading.files import open_file
from pipeline.images.reading.parquet_pages import PageBomb, Source, batches_of

TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
ROWS_AT_ONCE = 16_384
HEAD_BYTES = 64 << 10  # of a table, enough for its header


@dataclass(frozen=True)
class ListTable:
    """A file of rows. `names` are the columns of an inventory's CSV, which has no header; its keys are URL-encoded."""

    uri: str
    names: tuple[str, ...] | None = None

    @property
    def is_parquet(self) -> bool:
        return self.uri.lower().endswith(PARQUET)


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what a damaged or missing table raises into SourceError."""
    try:
        yield
    except Rejected as error:
        raise SourceError(f"the list {uri} cannot be read ({error}): check the path and the rights to it") from error
    except (pa.ArrowException, PageBomb, UnicodeError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"the list {uri} cannot be read ({first}): write or copy it again") from error


def schema_of(table: ListTable) -> pa.Schema:
    """The columns of a table, from its footer or header; in a CSV all are texts."""
    if table.is_parquet:
        with open_file(table.uri) as stream:
            return open_parquet(Source(stream), table.uri).schema_arrow
    if table.names is not None:
        return pa.schema([(name, pa.string()) for name in table.names])
    with _opened(table) as stream:
        names, _, _ = _header(stream.read(HEAD_BYTES))
    return pa.schema([(name, pa.string()) for name in names])


def batches_in(table: ListTable, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a table, ROWS_AT_ONCE rows at a time."""
    if table.is_parquet:
        with open_file(table.uri) as stream:
            source = Source(stream)
            file = open_parquet(source, table.uri)
            yield from batches_of(file, source, ROWS_AT_ONCE, range(len(group_rows(file))), columns)
        return
    names, encoding, separator = [*(table.names or ())], "utf8", ","
    if table.names is None:
        with _opened(table) as stream:
            names, encoding, separator = _header(stream.read(HEAD_BYTES))
    read = csv.ReadOptions(column_names=names, encoding=encoding, skip_rows=0 if table.names else 1)
    parse = csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    texts = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), include_columns=columns)
    with _opened(table) as stream, csv.open_csv(stream, read, parse, texts) as rows:
        for batch in rows:
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield batch.slice(start, ROWS_AT_ONCE)


@contextlib.contextmanager
def _opened(table: ListTable) -> Iterator[Any]:
    with open_file(table.uri) as stream:
        yield pa.CompressedInputStream(stream, "gzip") if table.uri.lower().endswith(".gz") else stream


def _header(head: bytes) -> tuple[list[str], str, str]:
    """The columns of a CSV or TSV, its encoding, and what separates the columns."""
    encoding = encoding_of(head)
    text = head.decode(encoding, errors="replace")
    line = text.partition("\n")[0]
    # Spreadsheets write semicolons in countries with decimal commas.
    separator = "\t" if "\t" in line and "," not in line else ";" if ";" in line and "," not in line else ","
    names = next(csv_rows([line.strip()], delimiter=separator), [])
    return names, "utf8" if encoding.startswith("utf-8") else encoding, separator

"""Exports the live entries of a memory to files of vectors, which other tools and `add` can read.

Forgotten entries are left out, labels are the current ones, and kept columns go with the entries. RAM holds one row
group of entries, the forgotten ids and the corrected labels.

    OUT/img_emb/img_emb_0000.npy  OUT/metadata/metadata_0000.parquet     clip-retrieval
    OUT/entries_0000.parquet                                             parquet: the columns of an entries file
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DamagedFile, MemoryMissing, UsageError
from pipeline.images.names.uris import path_of_uri, split_member
from pipeline.images.reading.files import is_remote
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.layout import way_out
from pipeline.store.log.single_adds import table_of_singles
from pipeline.store.log.state import State
from pipeline.store.storage.file_refs import RowsFile, check_path
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.ids import is_in
from pipeline.store.tables.kept_columns import with_columns
from pipeline.store.tables.labels import OwnLabels, newest_labels, read_label_rows
from pipeline.store.tables.schemas import embedding_matrix, entries_schema, open_writer
from pipeline.store.tables.tombstones import read_tombstones

Format = Literal["clip-retrieval", "parquet"]
ROWS_PER_FILE = 1_000_000  # as clip-retrieval writes them by default
DIGITS = 4  # least digits of a file's number; all files have as many, so that names sort as numbers do


@dataclass(frozen=True)
class ExportReport:
    """The result of an export. `files` counts the files of vectors; `num_bytes` is the size of all files."""

    uri: str
    format: Format
    version: int
    entries: int
    files: int
    num_bytes: int
    dimension: int
    encoder: str
    seconds: float

    def to_json(self) -> dict:
        """The report as a JSON object."""
        document = dict(vars(self))
        return document | {"bytes": document.pop("num_bytes"), "seconds": round(self.seconds, 2)}


def export(
    storage: Storage,
    state: State,
    out: Storage,
    file_format: Format = "clip-retrieval",
    rows_per_file: int = ROWS_PER_FILE,
    on_progress: OnProgress = ignore_progress,
) -> ExportReport:
    """Write the live entries of a version to an empty place.

    Raises UsageError for a place with other files in it, MemoryMissing for a version without entries, DamagedFile.
    """
    if file_format not in get_args(Format):
        raise UsageError(f"`file_format` {file_format} is unknown: give {' or '.join(get_args(Format))}")
    if rows_per_file < 1:
        raise UsageError(f"`rows_per_file` {rows_per_file} is no number of rows: give 1 or more")
    if state.identity is None or not state.num_live:
        raise MemoryMissing(f"the memory at {storage.uri} has no entry at version {state.version}: there is no export")
    if found := out.list(""):
        raise UsageError(f"{out.uri} has other files in it, such as {found[0]}: name an empty or new place for OUT")
    began = time.monotonic()
    schema = entries_schema(state.identity, state.kept)
    digits = max(DIGITS, len(str((state.num_live - 1) // rows_per_file)))
    target = (_ClipRetrieval if file_format == "clip-retrieval" else _Parquet)(out, schema, digits)
    files = entries = 0
    tables = _cut(_live_tables(storage, state), rows_per_file)
    for number, pieces in tables:
        with target.file(number) as write:
            for table in pieces:
                write(table)
                entries += table.num_rows
                on_progress(Progress("exporting", entries, max(state.num_live, entries)))
        files += 1
    return ExportReport(
        uri=out.uri,
        format=file_format,
        version=state.version,
        entries=entries,
        files=files,
        num_bytes=target.num_bytes,
        dimension=state.identity.dimension,
        encoder=state.identity.encoder,
        seconds=time.monotonic() - began,
    )


# Reading the entries


def _live_tables(storage: Storage, state: State) -> Iterator[pa.Table]:
    """The live entries in the order of their ids, with their current labels, one row group at a time."""
    assert state.identity is not None  # noqa: S101  # checked by the caller
    schema = entries_schema(state.identity, state.kept)
    forgotten = read_tombstones(storage, state.tombstones)
    own = newest_labels(read_label_rows(storage, state.labels), None)
    for file in state.entries_files():
        for table in _row_groups(storage, file):
            yield with_columns(_as_now(table, forgotten, own), schema)
        storage.release(file.path)
    if state.pending:
        yield with_columns(_as_now(table_of_singles(state.pending, state.identity), forgotten, own), schema)


def _row_groups(storage: Storage, file: RowsFile) -> Iterator[pa.Table]:
    local = check_path(storage, file)
    try:
        with pq.ParquetFile(local, page_checksum_verification=True) as parquet:
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group)
    except (OSError, pa.ArrowException) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedFile(
            f"{file.path} in the memory at {storage.uri} cannot be read ({first}): {way_out(file.path)}"
        ) from error


def _as_now(table: pa.Table, forgotten: np.ndarray, own: OwnLabels) -> pa.Table:
    """The rows without forgotten entries, and with corrected labels."""
    ids_N = table.column("id").to_numpy()
    live_N = ~is_in(ids_N, forgotten)
    if not live_N.all():
        table, ids_N = table.filter(pa.array(live_N)), ids_N[live_N]
    corrected_N = is_in(ids_N, own.ids_N)
    if not corrected_N.any():
        return table
    at_N = np.where(corrected_N, np.searchsorted(own.ids_N, ids_N), 0)
    said = own.labels.take(pa.array(at_N))
    labels = pc.if_else(pa.array(corrected_N), said, table.column("label").combine_chunks())
    return table.set_column(table.schema.get_field_index("label"), table.schema.field("label"), labels)


def _cut(tables: Iterator[pa.Table], rows: int) -> Iterator[tuple[int, Iterator[pa.Table]]]:
    """Cut tables into numbered runs of `rows` rows. The caller must exhaust each run before it asks for the next."""
    left = next(tables, None)

    def run() -> Iterator[pa.Table]:
        nonlocal left
        room = rows
        while left is not None and room:
            piece, left = left.slice(0, room), left.slice(room)
            room -= piece.num_rows
            if not left.num_rows:
                left = next(tables, None)
            if piece.num_rows:
                yield piece

    number = 0
    while left is not None:
        if not left.num_rows:  # all its entries are forgotten
            left = next(tables, None)
            continue
        yield number, run()
        number += 1


# Writing the files


class Write(Protocol):
    """Appends rows with the columns of an entries file to a file."""

    def __call__(self, table: pa.Table) -> None: ...


@dataclass
class _Parquet:
    out: Storage
    schema: pa.Schema
    digits: int
    num_bytes: int = 0

    @contextlib.contextmanager
    def file(self, number: int) -> Iterator[Write]:
        """Open the file with this number; it is published when it is complete."""
        with self.out.publishing(f"entries_{number:0{self.digits}d}.parquet") as local:
            with open_writer(local, self.schema) as writer:
                yield writer.write_table
            self.num_bytes += local.stat().st_size


@dataclass
class _ClipRetrieval:
    out: Storage
    schema: pa.Schema
    digits: int
    num_bytes: int = 0

    @contextlib.contextmanager
    def file(self, number: int) -> Iterator[Write]:
        """Open the two files with this number; they are published when they are complete, the vectors last."""
        fields = [field for field in self.schema if field.name not in ("embedding", "image_path")]
        metadata = pa.schema([pa.field("image_path", pa.string()), *fields], metadata=self.schema.metadata)
        name = f"{number:0{self.digits}d}"
        dimension = self.schema.field("embedding").type.list_size
        with (
            self.out.publishing(f"img_emb/img_emb_{name}.npy") as vectors,
            self.out.publishing(f"metadata/metadata_{name}.parquet") as about,
        ):
            with open_writer(about, metadata) as writer, vectors.open("wb") as stream:
                _write_header(stream, 0, dimension)
                rows = 0

                def write(table: pa.Table) -> None:
                    nonlocal rows
                    stream.write(np.ascontiguousarray(embedding_matrix(table.column("embedding")), "<f2").tobytes())
                    paths = pa.array([_path(uri) for uri in table.column("uri").to_pylist()], pa.string())
                    about_rows = table.select([field.name for field in fields])
                    writer.write_table(about_rows.add_column(0, metadata.field("image_path"), paths).cast(metadata))
                    rows += table.num_rows

                yield write
                stream.seek(0)
                _write_header(stream, rows, dimension)
            self.num_bytes += _bytes(vectors) + _bytes(about)


def _write_header(stream: BinaryIO, rows: int, dimension: int) -> None:
    """Write the header of a .npy file. Its length is the same for any number of rows: NumPy pads it for growth."""
    header = {"descr": "<f2", "fortran_order": False, "shape": (rows, dimension)}
    np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[no-untyped-call]


def _path(uri: str) -> str:
    """The name under which tools open an image: the path of a local file, the uri of anything else."""
    return uri if is_remote(uri) or split_member(uri)[1] is not None else path_of_uri(uri)


def _bytes(path: Path) -> int:
    return path.stat().st_size

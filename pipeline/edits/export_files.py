"""The files of an export: which live entries each holds, and how one is written, in any process.

    OUT/img_emb/img_emb_0000.npy  OUT/metadata/metadata_0000.parquet     clip-retrieval
    OUT/entries_0000.parquet                                             parquet: the columns of an entries file

A file is published whole, so it is its own completion mark. Of the two files of clip-retrieval the vectors come last.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DamagedFile
from pipeline.images.names.uris import path_of_uri, split_member
from pipeline.images.reading.files import is_remote
from pipeline.steps import PROCESS_BYTES, Step
from pipeline.store.layout import way_out
from pipeline.store.log.records import Single
from pipeline.store.log.single_adds import table_of_singles
from pipeline.store.log.state import State
from pipeline.store.storage.file_refs import FileRef, RowsFile, check_path
from pipeline.store.storage.interface import Storage, released
from pipeline.store.tables.identity import Identity
from pipeline.store.tables.ids import is_in
from pipeline.store.tables.kept_columns import with_columns
from pipeline.store.tables.labels import OwnLabels, own_labels_of
from pipeline.store.tables.schemas import ROW_GROUP_ROWS, embedding_matrix, entries_schema, open_writer
from pipeline.store.tables.tombstones import Tombstones

Format = Literal["clip-retrieval", "parquet"]
ENTRY_BYTES = 2_000  # a generous estimate for all columns of an entry but its vector, while it is read and written


@dataclass(frozen=True)
class Part:
    """The entries of one file of an export: `rows` live ones, after the first `skip` live ones of `files`.

    `files` are entries files in the order of their ids. `pending` are the single adds that follow them.
    """

    number: int
    rows: int
    skip: int
    files: tuple[RowsFile, ...]
    pending: tuple[Single, ...] = ()


def parts_of(storage: Storage, state: State, rows_per_file: int) -> list[Part]:
    """The files of an export. Reads the forgotten ids, 8 bytes of memory each, and no entries. Raises DamagedFile."""
    forgotten = Tombstones(storage, state.tombstones).all()
    blocks: list[tuple[RowsFile | None, int]] = [
        (file, file.rows - _within(forgotten, file.first_id, file.last_id)) for file in state.entries_files()
    ]
    if state.pending:
        gone = _within(forgotten, state.pending[0].id, state.pending[-1].id)
        blocks.append((None, len(state.pending) - gone))
    parts: list[Part] = []
    files, rows, skip, pending = list[RowsFile](), 0, 0, tuple[Single, ...]()

    def cut() -> None:
        parts.append(Part(len(parts), rows, skip, tuple(files), pending))

    for file, live in blocks:
        taken = 0  # live entries of this block that have a part
        while taken < live:
            if not rows:
                files, skip, pending = [], taken, ()
            more = min(rows_per_file - rows, live - taken)
            files, pending = ([*files, file], pending) if file else (files, state.pending)
            rows, taken = rows + more, taken + more
            if rows == rows_per_file:
                cut()
                rows = 0
    if rows:
        cut()
    return parts


def _within(ids_N: np.ndarray, first: int, last: int) -> int:
    return int(np.searchsorted(ids_N, last, side="right") - np.searchsorted(ids_N, first))


@dataclass(frozen=True)
class ExportWork:
    """What every file of an export needs. It is sent to other processes, without `on_rows`.

    `on_rows` is called with the number of rows just written, if the work is done in this process.
    """

    storage: Storage
    out: Storage
    file_format: Format
    identity: Identity
    schema: pa.Schema
    digits: int
    tombstones: tuple[FileRef, ...]
    labels: tuple[FileRef, ...]
    on_rows: Callable[[int], None] | None = None

    @classmethod
    def of(cls, storage: Storage, out: Storage, state: State, file_format: Format, digits: int) -> "ExportWork":
        """The work on a state that has entries."""
        assert state.identity is not None  # noqa: S101  # checked by the caller
        schema = entries_schema(state.identity, state.kept)
        return cls(storage, out, file_format, state.identity, schema, digits, state.tombstones, state.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on_rows": None}

    def steps(self, parts: Sequence[Part]) -> Iterator[Step]:
        """One step for each part, numbered by its place here. A step holds one row group of entries at a time."""
        num_bytes = PROCESS_BYTES + 4 * ROW_GROUP_ROWS * (ENTRY_BYTES + 4 * self.identity.dimension)
        return (Step(place, partial(self.write, part), num_bytes) for place, part in enumerate(parts))

    def is_done(self, number: int, there: Collection[str]) -> bool:
        """Whether the file with this number is among the published ones."""
        return all(path in there for path in self.paths(number))

    def paths(self, number: int) -> list[str]:
        """The paths of the file with this number, and of the one beside it."""
        name = f"{number:0{self.digits}d}"
        if self.file_format == "parquet":
            return [f"entries_{name}.parquet"]
        return [f"img_emb/img_emb_{name}.npy", f"metadata/metadata_{name}.parquet"]

    def write(self, part: Part) -> int:
        """Write and publish the entries of a part; return the bytes of its files. Raises DamagedFile."""
        target = (_ClipRetrieval if self.file_format == "clip-retrieval" else _Parquet)(self.out, self.schema)
        left, skip = part.rows, part.skip
        with target.file(self.paths(part.number)) as write:
            for table in self._live_tables(part):
                piece = table.slice(skip, left)
                skip = max(skip - table.num_rows, 0)
                if piece.num_rows:
                    write(piece)
                    left -= piece.num_rows
                    if self.on_rows is not None:
                        self.on_rows(piece.num_rows)
                if not left:
                    break
            if left:
                raise DamagedFile(
                    f"the memory at {self.storage.uri} has {left:,} live entries less than its version tells of from "
                    f"id {part.files[0].first_id if part.files else part.pending[0].id} on: run `verify`"
                )
        return target.num_bytes

    def _live_tables(self, part: Part) -> Iterator[pa.Table]:
        """The live entries of the files of a part, with their current labels, one row group at a time."""
        tombstones = Tombstones(self.storage, self.tombstones)
        for file in part.files:
            forgotten = tombstones.between(file.first_id, file.last_id)
            with released(self.storage, file.path):
                for table in _row_groups(self.storage, file):
                    yield self._as_now(table, forgotten)
        if part.pending:
            forgotten = tombstones.between(part.pending[0].id, part.pending[-1].id)
            yield self._as_now(table_of_singles(part.pending, self.identity), forgotten)

    def _as_now(self, table: pa.Table, forgotten: np.ndarray) -> pa.Table:
        """The rows without forgotten entries, and with corrected labels."""
        ids_N = table.column("id").to_numpy()
        live_N = ~is_in(ids_N, forgotten)
        if not live_N.all():
            table, ids_N = table.filter(pa.array(live_N)), ids_N[live_N]
        return with_columns(_relabelled(table, own_labels_of(self.storage, self.labels, ids_N, None)), self.schema)


def _relabelled(table: pa.Table, own: OwnLabels) -> pa.Table:
    ids_N = table.column("id").to_numpy()
    corrected_N = is_in(ids_N, own.ids_N)
    if not corrected_N.any():
        return table
    at_N = np.where(corrected_N, np.searchsorted(own.ids_N, ids_N), 0)
    said = own.labels.take(pa.array(at_N))
    labels = pc.if_else(pa.array(corrected_N), said, table.column("label").combine_chunks())
    return table.set_column(table.schema.get_field_index("label"), table.schema.field("label"), labels)


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


class Write(Protocol):
    """Appends rows with the columns of an entries file to a file."""

    def __call__(self, table: pa.Table) -> None: ...


@dataclass
class _Parquet:
    out: Storage
    schema: pa.Schema
    num_bytes: int = 0

    @contextlib.contextmanager
    def file(self, paths: Sequence[str]) -> Iterator[Write]:
        """Open the file at a path; it is published when it is complete."""
        with self.out.publishing(paths[0]) as local:
            with open_writer(local, self.schema) as writer:
                yield writer.write_table
            self.num_bytes += local.stat().st_size


@dataclass
class _ClipRetrieval:
    out: Storage
    schema: pa.Schema
    num_bytes: int = 0

    @contextlib.contextmanager
    def file(self, paths: Sequence[str]) -> Iterator[Write]:
        """Open the two files at these paths; they are published when they are complete, the vectors last."""
        fields = [field for field in self.schema if field.name not in ("embedding", "image_path")]
        metadata = pa.schema([pa.field("image_path", pa.string()), *fields], metadata=self.schema.metadata)
        dimension = self.schema.field("embedding").type.list_size
        with (
            self.out.publishing(paths[0]) as vectors,
            self.out.publishing(paths[1]) as about,
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

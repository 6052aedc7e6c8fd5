"""Completion marks: the result of a part of a segment, published once and naming the part's files.

A part with a mark is done. Several workers may do the same part; the first mark wins.
"""

import secrets
import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from pipeline.store.layout import (
    folder_of,
    mark_path,
    marks_folder,
    part_of_mark,
    rows_path,
    split_rows,
)
from pipeline.store.segments.reservations import Reservation, check_folder, damaged_reservation
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.interface import AlreadyExists, Storage
from pipeline.store.tables import ids
from pipeline.store.tables.parquet_columns import read_columns
from pipeline.store.tables.schemas import (
    FORMAT,
    OFFSETS,
    REJECTED,
    THUMBNAILS,
    entries_schema,
    write_rows,
)
from pipeline.store.values import Count, Finite, Hexadecimal

READ_AT_ONCE = 16  # completion marks: most of the time is waiting for the store

MANY_LABELS = 1_024  # of one part: more are read from its entries
DUPLICATE = "duplicate"  # the `stage` of images that are rejected because the memory already holds their bytes


class PartMark(BaseModel):
    """The contents of `done/PART.json` for a finished part. It names the part's files, each None if there are no rows.

    `seconds` is the time of each stage of the work. `decoded_on` names other nodes that decoded images for the part.
    `labels` counts the entries by label, unless they have many labels. `duplicates` counts the rejected images whose
    bytes the memory already held. `unlabelled` counts the images of a
    container without a label, by reason. `noted` counts what the container's reader skipped, by kind and name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    part: int = Field(ge=0, lt=ids.MAX_PARTS)
    attempt: Hexadecimal
    node: str
    planned: Count
    entries: RowsFile | None
    rejected: RowsFile | None
    thumbnails: RowsFile | None = None
    offsets: RowsFile | None = None
    decisions: RowsFile | None = None
    seconds: dict[str, Finite] = {}
    decoded_on: tuple[str, ...] = ()
    unlabelled: dict[str, Count] = {}
    noted: dict[str, dict[str, Count]] = {}
    duplicates: Count = 0
    labels: dict[str, Count] | None = None

    @property
    def files(self) -> tuple[RowsFile | None, ...]:
        """The files that it names; None for a kind without rows."""
        return self.entries, self.rejected, self.thumbnails, self.offsets, self.decisions

    @property
    def num_entries(self) -> int:
        return self.entries.rows if self.entries else 0

    @property
    def num_rejected(self) -> int:
        return self.rejected.rows if self.rejected else 0


def uncounted_parts(storage: Storage, reservation: Reservation) -> set[int]:
    """The parts with a container whose number of images is unknown: they are counted when they are read.

    Reads one column of the list of containers.
    """
    if reservation.containers is None:
        return set()
    counts = read_columns(storage, reservation.containers, ["images"]).column("images")
    rows_N = pc.indices_nonzero(counts.is_null()).to_numpy()
    if reservation.container_parts:
        rows_N = np.searchsorted(np.cumsum(reservation.container_parts), rows_N, "right")  # the part of each
    return {reservation.containers_from + at for at in np.unique(rows_N).tolist()}


def read_marks(storage: Storage, reservation: Reservation) -> dict[int, PartMark]:
    """The marks of the finished parts, by part.

    It costs a request of about 1 KB for each mark, and a listing of each folder that the marks name, with the sizes of
    1,000 files in a request. No file of a part is read. Raises DamagedFile if a mark is damaged, or if one of its files
    is missing or has another length than published.
    """
    paths = marks_of(storage, reservation)
    marks = read_marks_at(storage, paths)
    sizes: dict[str, int] = {}
    for folder in sorted({folder_of(file.path) for mark in marks for file in mark.files if file}):
        sizes |= storage.walk(folder)
    for path, mark in zip(paths, marks, strict=True):
        if any(file is not None and sizes.get(file.path) != file.num_bytes for file in mark.files):
            raise damaged_reservation(storage, path)
    return {mark.part: mark for mark in marks}


@dataclass(frozen=True)
class PartWork:
    """How a part was worked on, for its mark. The fields are those of PartMark; `node` None means this host."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    node: str | None = None
    decoded_on: tuple[str, ...] = ()
    unlabelled: Mapping[str, int] = field(default_factory=dict)
    noted: Mapping[str, dict[str, int]] = field(default_factory=dict)
    duplicates: int = 0


def publish_part(
    storage: Storage,
    reservation: Reservation,
    part: int,
    entries: pa.Table,
    rejected: pa.Table,
    thumbnails: pa.Table | None = None,
    offsets: pa.Table | None = None,
    work: PartWork = PartWork(),
) -> PartMark:
    """Write a part's files and its mark; return the published mark, which is another attempt's if that was first."""
    schema = entries_schema(reservation.identity, reservation.kept)
    tables = {"entries": entries.cast(schema), "rejected": rejected.cast(REJECTED)}
    if thumbnails is not None:
        tables["thumbnails"] = thumbnails.cast(THUMBNAILS)
    if offsets is not None:
        tables["offsets"] = offsets.cast(OFFSETS)
    return publish(storage, reservation, part, tables, work)


def publish(
    storage: Storage,
    reservation: Reservation,
    part: int,
    tables: Mapping[str, pa.Table],
    work: PartWork = PartWork(),
) -> PartMark:
    """Write tables of rows with ids, by kind, and the mark that names them; return the published mark.

    Rejected rows and the other rows together must be as many as planned.
    """
    attempt = secrets.token_hex(6)
    planned = sum(tables[kind].num_rows for kind in ("entries", "decisions", "rejected") if kind in tables)
    left = reservation.planned - part * reservation.rows_per_part
    if left > 0 and planned != min(reservation.rows_per_part, left):
        raise AssertionError(f"part {part} has {planned} rows, which is not as planned")
    files = {
        kind: write_rows(storage, rows_path(reservation.folder, kind, part, attempt), table)
        for kind, table in tables.items()
        if table.num_rows
    }
    mark = PartMark(
        part=part,
        attempt=attempt,
        node=work.node or socket.gethostname(),
        planned=planned,
        entries=files.get("entries"),
        rejected=files.get("rejected"),
        thumbnails=files.get("thumbnails"),
        offsets=files.get("offsets"),
        decisions=files.get("decisions"),
        seconds=dict(work.seconds),
        decoded_on=work.decoded_on,
        unlabelled=dict(work.unlabelled),
        noted=dict(work.noted),
        duplicates=work.duplicates,
        labels=_labels_of(tables.get("entries")),
    )
    path = mark_path(reservation.folder, part)
    try:
        storage.create(path, mark.model_dump_json(indent=1).encode())
    except AlreadyExists:
        return read_mark(storage, path)
    return mark


def _labels_of(entries: pa.Table | None) -> dict[str, int] | None:
    """The number of entries of each label, in order; None if there are many labels."""
    if entries is None:
        return {}
    pairs = pc.value_counts(entries["label"].drop_null()).to_pylist()
    if len(pairs) > MANY_LABELS:
        return None
    return {pair["values"]: pair["counts"] for pair in sorted(pairs, key=itemgetter("values"))}


def marks_of(storage: Storage, reservation: Reservation) -> list[str]:
    """The paths of the existing completion marks."""
    folder = marks_folder(reservation.folder)
    return [f"{folder}{name}" for name in storage.list(folder) if part_of_mark(name) is not None]


def read_marks_at(storage: Storage, paths: Iterable[str]) -> list[PartMark]:
    """Read completion marks, several at once, in the order of their paths. Raises DamagedFile."""
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        return list(pool.map(lambda path: read_mark(storage, path), paths))


def read_mark(storage: Storage, path: str) -> PartMark:
    """Read a completion mark, which may only name files of its own segment. Raises DamagedFile."""
    try:
        mark = PartMark.model_validate_json(storage.read(path))
        folder, _, _ = split_rows(path)
        check_folder(mark.files, folder)
        if path != mark_path(folder, mark.part):
            raise ValueError(f"it is the mark of part {mark.part}")
    except ValueError as error:
        raise damaged_reservation(storage, path) from error
    return mark

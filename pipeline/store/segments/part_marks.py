"""Completion marks: what a part of a segment has become, published once with its files.

A part that has a mark is done. Several workers may do the same part; the first mark stands.
"""

import secrets
import socket
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import DamagedFile
from pipeline.store.layout import (
    mark_path,
    marks_folder,
    part_of_mark,
    rows_path,
    split_rows,
)
from pipeline.store.segments.reservations import Reservation, check_folder, damaged_description
from pipeline.store.storage.file_refs import RowsFile, checked_path
from pipeline.store.storage.interface import AlreadyExists, Storage
from pipeline.store.tables import ids
from pipeline.store.tables.schemas import (
    FORMAT,
    OFFSETS,
    REJECTED,
    THUMBNAILS,
    entries_schema,
    read_table,
    write_rows,
)
from pipeline.store.values import Count, Finite, Hexadecimal

DUPLICATE = "duplicate"  # the stage of images that are rejected because the memory holds their bytes


class PartMark(BaseModel):
    """What `done/PART.json` says of a finished part: its files, None where it has no such rows.

    `seconds` are what each stage of the work on it took; `decoded_on` names other nodes that decoded images for it. Of
    the rejected images `duplicates` were left out because the memory held their bytes. `unlabelled` counts the images
    of a container without a label by the reason, and `noted` what its reader passed over, by kind and name.
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

    @property
    def files(self) -> tuple[RowsFile | None, ...]:
        """What it names, None for rows that it has not."""
        return self.entries, self.rejected, self.thumbnails, self.offsets, self.decisions

    @property
    def num_entries(self) -> int:
        return self.entries.rows if self.entries else 0

    @property
    def num_rejected(self) -> int:
        return self.rejected.rows if self.rejected else 0


def uncounted_parts(storage: Storage, reservation: Reservation) -> set[int]:
    """The parts that are containers of which nobody knows how many images they hold before they are read.

    Reads one column of the list of containers.
    """
    if reservation.containers is None:
        return set()
    counts = read_table(storage, reservation.containers, ["images"]).column("images")
    rows = pc.indices_nonzero(counts.is_null()).to_pylist()
    return {reservation.containers_from + row for row in rows}


def read_marks(storage: Storage, reservation: Reservation) -> dict[int, PartMark]:
    """The marks of the parts that are done, by part. Raises DamagedFile for one that, or whose files, are not whole."""
    marks = {}
    for path in marks_of(storage, reservation):
        mark = read_mark(storage, path)
        for file in mark.files:
            if file is not None:
                try:
                    checked_path(storage, file)
                except DamagedFile as error:
                    raise damaged_description(storage, path) from error
        marks[mark.part] = mark
    return marks


def publish_part(
    storage: Storage,
    reservation: Reservation,
    part: int,
    entries: pa.Table,
    rejected: pa.Table,
    thumbnails: pa.Table | None = None,
    offsets: pa.Table | None = None,
    *,
    seconds: Mapping[str, float] | None = None,
    node: str | None = None,
    decoded_on: tuple[str, ...] = (),
    unlabelled: Mapping[str, int] | None = None,
    noted: Mapping[str, dict[str, int]] | None = None,
    duplicates: int = 0,
) -> PartMark:
    """Write a part's files and its mark; return the mark that stands, another attempt's if that one was first."""
    schema = entries_schema(reservation.identity, reservation.kept)
    tables = {"entries": entries.cast(schema), "rejected": rejected.cast(REJECTED)}
    if thumbnails is not None:
        tables["thumbnails"] = thumbnails.cast(THUMBNAILS)
    if offsets is not None:
        tables["offsets"] = offsets.cast(OFFSETS)
    return publish(
        storage,
        reservation,
        part,
        tables,
        seconds=seconds,
        node=node,
        decoded_on=decoded_on,
        unlabelled=unlabelled,
        noted=noted,
        duplicates=duplicates,
    )


def publish(
    storage: Storage,
    reservation: Reservation,
    part: int,
    tables: Mapping[str, pa.Table],
    *,
    seconds: Mapping[str, float] | None = None,
    node: str | None = None,
    decoded_on: tuple[str, ...] = (),
    unlabelled: Mapping[str, int] | None = None,
    noted: Mapping[str, dict[str, int]] | None = None,
    duplicates: int = 0,
) -> PartMark:
    """Write tables of rows with ids, by kind, and the mark that names them; return the mark that stands.

    Rejected rows and the others are together as many as were planned. `node` names the machine at work, for those who
    read the mark; None takes the name of this host. `seconds` are what each stage of the work took, `decoded_on` other
    nodes that decoded images for it, `unlabelled` and `noted` as PartMark has them.
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
        node=node or socket.gethostname(),
        planned=planned,
        entries=files.get("entries"),
        rejected=files.get("rejected"),
        thumbnails=files.get("thumbnails"),
        offsets=files.get("offsets"),
        decisions=files.get("decisions"),
        seconds=dict(seconds or {}),
        decoded_on=decoded_on,
        unlabelled=dict(unlabelled or {}),
        noted=dict(noted or {}),
        duplicates=duplicates,
    )
    path = mark_path(reservation.folder, part)
    try:
        storage.create(path, mark.model_dump_json(indent=1).encode())
    except AlreadyExists:
        return read_mark(storage, path)
    return mark


def marks_of(storage: Storage, reservation: Reservation) -> list[str]:
    """The paths of the completion marks there are."""
    folder = marks_folder(reservation.folder)
    return [f"{folder}{name}" for name in storage.list(folder) if part_of_mark(name) is not None]


def read_mark(storage: Storage, path: str) -> PartMark:
    """A completion mark, which names files of its own segment. Raises DamagedFile."""
    try:
        mark = PartMark.model_validate_json(storage.read(path))
        folder, _, _ = split_rows(path)
        check_folder(mark.files, folder)
        if path != mark_path(folder, mark.part):
            raise ValueError(f"it is the mark of part {mark.part}")
    except ValueError as error:
        raise damaged_description(storage, path) from error
    return mark

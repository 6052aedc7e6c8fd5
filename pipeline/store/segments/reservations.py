"""A segment while it is being made: its reserved number, its frozen plan and the completion marks of its parts.

Readers see nothing of it until a version names the segment. Its number is never used again, even if the segment is
never committed. A part is done when its mark exists. The mark is created exclusively and names the part's files: the
first attempt to finish wins, and the files of every other attempt are garbage.
"""

import contextlib
import datetime
import json
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import DamagedFile
from pipeline.recent import Recent
from pipeline.store.layout import (
    DESCRIPTION,
    FOLDERS_OF_A_JOB,
    GIVEN_UP,
    NUMERICS,
    SEGMENTS,
    containers_path,
    held_path,
    plan_path,
    segment_folder,
    segment_number,
)
from pipeline.store.segments.container_parts import ContainerParts, rows_of_part, share_parts
from pipeline.store.storage.file_refs import FileRef, check_places, describe
from pipeline.store.storage.interface import AlreadyExists, Storage, create_own
from pipeline.store.storage.leases import Lease
from pipeline.store.tables import ids
from pipeline.store.tables.identity import Identity
from pipeline.store.tables.kept_columns import KeptColumn
from pipeline.store.tables.parquet_columns import read_row_group
from pipeline.store.tables.row_groups import row_groups_of
from pipeline.store.tables.schemas import (
    CONTAINERS,
    FORMAT,
    PLAN,
    write_table,
)
from pipeline.store.values import MAX_SEGMENT, Count

SINGLES = "single adds"  # in the place of a fingerprint in the segment of single adds
Precision = Literal["auto", "float32", "bfloat16"]

CONTAINERS_BYTES = 16 << 20  # of lists of containers in RAM: neighbouring parts are rows of one row group

_containers = Recent[pa.Table](CONTAINERS_BYTES)


class SegmentSpec(BaseModel):
    """The parameters of an add: its source, and how its images become entries. Its plan and reservation contain them.

    `fingerprint` is a hash of source, options and identity: the same command finds its unfinished segment by it.
    `labels` is the origin of labels, `thumbnails` whether thumbnails are stored, `kept` the kept columns. `precision`
    is the allowed precision of the model; the actual one is decided once and recorded as Numerics. `exclude` are
    patterns, and `image_extension` is a file ending: they select images in an archive.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    source: str
    dataset: str
    identity: Identity
    thumbnails: bool = False
    labels: str = "folder"
    kept: tuple[KeptColumn, ...] = ()
    precision: Precision = "float32"
    exclude: tuple[str, ...] = ()
    image_extension: str | None = None


class Reservation(SegmentSpec):
    """The contents of `segment.json`: the parameters and the plan of an add, so that the same command can continue it.

    `plan` lists the `planned` image files, `rows_per_part` to a part. The `containers` make the parts after these:
    `container_parts` has the number of containers of each, and is empty if each container is a part of its own, as in
    earlier releases. Images in containers are counted when they are read. `known_inside` is the number of them that is
    known beforehand. `held` is the file of digests that the memory held at planning time, if duplicates are to be left
    out (else None). Like the plan it is written once; unlike the plan it is removed when the segment is committed.
    `planned_at` is when the source was listed; None if an earlier release did.
    """

    format: int = FORMAT
    number: int = Field(ge=0, le=MAX_SEGMENT)
    planned: Count
    rows_per_part: int = Field(ge=1, le=ids.MAX_ROWS)
    plan: FileRef | None
    containers: FileRef | None = None
    num_containers: Count = 0
    container_parts: ContainerParts = ()
    known_inside: Count = 0
    held: FileRef | None = None
    planned_at: datetime.datetime | None = None

    @model_validator(mode="after")
    def _inside(self) -> "Reservation":
        check_folder((self.plan, self.containers, self.held), self.folder)
        if self.container_parts and sum(self.container_parts) != self.num_containers:
            raise ValueError(f"its parts have {sum(self.container_parts)} of {self.num_containers} containers")
        if self.num_parts > ids.MAX_PARTS:
            raise ValueError(f"{self.num_parts} parts are more than an id can count")
        return self

    @property
    def folder(self) -> str:
        """The segment's folder, with its closing slash; "" for number 0, a bulk job, which has a place of its own."""
        return segment_folder(self.number) if self.number else ""

    @property
    def containers_from(self) -> int:
        """The first part of containers; parts before it are image files."""
        return -(-self.planned // self.rows_per_part)

    @property
    def num_parts(self) -> int:
        return self.containers_from + (len(self.container_parts) or self.num_containers)

    def num_containers_in(self, part: int) -> int:
        """The number of containers that make a part."""
        if part < self.containers_from:
            return 0
        return self.container_parts[part - self.containers_from] if self.container_parts else 1

    def num_images(self, found: int) -> int:
        """The number of planned images, of which `found` were found in containers so far."""
        return self.planned + max(found, self.known_inside)


class Numerics(BaseModel):
    """The contents of `numerics.json`: the precision of all parts of a segment, and the reason. No file: float32."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["float32", "bfloat16"]
    compiled: bool = False
    reason: str


class _Described(BaseModel):
    """The fields of `segment.json` that every segment has, including the segment of single adds."""

    model_config = ConfigDict(extra="ignore")

    fingerprint: str


def reserve(
    storage: Storage,
    spec: SegmentSpec,
    images: pa.Table,
    containers: pa.Table | None = None,
    *,
    lease: Lease,
    hold: Callable[[str], FileRef | None] | None = None,
) -> Reservation:
    """Freeze a plan under the next free segment number, and hold the segment's folder.

    `hold` writes the digests that the memory holds to a path; None if duplicates are not left out.

    `images` has the columns of PLAN without `id`, then the kept columns whose values are already known. `containers`
    has the columns of CONTAINERS. Their order is final. Together they have at least one row. Raises UsageError if there
    are more rows than an id can count.
    """
    number = _next_number(storage)
    while True:
        reservation = freeze(storage, spec, images, containers, number=number, nonce=lease.nonce)
        if hold is not None:
            held = hold(held_path(reservation.folder, lease.nonce))
            reservation = reservation.model_copy(update={"held": held})
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        reservation = reservation.model_copy(update={"planned_at": now})
        try:
            described = reservation.model_dump_json(indent=1).encode()
            create_own(storage, f"{segment_folder(number)}{DESCRIPTION}", described)
        except AlreadyExists:
            storage.delete([file.path for file in (reservation.plan, reservation.containers, reservation.held) if file])
            number += 1
        else:
            lease.hold(segment_folder(number))
            return reservation


def freeze(
    storage: Storage,
    spec: SegmentSpec,
    images: pa.Table,
    containers: pa.Table | None = None,
    *,
    number: int,
    nonce: str,
) -> Reservation:
    """Write the frozen plan of segment `number`; 0 is a bulk job, which is no segment.

    No reader sees it before a version names the segment.
    """
    rows = ids.rows_per_part(images.num_rows)
    num_containers = containers.num_rows if containers is not None else 0
    container_parts = share_parts(containers) if containers is not None else ()
    ids.first_id(number, -(-images.num_rows // rows) + (len(container_parts) or num_containers))
    folder = segment_folder(number) if number else ""
    return Reservation(
        **dict(spec),
        number=number,
        planned=images.num_rows,
        rows_per_part=rows,
        plan=_write_plan(storage, plan_path(folder, nonce), images, number, rows),
        containers=_write_containers(storage, containers_path(folder, nonce), containers),
        num_containers=num_containers,
        container_parts=container_parts,
        known_inside=pc.sum(containers.column("images")).as_py() or 0 if containers is not None else 0,
    )


def reserve_for_singles(storage: Storage) -> int:
    """Reserve a segment for single adds, which have no plan, and return its number."""
    number = _next_number(storage)
    while True:
        described = {"format": FORMAT, "number": number, "fingerprint": SINGLES, "nonce": secrets.token_hex(8)}
        try:
            create_own(storage, f"{segment_folder(number)}{DESCRIPTION}", json.dumps(described, indent=1).encode())
        except AlreadyExists:
            number += 1
        else:
            return number


def find_unfinished(storage: Storage, fingerprint: str, committed: Collection[int]) -> Reservation | None:
    """The newest reserved segment of this fingerprint that is neither committed nor given up; may be None."""
    found = (each for each in unfinished(storage, committed) if each.fingerprint == fingerprint)
    return next(found, None)


def unfinished(storage: Storage, committed: Collection[int]) -> Iterator[Reservation]:
    """The reserved segments that are neither committed nor given up, the newest first; without single adds.

    Costs one listing, and three small requests for each of them. Raises DamagedFile.
    """
    for number in reversed(reserved_numbers(storage)):
        if number in committed or is_given_up(storage, number):
            continue
        if not storage.exists(f"{segment_folder(number)}{DESCRIPTION}"):
            continue  # the process that took the number died before describing it
        reservation = read_reservation(storage, number)
        if reservation is not None and reservation.number == number:
            yield reservation


def reserved_numbers(storage: Storage) -> list[int]:
    """Every segment number that was ever taken, ascending."""
    return [number for number in map(segment_number, storage.list(SEGMENTS)) if number is not None]


def is_given_up(storage: Storage, number: int) -> bool:
    """Whether the segment is marked as given up: it will never be committed."""
    return storage.exists(f"{segment_folder(number)}{GIVEN_UP}")


def give_up(storage: Storage, number: int) -> None:
    """Mark a segment as given up: it will never be committed, and the same command starts a new one."""
    with contextlib.suppress(AlreadyExists):
        storage.create(f"{segment_folder(number)}{GIVEN_UP}", b"{}")


def read_reservation(storage: Storage, number: int) -> Reservation | None:
    """The reservation of a segment; None for single adds. Raises DamagedFile if it is missing or unreadable."""
    path = f"{segment_folder(number)}{DESCRIPTION}"
    data = storage.read(path)
    try:
        if _Described.model_validate_json(data).fingerprint == SINGLES:
            return None
        return Reservation.model_validate_json(data)
    except ValidationError as error:
        raise damaged_reservation(storage, path) from error


def read_numerics(storage: Storage, reservation: Reservation) -> Numerics | None:
    """The recorded numerics of a segment; None if there are none. Raises DamagedFile."""
    path = f"{reservation.folder}{NUMERICS}"
    if not storage.exists(path):
        return None
    try:
        return Numerics.model_validate_json(storage.read(path))
    except ValidationError as error:
        raise damaged_reservation(storage, path) from error


def record_numerics(storage: Storage, reservation: Reservation, numerics: Numerics) -> Numerics:
    """Record the numerics of a segment, unless another worker already did; return the recorded ones."""
    with contextlib.suppress(AlreadyExists):
        storage.create(f"{reservation.folder}{NUMERICS}", numerics.model_dump_json(indent=1).encode())
    return read_numerics(storage, reservation) or numerics


def read_plan(storage: Storage, reservation: Reservation, part: int) -> pa.Table:
    """The planned rows of one part of image files, in order.

    From an object store it costs the row group of the part (200 KB for 16,384 images), and once in a process the
    footer of the plan (620 bytes for each part).
    """
    if reservation.plan is None or part >= reservation.containers_from:
        raise AssertionError(f"part {part} is a container")
    return read_row_group(storage, reservation.plan, part)


def read_containers(storage: Storage, reservation: Reservation, part: int) -> list[dict]:
    """The containers of a part in order: rows of CONTAINERS.

    Costs the row groups of the containers (100 bytes for each of 16,384 containers), which then stay in this process.
    """
    if reservation.containers is None or part < reservation.containers_from:
        raise AssertionError(f"part {part} is one of image files")
    rows = rows_of_part(reservation.container_parts, part - reservation.containers_from)
    found: list[dict] = []
    for group, first, count in row_groups_of(rows):
        found += _row_group(storage, reservation.containers, group).slice(first, count).to_pylist()
    return found


def _row_group(storage: Storage, containers: FileRef, group: int) -> pa.Table:
    return _containers.get_or_make(
        (storage.uri, containers.path, containers.sha256, group),
        lambda: read_row_group(storage, containers, group),
        lambda found: found.nbytes,
    )


def _next_number(storage: Storage) -> int:
    return max(reserved_numbers(storage), default=0) + 1


def _write_containers(storage: Storage, path: str, containers: pa.Table | None) -> FileRef | None:
    if containers is None or not containers.num_rows:
        return None
    with storage.publishing(path) as local:
        write_table(containers.cast(CONTAINERS), local)
        return describe(path, local, containers.num_rows)


def _write_plan(storage: Storage, path: str, images: pa.Table, number: int, rows: int) -> FileRef | None:
    num_rows = images.num_rows
    if not num_rows:
        return None
    entry_ids = [
        pa.array(ids.part_ids(number, part, min(rows, num_rows - part * rows))) for part in range(-(-num_rows // rows))
    ]
    schema = pa.schema([*PLAN, *(field for field in images.schema if field.name not in PLAN.names)])
    table = images.add_column(0, "id", pa.chunked_array(entry_ids)).cast(schema)
    with storage.publishing(path) as local:
        write_table(table, local, row_group_rows=rows)  # one row group for each part: a part reads only its own rows
        return describe(path, local, num_rows)


def check_folder(files: Iterable[FileRef | None], folder: str) -> None:
    """Raises ValueError unless all files lie below `folder` ("": in one of FOLDERS_OF_A_JOB)."""
    named = [file for file in files if file is not None]
    if folder:
        for file in named:
            if not file.path.startswith(folder):
                raise ValueError(f"{file.path} is not in {folder}")
    else:
        check_places(named, FOLDERS_OF_A_JOB)


def damaged_reservation(storage: Storage, path: str) -> DamagedFile:
    """The error for a damaged description or completion mark of a segment."""
    return DamagedFile(
        f"{path} in the memory at {storage.uri}, or a file it names, is not whole: "
        "remove it and run the same `add` again"
    )

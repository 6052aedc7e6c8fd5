"""The progress of adds that are not committed: running, stopped, or killed. Their finished parts are stored."""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from pipeline.errors import DamagedFile
from pipeline.store.layout import SEGMENTS, segment_folder
from pipeline.store.segments import part_marks, reservations
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import LeaseRecord, live_leases, read_leases

ADDING = "add "  # the prefix of `work` in an add's lease; the source follows

Stage = Literal["planning", "embedding", "committing"]


@dataclass(frozen=True)
class UnderWay:
    """The progress of an add. Images in archives count as planned once they are found.

    `running` is true if a process that is not known to be dead holds the add. In stage "planning" only the source is
    known, and `segment` is None. In stage "committing" every part is done. `archives_done` of `archives` archives are
    done. `counted` is true if `planned` is final: no unread archive with an unknown number of images is left.
    """

    segment: int | None
    source: str
    dataset: str | None
    encoder: str | None
    planned: int
    done: int
    rejected: int
    left: int
    parts: int
    parts_done: int
    running: bool
    stage: Stage
    archives: int = 0
    archives_done: int = 0
    counted: bool = True

    def to_json(self) -> dict:
        """As a JSON object."""
        return asdict(self)


def under_way(storage: Storage, committed: Collection[int]) -> Iterator[UnderWay]:
    """Every reserved segment that is neither committed nor given up, and every running add that has no plan yet."""
    leases = read_leases(storage)
    working = live_leases(storage, leases)
    adding = [record for record in working if record.work.startswith(ADDING)]
    at_work = {record.process for record in adding if not _is_planning(record)}
    # A first add has a second lease, which announces it, while it is planned and embedded.
    by_process = {record.process: record for record in adding if record.process not in at_work}
    planning = [*by_process.values()]
    held = [folder for record in working for folder in record.holds]
    for number in reservations.reserved_numbers(storage):
        if number in committed or reservations.is_given_up(storage, number):
            continue
        try:
            reservation = reservations.read_reservation(storage, number)
        except DamagedFile:  # the process that took the number died before describing it
            continue
        if reservation is None:
            continue
        # Before an add holds its planned segment, only the source connects the lease with the segment.
        about_to_hold = [record for record in planning if record.work == f"{ADDING}{reservation.source}"][:1]
        planning = [record for record in planning if record not in about_to_hold]
        running = segment_folder(number) in held or bool(about_to_hold)
        yield _progress(storage, reservation, running=running)
    for record in planning:
        source = record.work.removeprefix(ADDING)
        yield UnderWay(None, source, None, None, 0, 0, 0, 0, 0, 0, running=True, stage="planning", counted=False)


def _is_planning(record: LeaseRecord) -> bool:
    return record.work.startswith(ADDING) and not any(folder.startswith(SEGMENTS) for folder in record.holds)


def _progress(storage: Storage, reservation: reservations.Reservation, *, running: bool) -> UnderWay:
    marks = part_marks.read_marks_at(storage, part_marks.marks_of(storage, reservation))
    done = sum(mark.planned for mark in marks)
    in_containers = [mark for mark in marks if mark.part >= reservation.containers_from]
    planned = reservation.num_images(sum(mark.planned for mark in in_containers))
    uncounted = part_marks.uncounted_parts(storage, reservation)
    return UnderWay(
        segment=reservation.number,
        source=reservation.source,
        dataset=reservation.dataset,
        encoder=reservation.identity.encoder,
        planned=planned,
        done=done,
        rejected=sum(mark.num_rejected for mark in marks),
        left=planned - done,
        parts=reservation.num_parts,
        parts_done=len(marks),
        running=running,
        stage="embedding" if len(marks) < reservation.num_parts else "committing",
        archives=reservation.num_containers,
        archives_done=sum(reservation.num_containers_in(mark.part) for mark in in_containers),
        counted=uncounted <= {mark.part for mark in in_containers},
    )

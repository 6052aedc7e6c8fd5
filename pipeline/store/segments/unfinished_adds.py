"""Adds that are not committed: at work now, stopped, or killed. What they have done is kept and counted here."""

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

from pipeline.errors import DamagedFile
from pipeline.store.layout import SEGMENTS, segment_folder
from pipeline.store.segments import part_marks, reservations
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import LeaseRecord, live_leases, read_leases

READ_AT_ONCE = 16

ADDING = "add "  # what the work of an add's lease is called begins so; the source follows

Stage = Literal["planning", "embedding", "committing"]


@dataclass(frozen=True)
class UnderWay:
    """How far an add has come. Images in archives count as planned once they were found.

    `running` says whether a process holds it that is not known to be dead. While it is "planning" nothing is known but
    the source, and `segment` is None; "committing" means that every part is done. `archives_done` of `archives` are;
    `counted` says whether `planned` is final, which it is not while archives are unread whose images nobody counted.
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
    """Every reserved segment that neither a version names nor anybody gave up, and every add that has no plan yet."""
    leases = read_leases(storage)
    working = live_leases(storage, leases)
    adding = [record for record in working if record.work.startswith(ADDING)]
    at_work = {record.process for record in adding if not _is_planning(record)}
    # A first add is announced by a lease of its own besides, while it is planned and embedded.
    by_process = {record.process: record for record in adding if record.process not in at_work}
    planning = [*by_process.values()]
    held = [folder for record in working for folder in record.holds]
    for number in reservations.reserved(storage):
        if number in committed or reservations.is_given_up(storage, number):
            continue
        try:
            reservation = reservations.read_reservation(storage, number)
        except DamagedFile:  # whoever took the number died before it was described
            continue
        if reservation is None:
            continue
        # Between its plan and its hold on it an add is known by the source alone.
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
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:  # most of it is waiting for the store
        marks = list(
            pool.map(lambda path: part_marks.read_mark(storage, path), part_marks.marks_of(storage, reservation))
        )
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
        archives_done=len(in_containers),
        counted=uncounted <= {mark.part for mark in in_containers},
    )

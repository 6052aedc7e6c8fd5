"""Adds that are not committed: at work now, stopped, or killed. What they have done is kept and counted here."""

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from pipeline.errors import DamagedFile
from pipeline.store import segments
from pipeline.store.leases import live, standing
from pipeline.store.storage import Storage

READ_AT_ONCE = 16


@dataclass(frozen=True)
class UnderWay:
    """How far an add has come. Images in archives count as planned once they were found.

    `running` says whether a process holds it that is not known to be dead.
    """

    segment: int
    source: str
    dataset: str
    encoder: str
    planned: int
    done: int
    rejected: int
    left: int
    parts: int
    parts_done: int
    running: bool

    def to_json(self) -> dict:
        """As a JSON object."""
        return asdict(self)


def under_way(storage: Storage, committed: Collection[int]) -> Iterator[UnderWay]:
    """Every reserved segment that neither a version names nor anybody gave up."""
    held = [folder for record in live(storage, standing(storage)) for folder in record.holds]
    for number in segments.reserved(storage):
        if number in committed or segments.is_given_up(storage, number):
            continue
        try:
            reservation = segments.read_reservation(storage, number)
        except DamagedFile:  # whoever took the number died before it was described
            continue
        if reservation is not None:
            yield _progress(storage, reservation, running=segments.segment_folder(number) in held)


def _progress(storage: Storage, reservation: segments.Reservation, *, running: bool) -> UnderWay:
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:  # most of it is waiting for the store
        marks = list(pool.map(lambda path: segments.read_mark(storage, path), segments.marks_of(storage, reservation)))
    done = sum(mark.planned for mark in marks)
    found = sum(mark.planned for mark in marks if mark.part >= reservation.containers_from)
    planned = reservation.num_images(found)
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
    )

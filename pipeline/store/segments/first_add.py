"""The progress of the first add of a memory, before there is any version.

Until the first commit a memory is a lease, weights, and a segment whose parts are done one by one. The progress costs
a few listings, whatever the size of the add: no completion mark is read.
"""

import contextlib
import threading
from collections.abc import Iterator

from pipeline.errors import DamagedFile, VisualMemoryError
from pipeline.store.layout import ENCODER, LEASES, part_of_mark
from pipeline.store.segments import part_marks, reservations
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease, read_leases
from pipeline.store.storage.local import LocalStorage

EMBEDDED = "all of it is embedded"
SILENT_SECONDS = 0.5  # an add that fails sooner writes no lease


@contextlib.contextmanager
def announce(storage: Storage, work: str) -> Iterator[None]:
    """Write a lease that shows other processes a first add, before its source is listed, which may take hours.

    The lease is removed at the end, and so is the memory's folder if it is new and empty. If the lease cannot be
    written, the add continues without it.
    """
    ended = threading.Event()
    root = storage.root if isinstance(storage, LocalStorage) else None
    is_new = root is not None and not root.exists()

    def announce() -> None:
        if not ended.wait(SILENT_SECONDS):
            with contextlib.suppress(VisualMemoryError, OSError), Lease(storage, work):
                ended.wait()

    thread = threading.Thread(target=announce, name="first add", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if root is not None and is_new:
            with contextlib.suppress(OSError):  # it is not empty
                root.rmdir()


def has_begun(storage: Storage) -> bool:
    """Whether there are files of a first add that was not given up."""
    numbers = reservations.reserved_numbers(storage)
    if any(not reservations.is_given_up(storage, number) for number in numbers):
        return True
    return bool(read_leases(storage)) or bool(not numbers and storage.list(ENCODER))


def unfinished_first_add(storage: Storage) -> str | None:
    """A message about the unfinished first add, with advice; None if no add has begun."""
    if not has_begun(storage):
        return None
    done = how_far(storage)
    said = f"the first add to the memory at {storage.uri} is not finished ({done}): wait for it, or run the same `add`"
    if done == EMBEDDED and not storage.list(LEASES):
        return f"{said} again, which only commits it; if there were versions before, restore them from a copy"
    return f"{said} again where it was stopped, which goes on"


def how_far(storage: Storage) -> str:
    """The progress of the newest segment, as a text."""
    for number in reversed(reservations.reserved_numbers(storage)):
        if (reservation := _described(storage, number)) is not None:
            return _done(storage, reservation)
    return "it has remembered nothing yet"


def _described(storage: Storage, number: int) -> reservations.Reservation | None:
    if reservations.is_given_up(storage, number):
        return None
    try:
        reservation = reservations.read_reservation(storage, number)
    except DamagedFile:  # the process that took the number has not described it yet
        return None
    return reservation if reservation is not None and reservation.number == number else None


def _done(storage: Storage, reservation: reservations.Reservation) -> str:
    """The progress by the names of the completion marks: a number of image files, and a number of archives."""
    marks = part_marks.marks_of(storage, reservation)
    parts = [part for part in map(part_of_mark, marks) if part is not None]
    if len(parts) == reservation.num_parts:
        return EMBEDDED
    rows, files = reservation.rows_per_part, reservation.planned
    images = sum(min(rows, files - part * rows) for part in parts if part < reservation.containers_from)
    archives = sum(map(reservation.num_containers_in, parts))
    said = [f"{images:,} of {files:,} images done"] * bool(files)
    said += [f"{archives:,} of {reservation.num_containers:,} archives done"] * bool(reservation.num_containers)
    return ", ".join(said)

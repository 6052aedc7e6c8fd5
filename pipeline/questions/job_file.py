"""The place of a job over many parts: what it is about, and the files of its finished parts.

A job is described once, in `job.json`, and cut into parts. A part is done when it has a completion mark. So a killed
job goes on where it was when the same command is given again. Bulk decisions and leave-one-out are such jobs.
"""

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import FormatError, UsageError
from pipeline.store.layout import FOLDERS_OF_A_JOB, JOB, ROWS_OF_A_JOB
from pipeline.store.segments.part_marks import PartMark
from pipeline.store.segments.reservations import Reservation
from pipeline.store.storage.interface import AlreadyExists, Storage, create_own
from pipeline.store.storage.open_storage import open_storage


class Job(BaseModel):
    """The contents of `job.json`.

    `starts` are the first ids of the parts of a job over the entries of the memory; a job over a source has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory: str
    version: int
    options: dict
    reservation: Reservation
    starts: Annotated[tuple[int, ...], Field(exclude_if=operator.not_)] = ()  # left out: earlier releases know none


def fingerprint_of(about: dict[str, Any]) -> str:
    """The hash that tells jobs apart; of plain values."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def claim_job(out: Storage, fingerprint: str, make: Callable[[], Job]) -> Job:
    """The job at `out`; the one that `make` plans if there is none yet.

    Raises UsageError if `out` holds another job or other files, FormatError if its job cannot be read.
    """
    if not out.exists(JOB):
        if found := [name for name in out.list("") if name not in set(FOLDERS_OF_A_JOB) - set(ROWS_OF_A_JOB)]:
            raise UsageError(f"{out.uri} has other files in it, such as {found[0]}: give `out` a new place")
        job = make()
        try:
            create_own(out, JOB, job.model_dump_json(indent=1).encode())
        except AlreadyExists:  # another process created the job meanwhile
            out.delete([file.path for file in (job.reservation.plan, job.reservation.containers) if file])
    job = read_job(out)
    if job.reservation.fingerprint != fingerprint:
        raise UsageError(
            f"{out.uri} holds decisions about {job.reservation.source} by {job.memory}, or made with other options: "
            "give `out` a new place, or repeat the command as it was"
        )
    return job


def read_job(out: Storage) -> Job:
    """The job at `out`. Raises FormatError."""
    try:
        return Job.model_validate_json(out.read(JOB))
    except ValidationError as error:
        raise FormatError(f"{JOB} at {out.uri} is not of this release, or damaged: give `out` a new place") from error


def begun_job(out_uri: str) -> Job | None:
    """The job that was begun at a place; None if there is no job. Raises FormatError."""
    out = open_storage(out_uri)
    return read_job(out) if out.exists(JOB) else None


def begun_balance(out_uri: str) -> float | None:
    """The balance of the job that was begun at a place; None if there is no job.

    A balance "auto" is measured once. A continued job uses that balance, even if the memory has changed meanwhile.
    """
    job = begun_job(out_uri)
    return float(job.options["rule"]["balance"]) if job is not None else None


def tidy(out: Storage, marks: Iterable[PartMark]) -> None:
    """Remove files of killed workers that no mark names; a reader would take their rows for further decisions."""
    named = {file.path for mark in marks for file in (mark.decisions, mark.rejected) if file}
    out.delete([path for path in _written(out) if path not in named])


def _written(out: Storage) -> Iterator[str]:
    for kind in ROWS_OF_A_JOB:
        yield from (f"{kind}/{name}" for name in out.list(kind))

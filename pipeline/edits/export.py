"""Exports the live entries of a memory to files of vectors, which other tools and `add` can read.

Forgotten entries are left out, labels are the current ones, and kept columns go with the entries. Each file is one step
of a job (export_files.py): here or on Ray. A marker says what is exported, until all files are there: `add` refuses the
place until then, and the same command goes on with it.

    OUT/exporting.json      the memory, its version and the options; removed when the export is finished
"""

import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.edits.export_files import ExportWork, Format, parts_of
from pipeline.errors import DamagedFile, MemoryMissing, UsageError
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.steps import RunSteps, run_steps_here
from pipeline.store.layout import UNFINISHED_EXPORT
from pipeline.store.log.state import State
from pipeline.store.storage.interface import AlreadyExists, Storage, create_own
from pipeline.store.tables.schemas import FORMAT
from pipeline.store.values import PositiveCount, VersionNumber

ROWS_PER_FILE = 1_000_000  # as clip-retrieval writes them by default
DIGITS = 4  # least digits of a file's number; all files have as many, so that names sort as numbers do


class ExportMarker(BaseModel):
    """The content of `exporting.json`: the uri of the memory, the version that is exported, and the options.

    `contents` is a hash of the state of the version: an erasure changes older versions too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    memory: str
    version: VersionNumber
    file_format: Format
    rows_per_file: PositiveCount
    contents: str
    nonce: str = ""  # of the process that began the export


@dataclass(frozen=True)
class ExportReport:
    """The result of an export. `files` counts the files of vectors; `num_bytes` is the size of all files.

    Earlier runs of the same export wrote `already` of the files.
    """

    uri: str
    format: Format
    version: int
    entries: int
    files: int
    num_bytes: int
    dimension: int
    encoder: str
    seconds: float
    already: int = 0

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
    run_steps: RunSteps = run_steps_here,
    at: Callable[[int], State] | None = None,
) -> ExportReport:
    """Write the live entries of a version to an empty place, or go on with an export to that place.

    An export goes on by the version that it began with, which `at` opens (None: only `state` can be exported). Each
    entries file is read once, or twice if it lies across a border; a process holds one row group of entries, and the
    forgotten ids and corrected labels of their files.

    Raises UsageError for a place with other files in it or with another export, MemoryMissing for a version without
    entries, DamagedFile.
    """
    if file_format not in get_args(Format):
        raise UsageError(f"`file_format` {file_format} is unknown: give {' or '.join(get_args(Format))}")
    if rows_per_file < 1:
        raise UsageError(f"`rows_per_file` {rows_per_file} is no number of rows: give 1 or more")
    if state.identity is None or not state.num_live:
        raise MemoryMissing(f"the memory at {storage.uri} has no entry at version {state.version}: there is no export")
    began = time.monotonic()
    wanted = ExportMarker(
        memory=storage.uri,
        version=state.version,
        file_format=file_format,
        rows_per_file=rows_per_file,
        contents=_contents_of(state),
        nonce=secrets.token_hex(8),
    )
    marker = _claimed(out, wanted, any_version=at is not None)
    if at is not None and marker.version != state.version:
        state = at(marker.version)
    _refuse_changed(out, marker, state)

    def refuse_changed() -> None:
        if at is not None:
            with contextlib.suppress(MemoryMissing):  # the version was dropped: what is exported is as it was
                _refuse_changed(out, marker, at(marker.version))

    report = _written(storage, state, out, marker, on_progress, run_steps, refuse_changed)
    return replace(report, seconds=time.monotonic() - began)


def _contents_of(state: State) -> str:
    return hashlib.sha256(state.model_dump_json().encode()).hexdigest()


def _refuse_changed(out: Storage, marker: ExportMarker, state: State) -> None:
    """Raise UsageError if the version is not what it was: the finished files may hold what was erased since."""
    if marker.contents != _contents_of(state):
        raise UsageError(
            f"version {marker.version} has changed since its export to {out.uri} began, as an erasure does: "
            "empty that place and export again"
        )


def _claimed(out: Storage, wanted: ExportMarker, *, any_version: bool) -> ExportMarker:
    """The marker of the export to a place: the wanted one if the place is empty. Raises UsageError or DamagedFile."""
    there = out.list("")
    if UNFINISHED_EXPORT not in there:
        if there:
            raise UsageError(f"{out.uri} has other files in it, such as {there[0]}: name an empty or new place for OUT")
        with contextlib.suppress(AlreadyExists):  # another process has just begun the export
            create_own(out, UNFINISHED_EXPORT, wanted.model_dump_json(indent=1).encode())
            return wanted
    try:
        found = ExportMarker.model_validate_json(out.read(UNFINISHED_EXPORT))
    except ValidationError as error:
        raise DamagedFile(f"{UNFINISHED_EXPORT} in {out.uri} is not whole: empty the place and export again") from error
    kept = {"nonce": wanted.nonce, "contents": wanted.contents} | ({"version": wanted.version} if any_version else {})
    if found.model_copy(update=kept) != wanted:
        raise UsageError(
            f"{out.uri} holds an unfinished export of version {found.version} of the memory at {found.memory}, as "
            f"{found.file_format} with {found.rows_per_file:,} rows in a file: repeat that command, or name another "
            "place for OUT"
        )
    return found


def _written(
    storage: Storage,
    state: State,
    out: Storage,
    marker: ExportMarker,
    on_progress: OnProgress,
    run_steps: RunSteps,
    refuse_changed: Callable[[], None],
) -> ExportReport:
    assert state.identity is not None  # noqa: S101  # checked by the caller
    parts = parts_of(storage, state, marker.rows_per_file)
    total = sum(part.rows for part in parts)
    digits = max(DIGITS, len(str((state.num_live - 1) // marker.rows_per_file)))
    work = ExportWork.of(storage, out, state, marker.file_format, digits)
    there = out.walk()
    finished = {part.number for part in parts if work.is_done(part.number, there)}
    left = [part for part in parts if part.number not in finished]
    num_bytes = sum(there[path] for number in finished for path in work.paths(number))
    done, told = total - sum(part.rows for part in left), 0
    on_progress(Progress("exporting", done, total))

    def tell(rows: int) -> None:
        nonlocal done, told
        done, told = done + rows, told + rows
        on_progress(Progress("exporting", done, total))

    for place, written in run_steps(replace(work, on_rows=tell).steps(left)):
        num_bytes += written
        if told < left[place].rows:  # written by another process
            tell(left[place].rows)
        told = 0
    refuse_changed()
    out.delete([*out.abandoned(), UNFINISHED_EXPORT])
    return ExportReport(
        uri=out.uri,
        format=marker.file_format,
        version=state.version,
        entries=total,
        files=len(parts),
        num_bytes=num_bytes,
        dimension=state.identity.dimension,
        encoder=state.identity.encoder,
        seconds=0.0,
        already=len(parts) - len(left),
    )

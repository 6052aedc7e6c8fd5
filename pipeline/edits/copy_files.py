"""Copies files of a memory to another place: several at once in a process, many steps of several at once on Ray."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.errors import DamagedFile
from pipeline.steps import PROCESS_BYTES, Step
from pipeline.store.layout import way_out
from pipeline.store.storage.file_refs import FileRef, check_path, describe
from pipeline.store.storage.interface import Storage

THREADS = 16  # files copied at once: most of the time is waiting for the two places
CHUNK_BYTES = 1 << 20
STEP_FILES, STEP_BYTES = 1_024, 8 << 30  # of a step at most: what a process of Ray does before it reports


@dataclass(frozen=True)
class ToCopy:
    """A file, and its length at the target (None: not there) and, if the store may copy it itself, at the source."""

    file: FileRef
    there: int | None
    in_source: int | None = None


@dataclass(frozen=True)
class Copied:
    """How many files were copied, their bytes, and how many were there already."""

    files: int = 0
    num_bytes: int = 0
    already: int = 0

    def __add__(self, other: "Copied") -> "Copied":
        return Copied(self.files + other.files, self.num_bytes + other.num_bytes, self.already + other.already)


@dataclass(frozen=True)
class CopyWork:
    """The two places. It is sent to other processes, without `on_file`.

    `on_file` is called after each file, if the work is done in this process.
    """

    source: Storage
    target: Storage
    on_file: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on_file": None}

    @property
    def puts_are_whole(self) -> bool:
        """Whether a file of the right length at the target needs no hashing.

        An object store has an object whole or not at all, checks its bytes when it is put, and a path is never used for
        other bytes.
        """
        return "://" in self.target.uri

    def steps(self, batches: Sequence[Sequence[ToCopy]]) -> Iterator[Step]:
        """One step for each batch, numbered by its place."""
        num_bytes = PROCESS_BYTES + THREADS * 2 * CHUNK_BYTES
        return (Step(place, partial(self.copy, batch), num_bytes) for place, batch in enumerate(batches))

    def copy(self, batch: Sequence[ToCopy]) -> Copied:
        """Copy some files, THREADS at once. Raises DamagedFile naming the first file that was altered."""
        done = Copied()
        with ThreadPoolExecutor(THREADS) as pool:
            running = [pool.submit(self._copy_file, each) for each in batch]
            try:
                for copied in as_completed(running):
                    num_bytes = copied.result()
                    done += Copied(already=1) if num_bytes is None else Copied(files=1, num_bytes=num_bytes)
                    if self.on_file is not None:
                        self.on_file()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return done

    def _copy_file(self, each: ToCopy) -> int | None:
        """Copy one file; return its size, or None if the copy has it undamaged."""
        file = each.file
        if each.there == file.num_bytes and (self.puts_are_whole or self._is_whole(file)):
            return None
        # Another length is damage, which the copy of the bytes names.
        if each.in_source == file.num_bytes and self.target.copy_from(self.source, file.path):
            return file.num_bytes
        local = check_path(self.source, file)
        digest = hashlib.sha256()
        try:
            with self.target.publishing(file.path) as aside, local.open("rb") as read, aside.open("wb") as written:
                while chunk := read.read(CHUNK_BYTES):
                    digest.update(chunk)
                    written.write(chunk)
                if digest.hexdigest() != file.sha256:  # raised inside `publishing`, so that nothing is published
                    raise DamagedFile(
                        f"{file.path} in the memory at {self.source.uri} was altered: {way_out(file.path)}"
                    )
        finally:
            self.source.release(file.path)
        return file.num_bytes

    def _is_whole(self, file: FileRef) -> bool:
        try:
            return describe(file.path, self.target.local_path(file.path)).sha256 == file.sha256
        finally:
            self.target.release(file.path)


def batches_of(files: Sequence[ToCopy]) -> list[list[ToCopy]]:
    """Runs of files of up to STEP_FILES and, unless one file is larger, STEP_BYTES."""
    batches: list[list[ToCopy]] = []
    num_bytes = 0
    for each in files:
        if not batches or len(batches[-1]) >= STEP_FILES or num_bytes + each.file.num_bytes > STEP_BYTES:
            batches.append([])
            num_bytes = 0
        batches[-1].append(each)
        num_bytes += each.file.num_bytes
    return batches

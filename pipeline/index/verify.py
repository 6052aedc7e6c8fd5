"""Verification of the FAISS files of indexes: FAISS can open them, and they hold the vectors that versions record."""

from collections.abc import Collection, Iterable, Iterator
from functools import partial

from pipeline.errors import DamagedFile, NotPermitted
from pipeline.index.search.shard_files import read_faiss
from pipeline.steps import PROCESS_BYTES, RunSteps, Step, run_steps_here
from pipeline.store.checks.findings import Finding, damage, not_looked_at
from pipeline.store.log.records import Index
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage


def verify_faiss(
    storage: Storage,
    indexes: Iterable[Index],
    dimension: int,
    broken: Collection[str],
    run_steps: RunSteps = run_steps_here,
) -> Iterator[Finding]:
    """Yield a finding for each FAISS file that FAISS cannot open, or that has other rows than versions record.

    Each file is opened once, in a step of its own. Paths in `broken` are skipped.
    """
    files: dict[str, FileRef] = {}
    for index in indexes:
        for file in (index.trained, *(shard.index for shard in index.shards)):
            if file is not None and file.path not in broken:
                files[file.path] = file
    steps = (
        Step(number, partial(_checked, storage, file, dimension), PROCESS_BYTES + file.num_bytes)
        for number, file in enumerate(files.values())
    )
    found = dict(run_steps(steps))
    yield from (finding for number in sorted(found) for finding in found[number])


def _checked(storage: Storage, file: FileRef, dimension: int) -> list[Finding]:
    try:
        found = read_faiss(storage, file)
    except NotPermitted as error:
        return [not_looked_at(error)]
    except DamagedFile:
        return [damage(file.path, "cannot be opened by FAISS")]
    storage.release(file.path)
    if (found.ntotal, found.d) != (file.rows, dimension):
        what = f"holds {found.ntotal:,} vectors of {found.d} dimensions where versions tell of {file.rows:,}"
        return [damage(file.path, f"{what} of {dimension}")]
    return []

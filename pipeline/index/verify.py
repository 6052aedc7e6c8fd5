"""Verification of the FAISS files of indexes: FAISS can open them, and they hold the vectors that versions record."""

from collections.abc import Collection, Iterable, Iterator

from pipeline.errors import DamagedFile, NotPermitted
from pipeline.index.search.shard_files import read_faiss
from pipeline.store.checks.findings import Finding, damage, not_looked_at
from pipeline.store.log.records import Index
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage


def verify_faiss(
    storage: Storage, indexes: Iterable[Index], dimension: int, broken: Collection[str]
) -> Iterator[Finding]:
    """Yield a finding for each FAISS file that FAISS cannot open, or that has other rows than versions record.

    Each file is opened once. Paths in `broken` are skipped.
    """
    files: dict[str, FileRef] = {}
    for index in indexes:
        for file in (index.trained, *(shard.index for shard in index.shards)):
            if file is not None and file.path not in broken:
                files[file.path] = file
    for file in files.values():
        try:
            found = read_faiss(storage, file)
        except NotPermitted as error:
            yield not_looked_at(error)
            continue
        except DamagedFile:
            yield damage(file.path, "cannot be opened by FAISS")
            continue
        storage.release(file.path)
        if (found.ntotal, found.d) != (file.rows, dimension):
            what = f"holds {found.ntotal:,} vectors of {found.d} dimensions where versions tell of {file.rows:,}"
            yield damage(file.path, f"{what} of {dimension}")

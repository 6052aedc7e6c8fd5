"""What the verification of a store cannot know of an index: whether FAISS can open its files, and what is in them."""

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
    """Open each FAISS file once, those known to be broken left out; it must hold the rows its version tells of."""
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
        if (found.ntotal, found.d) != (file.rows, dimension):
            what = f"holds {found.ntotal:,} vectors of {found.d} dimensions where versions tell of {file.rows:,}"
            yield damage(file.path, f"{what} of {dimension}")

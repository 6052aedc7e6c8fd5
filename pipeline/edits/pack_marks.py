"""Completion marks of a compaction: what one of its steps made, so that a killed compaction goes on from there.

A mark is named by a hash of the files that the step read. So it fits any later state that still has these files. It
lies in `packs/done/`. No version names it or the files that it names: both are garbage to whoever does not go on.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import DamagedFile
from pipeline.store.layout import PACK_MARKS, PACKS, SEGMENTS, folder_of, pack_mark_path
from pipeline.store.storage.file_refs import DigestsFile, FileRef, RowsFile, check_places
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease, LeaseRecord, live_leases, read_leases
from pipeline.store.values import Nonce

READ_AT_ONCE = 16  # marks: most of the time is waiting for the store


class Made(BaseModel):
    """The contents of a mark: the files that a step published under the lease `nonce`.

    `pack` are the entries of several files in one. `uris` and `sha256s` are the digests of a segment.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    nonce: Nonce
    pack: RowsFile | None = None
    uris: tuple[DigestsFile, ...] = ()
    sha256s: tuple[DigestsFile, ...] = ()

    @property
    def files(self) -> list[FileRef]:
        """All files that it names."""
        return [*([self.pack] if self.pack else []), *self.uris, *self.sha256s]


def key_of(kind: str, files: Iterable[RowsFile]) -> str:
    """The name of the mark of a step of this kind over some files: a hash of their hashes and ids."""
    said = "\n".join(f"{file.sha256} {file.first_id} {file.last_id}" for file in files)
    return hashlib.sha256(f"{kind}\n{said}".encode()).hexdigest()


def make_and_mark(storage: Storage, key: str, make: Callable[[], Made]) -> Made:
    """Do a step, then write its mark. Runs in any process."""
    made = make()
    storage.replace(pack_mark_path(key), made.model_dump_json().encode())
    return made


def take_up(storage: Storage, lease: Lease, keys: Collection[str]) -> tuple[dict[str, Made], list[LeaseRecord]]:
    """The marks of finished steps by key, from now on held by `lease`, and the leases of the dead that left them.

    What a live process has made is left to it. A clean-up removes marks before it looks for leases once more, and files
    after that. So a mark that is still there after the lease holds its files names files that stay. Costs a listing,
    two requests for each mark, and one for each file.
    """
    lease.hold(PACK_MARKS)
    there = [key for key in (name.removesuffix(".json") for name in storage.list(PACK_MARKS)) if key in keys]
    found = _read(storage, there)
    nonces = {made.nonce for made in found.values()} - {lease.nonce}
    left = [record for record in read_leases(storage) if record.nonce in nonces]
    alive = {record.nonce for record in live_leases(storage, left)}
    found = {key: made for key, made in found.items() if made.nonce in nonces - alive}
    if not found:
        return {}, []
    lease.hold(*sorted({folder_of(file.path) for made in found.values() for file in made.files}))
    found = _read(storage, list(found))
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        whole = pool.map(lambda made: all(storage.exists(file.path) for file in made.files), found.values())
        taken = {key: made for (key, made), is_whole in zip(found.items(), whole, strict=True) if is_whole}
    used = {made.nonce for made in taken.values()}
    return taken, [record for record in left if record.nonce in used]


def _read(storage: Storage, keys: Sequence[str]) -> dict[str, Made]:
    """The marks that can be read, by key. A step without one is done anew."""
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        marks = pool.map(lambda key: _read_mark(storage, pack_mark_path(key)), keys)
        return {key: made for key, made in zip(keys, marks, strict=True) if made is not None}


def _read_mark(storage: Storage, path: str) -> Made | None:
    try:
        made = Made.model_validate_json(storage.read(path))
        check_places(made.files, {PACKS, SEGMENTS})
    except (DamagedFile, ValidationError, ValueError):
        return None
    return made

"""Single adds: entries that are written into their commits, and folded into files from time to time.

A single add costs one small file, whatever the size of the memory. Folded files are merged in tiers, so that a hundred
thousand single adds lie in a few dozen files. Thumbnails are folded into files of their own, and so are the byte sizes
of images that were read at their uri.
"""

import base64
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.store.layout import folded_path
from pipeline.store.log.label_counts import changed_counts, count_singles
from pipeline.store.log.records import Single
from pipeline.store.log.state import FoldSingles, State
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.identity import Identity
from pipeline.store.tables.schemas import OFFSETS, THUMBNAILS, embedding_column, entries_schema, read_table, write_rows

FOLD_EVERY = 64
TIER_ROWS = (FOLD_EVERY * 64, FOLD_EVERY * 1024)  # small files are merged into one of the next tier
FILES_A_TIER = (63, 15)


def encode_vector(vector_D: np.ndarray) -> str:
    """A vector in the encoding of a commit: base64 of float16 [D], little-endian."""
    return base64.b64encode(np.ascontiguousarray(vector_D, "<f2").tobytes()).decode()


def encode_thumbnail(jpeg: bytes | None) -> str | None:
    """A thumbnail in the encoding of a commit: base64 of a JPEG; None if there is none."""
    return base64.b64encode(jpeg).decode() if jpeg is not None else None


def thumbnails_of_singles(singles: Sequence[Single]) -> dict[int, bytes]:
    """The thumbnails (JPEG) of single adds by id. Single adds without a thumbnail are left out."""
    return {single.id: base64.b64decode(single.thumbnail) for single in singles if single.thumbnail is not None}


def vectors_of_singles(singles: Sequence[Single], dimension: int) -> np.ndarray:
    """The vectors of single adds, float16 [N, D]."""
    data = b"".join(base64.b64decode(single.embedding) for single in singles)
    return np.frombuffer(data, "<f2").reshape(len(singles), dimension)


def table_of_singles(singles: Sequence[Single], identity: Identity) -> pa.Table:
    """Single adds as rows of an entries file."""
    return pa.table(
        [
            pa.array([single.id for single in singles], pa.int64()),
            pa.array([single.uri for single in singles], pa.string()),
            pa.array([single.label for single in singles], pa.string()),
            pa.array([single.dataset for single in singles], pa.string()),
            embedding_column(vectors_of_singles(singles, identity.dimension)),
            pa.array([single.sha256 for single in singles], pa.string()),
            pa.array([single.width for single in singles], pa.int32()),
            pa.array([single.height for single in singles], pa.int32()),
        ],
        schema=_schema(identity),
    )


def files_of_singles(state: State) -> list[RowsFile]:
    """The entries files of single adds, without packs, in the order of their ids."""
    number = state.singles.segment if state.singles else None
    return [file for segment in state.segments if segment.number == number for file in segment.entries]


def files_beside_singles(state: State) -> dict[str, list[RowsFile]]:
    """The files with thumbnails and offsets of single adds, in the order of their ids."""
    number = state.singles.segment if state.singles else None
    mine = [segment for segment in state.segments if segment.number == number]
    return {
        "thumbnails": [file for segment in mine for file in segment.thumbnails],
        "offsets": [file for segment in mine for file in segment.offsets],
    }


def fresh_singles(state: State) -> list[RowsFile]:
    """The last files of single adds that no shard covers. A fold may merge them with newer entries."""
    fresh = {file.path for file in state.fresh_files()}
    return [*itertools.takewhile(lambda file: file.path in fresh, reversed(files_of_singles(state)))][::-1]


@functools.lru_cache(maxsize=4)
def _schema(identity: Identity) -> pa.Schema:
    return entries_schema(identity)  # a reader that follows single adds calls this for each


def fold(storage: Storage, lease: Lease, state: State, *, wholly: bool = False, counts: bool = True) -> FoldSingles:
    """Write the pending single adds of a state into a file, merged with the last files that fill a tier.

    With `wholly`, all fresh files are merged into it. Thumbnails and offsets are merged only up to the first tier:
    thumbnails are large, and only a page that shows pictures opens these files. Without `counts` the caller counts
    the single adds.
    """
    if state.singles is None or state.identity is None:
        raise AssertionError("there is nothing to fold")
    files, fresh = files_of_singles(state), fresh_singles(state)
    merged = len(fresh) if wholly else _full_tiers(fresh)
    tables = [read_table(storage, file) for file in files[len(files) - merged :]]
    if state.pending:
        tables.append(table_of_singles(state.pending, state.identity))
    number = state.singles.segment
    paths = functools.partial(folded_path, number, version=state.version, nonce=lease.nonce)
    file = write_rows(storage, paths("entries"), pa.concat_tables(tables))
    thumbnails = thumbnails_of_singles(state.pending)
    sizes = [(single.id, 0, single.num_bytes) for single in state.pending if single.num_bytes is not None]
    ids, offsets, num_bytes = zip(*sizes, strict=True) if sizes else ((), (), ())
    beside = {
        "thumbnails": pa.table({"id": [*thumbnails], "jpeg": [*thumbnails.values()]}, schema=THUMBNAILS),
        "offsets": pa.table({"id": ids, "offset": offsets, "num_bytes": num_bytes}, schema=OFFSETS),
    }
    folded = {
        kind: _fold_beside(storage, files, beside[kind], paths(kind))
        for kind, files in files_beside_singles(state).items()
    }
    changed = None
    if counts:
        changed = changed_counts(storage, lease, state.version, state, count_singles(state.pending))
    return FoldSingles(segment=number, files=(*files[: len(files) - merged], file), **folded, counts=changed)


def _fold_beside(storage: Storage, files: list[RowsFile], pending: pa.Table, path: str) -> tuple[RowsFile, ...]:
    if not pending.num_rows:
        return tuple(files)
    kept = len(files) - _full_tiers(files, tiers=1)
    tables = [read_table(storage, file) for file in files[kept:]]
    return (*files[:kept], write_rows(storage, path, pa.concat_tables([*tables, pending])))


def _full_tiers(files: Sequence[RowsFile], tiers: int = len(TIER_ROWS)) -> int:
    """The number of last files to merge with the rows that are folded now."""
    merged = 0
    for below, most in list(zip(TIER_ROWS, FILES_A_TIER, strict=True))[:tiers]:
        small = 0
        while merged + small < len(files) and files[-1 - merged - small].rows < below:
            small += 1
        if small < most:
            break
        merged += small
    return merged

"""Reads every file that a version names: once, hashed, and checked by itself and against its plan.

Entries files are read in the order of their ids, and the files beside a shard's index when the first of its entries
come. They are let go when the last have passed. So memory holds a few shards' ids at a time, and of every file the
runs of its ids. A file whose bytes were altered is reported once and not checked further.
"""

import contextlib
import functools
import hashlib
import io
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DamagedFile, MissingFile, NotPermitted
from pipeline.progress import OnProgress, Progress
from pipeline.store.checks.findings import Finding, damage, not_looked_at
from pipeline.store.checks.id_runs import IdRuns
from pipeline.store.checks.inventory import Inventory
from pipeline.store.checks.row_checks import PlanPart, PlanRows, ShardSides
from pipeline.store.layout import Kind, kind_of
from pipeline.store.storage.file_refs import UNREADABLE, DigestsFile, FileRef, RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.kept_columns import KeptColumn, kept_in
from pipeline.store.tables.parquet_columns import read_rows_between
from pipeline.store.tables.schemas import (
    COUNTS,
    DIGESTS,
    LABEL_MAP,
    LABELS,
    OFFSETS,
    PLAN,
    REJECTED,
    THUMBNAILS,
    TOMBSTONES,
    embedding_matrix,
    entries_schema,
)

THREADS = 3  # hashing and reading release the GIL; more threads would hold more files in memory
MAPPED_BYTES = 64 << 20  # larger files, and files of an index, are memory-mapped instead of read
PLANS_OPEN = 8
FILES_AT_ONCE = 64  # entries files between two looks at which shards they need
MAX_NORM_ERROR = 0.01  # float16 has 11 significant bits: rounding moves the length of a unit vector by less than 0.001

_SCHEMAS = {
    "plan": PLAN,
    "rejected": REJECTED,
    "thumbnails": THUMBNAILS,
    "offsets": OFFSETS,
    "digests": DIGESTS,
    "counts": COUNTS,
    "tombstones": TOMBSTONES,
    "labels": LABELS,
    "map": LABEL_MAP,
}
_NONE = np.empty(0, np.int64)
_OF_THE_IDENTITY = {"entries", "shard vectors"}  # the check of these needs the encoder's identity


@dataclass(frozen=True)
class FileFacts:
    """The contents of an undamaged file that other checks need.

    `ids` are its ids in their order, `label_sets` the label sets in a file of labels, and `kept` the kept columns in a
    file of entries. `total` is the sum of a file of counts, and the sum of the ids in a file of digests.
    """

    ids: IdRuns
    label_sets: frozenset[str | None] = frozenset()
    kept: tuple[KeptColumn, ...] = ()
    total: int = 0

    @property
    def ids_N(self) -> np.ndarray:
        """The ids written out, int64 [N]."""
        return self.ids.ids_N


class Contents:
    """Reads the files of an inventory; afterwards `facts` has the contents of each undamaged file with ids, by path.

    `planned` are plans, by path, that are not read whole: each file is compared with those of their rows that have ids
    in its range (verify_steps.py).
    """

    def __init__(self, storage: Storage, inventory: Inventory, planned: Mapping[str, FileRef] | None = None) -> None:
        self._storage = storage
        self._inventory = inventory
        self._planned = planned or {}
        self._schema = entries_schema(inventory.identity) if inventory.identity else None
        self._open_plan = functools.lru_cache(PLANS_OPEN)(self._opened_plan)
        self._part_of_plan = functools.lru_cache(PLANS_OPEN)(self._part_read)
        self._shards = [ShardSides(shard) for shard in inventory.shards.values()]
        self._sides = {file.path: shard for shard in self._shards for file in shard.files}
        self._open: list[ShardSides] = []
        self._loading = threading.Lock()
        self.facts: dict[str, FileFacts] = {}
        self.broken: set[str] = set()

    def read(self, on_progress: OnProgress) -> Iterator[Finding]:
        """Read every file and yield what is wrong with it. Files that others are compared with come before them."""
        done, total = 0, len(self._inventory.files)
        with ThreadPoolExecutor(THREADS) as pool:
            for some in self._in_order():
                for findings in pool.map(self._checked, some):
                    yield from dict.fromkeys(findings)
                    done += 1
                    on_progress(Progress("verifying files", done, total))

    def _in_order(self) -> Iterator[list[FileRef]]:
        """Files to read at the same time. Those that follow may be compared with them."""
        files = sorted(self._inventory.files.values(), key=lambda file: file.path)
        kinds = {file.path: kind_of(file.path) for file in files}
        yield [file for file in files if kinds[file.path] == "plan"]
        entries = [file for file in files if kinds[file.path] == "entries" and isinstance(file, RowsFile)]
        entries.sort(key=lambda file: file.first_id)
        waiting = sorted(self._shards, key=lambda side: side.first_id, reverse=True)
        for start in range(0, len(entries), FILES_AT_ONCE):
            some = entries[start : start + FILES_AT_ONCE]
            self._close(some[0].first_id)
            last_id = max(file.last_id for file in some)
            while waiting and waiting[-1].first_id <= last_id:
                yield self._opening(waiting.pop())
            yield list(some)
        while waiting:
            self._close(waiting[-1].first_id)
            yield self._opening(waiting.pop())
        self._close(None)
        done = {*self._sides, *(file.path for file in entries)}
        yield [file for file in files if file.path not in done and kinds[file.path] != "plan"]

    def _opening(self, side: ShardSides) -> list[FileRef]:
        """The files beside the index of a shard, which entries are compared with from now on."""
        self._open.append(side)
        return [self._inventory.files[file.path] for file in side.files if self._sides[file.path] is side]

    def _close(self, first_id: int | None) -> None:
        """Let go of the shards whose last entries lie before an id (None: of all)."""
        for side in [side for side in self._open if first_id is None or side.last_id < first_id]:
            self._open.remove(side)
            side.close()
            for file in side.files:
                self._storage.release(file.path)

    def _checked(self, file: FileRef) -> list[Finding]:
        try:
            data = self._data(file)
            if hashlib.sha256(memoryview(data)).hexdigest() != file.sha256:
                raise DamagedFile("was altered: its bytes are not those that were written")
        except NotPermitted as error:
            self.broken.add(file.path)
            return [not_looked_at(error)]
        except DamagedFile as error:
            self.broken.add(file.path)
            return [damage(file.path, "is missing" if isinstance(error, MissingFile) else str(error))]
        try:
            return list(self._findings(file, kind_of(file.path), data))
        except UNREADABLE as error:
            self.broken.add(file.path)
            return [damage(file.path, f"cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})")]

    def _data(self, file: FileRef) -> pa.Buffer:
        if file.num_bytes > MAPPED_BYTES or file.path in self._sides:
            local = self._storage.local_path(file.path)
            found = local.stat().st_size
            data = pa.memory_map(str(local)).read_buffer() if found else pa.py_buffer(b"")
        else:
            data = pa.py_buffer(self._storage.read(file.path))
            found = data.size
        if found != file.num_bytes:
            raise DamagedFile(f"has {found:,} bytes where {file.num_bytes:,} were written")
        return data

    def _findings(self, file: FileRef, kind: Kind, data: pa.Buffer) -> Iterator[Finding]:
        if self._schema is None and kind in _OF_THE_IDENTITY:
            return  # the version that names it cannot be read, and has a finding of its own
        if file.path in self._sides:
            yield from (damage(file.path, what) for what in self._read_side(file, kind, data, self._sides[file.path]))
        elif kind == "entries":
            yield from self._read_entries(file, data)
        elif kind in _SCHEMAS:
            yield from (damage(file.path, what) for what in self._read_rows(file, kind, data))

    def _read_rows(self, file: FileRef, kind: str, data: pa.Buffer) -> Iterator[str]:
        columns = [name for name in _SCHEMAS[kind].names if name not in ("jpeg", "num_bytes", "modified")]
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as parquet:
            found = parquet.schema_arrow
            if not (found.equals(_SCHEMAS[kind]) or (kind == "plan" and kept_in(found, PLAN))):
                yield "has other columns than such a file has"
                return
            rows = parquet.metadata.num_rows
            if kind in ("counts", "digests"):
                yield from self._read_side_table(file, kind, parquet.read())
            elif kind == "map":
                labels = parquet.read(["label"])["label"]
                if pc.count_distinct(labels).as_py() != rows:
                    yield "maps a label twice"
            else:
                ids_N, names = np.empty(rows, np.int64), set[str | None]()
                for start, table in _row_groups(parquet, columns):
                    ids_N[start : start + table.num_rows] = table["id"].to_numpy()
                    if kind == "labels":
                        names |= set(pc.unique(table["label_set"]).to_pylist())
                    if kind == "rejected":
                        yield from self._against_plans(file, table, table["id"].to_numpy(), ["uri"])
                if kind != "labels":
                    yield from _check_ids(file, ids_N)
                self.facts[file.path] = FileFacts(IdRuns.of(ids_N), frozenset(names))
        if rows != file.rows:
            yield f"has {rows:,} rows where versions tell of {file.rows:,}"

    def _read_side_table(self, file: FileRef, kind: str, rows: pa.Table) -> Iterator[str]:
        rows.validate(full=True)
        if kind == "counts":
            self.facts[file.path] = FileFacts(IdRuns.of(_NONE), total=pc.sum(rows["count"]).as_py() or 0)
            return
        digests_N = rows["digest"].to_numpy()
        if len(digests_N) > 1 and (digests_N[1:] < digests_N[:-1]).any():
            yield "has digests that do not ascend"
        elif isinstance(file, DigestsFile) and [*digests_N[:1], *digests_N[-1:]] != [file.first, file.last]:
            yield "has other digests than versions tell of"
        self.facts[file.path] = FileFacts(IdRuns.of(_NONE), total=IdRuns.of(np.sort(rows["id"].to_numpy())).total())

    def _read_entries(self, file: FileRef, data: pa.Buffer) -> Iterator[Finding]:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as parquet:
            found, wanted = parquet.schema_arrow, self._schema
            kept = kept_in(found, wanted) if wanted is not None else None
            if wanted is None or kept is None:
                yield damage(file.path, "has other columns than entries of this memory have")
                return
            told = {key: (found.metadata or {}).get(key) for key in wanted.metadata}
            if told != wanted.metadata:
                yield damage(file.path, "holds vectors of another encoder than the memory's")
            ids_N = np.empty(parquet.metadata.num_rows, np.int64)
            for start, table in _row_groups(parquet, None):
                ids_N[start : start + table.num_rows] = table["id"].to_numpy()
                yield from self._check_entries(file, table)
        for what in _check_ids(file, ids_N):
            yield damage(file.path, what)
        if len(ids_N) != file.rows:
            yield damage(file.path, f"has {len(ids_N):,} rows where versions tell of {file.rows:,}")
        self.facts[file.path] = FileFacts(IdRuns.of(ids_N), kept=kept)

    def _check_entries(self, file: FileRef, table: pa.Table) -> Iterator[Finding]:
        """Check one row group of an entries file."""
        ids_N, vectors_ND = table["id"].to_numpy(), embedding_matrix(table["embedding"])
        wrong = off_unit(vectors_ND)
        if len(wrong):
            what = f"has {len(wrong):,} vectors that are not of unit length, the first of entry {ids_N[wrong[0]]}"
            yield damage(file.path, what)
        for name in ("uri", "dataset"):
            if pc.any(pc.equal(table[name], "")).as_py():
                yield damage(file.path, f"has entries without a {name}")
        if len(ids_N) and (np.diff(ids_N) > 0).all():  # else there is a finding, and rows cannot be looked up by id
            for what in self._against_plans(file, table, ids_N, ["uri", "label"]):
                yield damage(file.path, what)
            for shard in self._open:
                yield from shard.differences(table, ids_N, vectors_ND)

    def _against_plans(self, file: FileRef, table: pa.Table, ids_N: np.ndarray, columns: list[str]) -> Iterator[str]:
        for number in np.unique(ids_N >> 39).tolist():
            for path in self._inventory.plans.get(number, ()):
                if path in self.facts:
                    yield from self._open_plan(path).differences(table, ids_N, columns)
                elif path in self._planned and isinstance(file, RowsFile):
                    with contextlib.suppress(DamagedFile):  # it was whole before; whoever dropped it has its version
                        part = self._part_of_plan(path, file.first_id, file.last_id)
                        yield from part.differences(table, ids_N, columns)

    def _part_read(self, path: str, first_id: int, last_id: int) -> PlanPart:
        columns = ["id", "uri", "label"]
        return PlanPart(read_rows_between(self._storage, self._planned[path], first_id, last_id, columns))

    def _opened_plan(self, path: str) -> PlanRows:
        file = self._inventory.files[path]
        return PlanRows(self._data(file), self.facts[path].ids_N)

    def _read_side(self, file: FileRef, kind: str, data: pa.Buffer, side: ShardSides) -> Iterator[str]:
        """Read and check one of the files beside a shard's FAISS index."""
        if kind == "shard ids":
            side.ids_N = self._array(data)
            self.facts[file.path] = FileFacts(IdRuns.of(side.ids_N))
            rows = len(side.ids_N)
            if (np.diff(side.ids_N) <= 0).any():
                yield "has ids that do not ascend"
                side.ids_N = None
        elif kind == "shard vectors":
            identity = self._inventory.identity
            dimension = identity.dimension if identity else 0
            side.vectors_ND = np.frombuffer(data, np.float16).reshape(-1, dimension)
            rows = len(side.vectors_ND)
        elif kind == "shard labels":
            side.codes_N = self._array(data)
            rows = len(side.codes_N)
        else:
            entries = pa.ipc.open_file(pa.BufferReader(data)).read_all()
            entries.validate(full=True)
            side.entries, rows = entries, entries.num_rows
        if not rows == file.rows == side.shard.rows:
            yield f"has {rows:,} rows where versions tell of {file.rows:,}, and {side.shard.rows:,} in the shard"

    def _array(self, data: pa.Buffer) -> np.ndarray:
        with self._loading:  # NumPy parses the header with ast, which is not thread-safe in Python 3.11
            array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
        return array


def off_unit(vectors_ND: np.ndarray) -> np.ndarray:
    """The row numbers (int64 [M]) of vectors (float16 [N, D]) that are not finite or not of unit length."""
    norms_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float32))
    return np.flatnonzero(~(np.abs(norms_N - 1) < MAX_NORM_ERROR))


def _check_ids(file: FileRef, ids_N: np.ndarray) -> Iterator[str]:
    if (np.diff(ids_N) <= 0).any():
        yield "has ids that do not ascend"
    elif isinstance(file, RowsFile) and (not len(ids_N) or (ids_N[0], ids_N[-1]) != (file.first_id, file.last_id)):
        yield f"has other ids than the {file.first_id} to {file.last_id} that versions tell of"


def _row_groups(parquet: pq.ParquetFile, columns: list[str] | None) -> Iterator[tuple[int, pa.Table]]:
    start = 0
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, columns=columns)
        yield start, table
        start += table.num_rows

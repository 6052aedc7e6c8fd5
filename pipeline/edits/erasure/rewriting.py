"""The steps of an erasure: other entries compared, files written without erased rows, shards written anew.

A step works on a few files and can be done by any process. Nothing is committed here.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.edits.erasure.all_versions import may_hold
from pipeline.edits.erasure.values import Values, in_batches
from pipeline.errors import VisualMemoryError
from pipeline.index.search.shard_files import files_covered, shard_ids, without_entries
from pipeline.steps import PROCESS_BYTES, Step
from pipeline.store.layout import kind_of, rewritten_path, rewritten_shard_folder
from pipeline.store.log.erasure_plan import Rewritten
from pipeline.store.log.records import Index, Shard
from pipeline.store.storage.file_refs import DigestsFile, FileRef, RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.digest_files import write_digests
from pipeline.store.tables.ids import is_in
from pipeline.store.tables.parquet_columns import read_columns_of
from pipeline.store.tables.row_groups import chosen_row_groups, write_some_rows
from pipeline.store.tables.schemas import read_table

FILES_A_STEP = 16  # rewritten
FILES_COMPARED = 64  # in a step
ROW_GROUP_BYTES = 64 << 20  # of a file that is rewritten, decoded, at most

Entry = tuple[int, str, str]  # id, uri, sha256


@dataclass(frozen=True)
class Comparer:
    """Finds the entries that have one of some uris or hashes."""

    storage: Storage
    uris: frozenset[str]
    hashes: frozenset[str]

    @cached_property
    def _values(self) -> tuple[Values, Values]:
        return Values(self.uris), Values(self.hashes)

    def steps(self, files: Sequence[FileRef]) -> Iterator[Step]:
        """Steps over entries files. The result of each is a list of Entry."""
        for number, start in enumerate(range(0, len(files), FILES_COMPARED)):
            some = tuple(files[start : start + FILES_COMPARED])
            yield Step(number, partial(self.same_in, some), PROCESS_BYTES + 2 * max(file.num_bytes for file in some))

    def same_in(self, files: Sequence[FileRef]) -> list[Entry]:
        """The entries of some files. Reads three columns, several files at once. Raises DamagedFile."""
        found: list[Entry] = []
        for table in in_batches(
            read_columns_of(self.storage, files, ["id", "uri", "sha256"]), max(map(len, self._values))
        ):
            by_uri, by_hash = (
                values.found_in(table.column(name))
                for values, name in zip(self._values, ("uri", "sha256"), strict=True)
            )
            found += [
                (row["id"], row["uri"], row["sha256"]) for row in table.filter(pc.or_(by_uri, by_hash)).to_pylist()
            ]
        return found


@dataclass(frozen=True)
class Rewriter:
    """Writes files without the rows of erased entries (ids int64 [N] ascending).

    `uris` are those that only erased entries have; plans and rejects are searched for them too. `digests_N` (uint64)
    are the digests of the uris and hashes of erased entries.
    """

    storage: Storage
    nonce: str
    ids_N: np.ndarray
    uris: frozenset[str]
    digests_N: np.ndarray

    @cached_property
    def _own_uris(self) -> Values:
        return Values(self.uris)

    def may_change(self, file: FileRef) -> bool:
        """Whether a file may hold erased rows, judged without reading it."""
        if isinstance(file, DigestsFile):
            return bool(((self.digests_N >= file.first) & (self.digests_N <= file.last)).any())
        return self._by_uri(file) or may_hold(file, self.ids_N)

    def steps(self, files: Sequence[FileRef], first_number: int) -> Iterator[Step]:
        """Steps over files, whose new names are counted from `first_number` on.

        The result of each is a list of the path of a file that had erased rows and what took its place.
        """
        for number, start in enumerate(range(0, len(files), FILES_A_STEP)):
            some = tuple(files[start : start + FILES_A_STEP])
            yield Step(number, partial(self.rewritten, some, first_number + start), PROCESS_BYTES + ROW_GROUP_BYTES)

    def rewritten(self, files: Sequence[FileRef], first_number: int) -> list[tuple[str, Rewritten]]:
        """Rewrite those of some files that hold erased rows. If it fails, what it has written is removed."""
        made: list[tuple[str, Rewritten]] = []
        try:
            for number, file in enumerate(files, first_number):
                rewritten = self._rewritten(file, number)
                if rewritten is not None:
                    made.append((file.path, rewritten))
        except BaseException:
            with contextlib.suppress(VisualMemoryError, OSError):  # files that remain are garbage
                self.storage.delete([rewritten.by.path for _, rewritten in made if rewritten.by is not None])
            raise
        return made

    def _by_uri(self, file: FileRef) -> bool:
        return kind_of(file.path) in ("plan", "rejected") and bool(self.uris)

    def _rewritten(self, file: FileRef, number: int) -> Rewritten | None:
        """Write the file without the erased rows, one row group at a time; None if it holds none of them.

        Only row groups whose statistics allow an erased id or uri are read. From an object store only the columns
        searched are fetched, unless the file must be written anew.
        """
        path = rewritten_path(file.path, self.nonce, number)
        if isinstance(file, DigestsFile):
            return self._digests_rewritten(file, path)
        by_uri, own = self._by_uri(file), self._own_uris

        def gone(table: pa.Table) -> pa.ChunkedArray:
            gone_N = pa.array(is_in(table.column("id").to_numpy(), self.ids_N))
            return pc.or_(gone_N, own.found_in(table.column("uri"))) if by_uri else pa.chunked_array([gone_N])

        wanted: dict[str, Sequence[Any]] = {"id": self._ids_in_order}
        wanted |= {"uri": own.in_order} if by_uri else {}
        lost: list[int] = []
        for table in chosen_row_groups(self.storage, file, [*wanted], wanted=wanted):
            lost += table.column("id").filter(gone(table)).to_pylist()
        if not lost:
            return None
        by = write_some_rows(self.storage, file, path, lambda table: pc.invert(gone(table)))
        return Rewritten(by=by, ids=tuple(lost))

    @cached_property
    def _ids_in_order(self) -> list[int]:
        found: list[int] = self.ids_N.tolist()
        return found

    def _digests_rewritten(self, file: DigestsFile, path: str) -> Rewritten | None:
        """Write a file of digests without the erased rows; None if it holds none of them."""
        table = read_table(self.storage, file)
        gone = pa.array(is_in(table.column("id").to_numpy(), self.ids_N))
        if not pc.any(gone).as_py():
            return None
        left = table.filter(pc.invert(gone))
        by = write_digests(self.storage, path, left) if left.num_rows else None
        return Rewritten(by=by, ids=tuple(table.column("id").filter(gone).to_pylist()))


@dataclass(frozen=True)
class ShardRewriter:
    """Writes shards of the index in use without erased entries (ids int64 [N] ascending)."""

    storage: Storage
    nonce: str
    ids_N: np.ndarray
    index: Index | None
    dimension: int

    def steps(self, shards: Sequence[Shard], files: Sequence[RowsFile]) -> Iterator[Step]:
        """A step for each shard; `files` are the entries files of the version. See `anew`."""
        index = self.index.model_copy(update={"shards": ()}) if self.index is not None else None
        current = {shard.ids.path for shard in self.index.shards} if self.index is not None else set()
        for number, shard in enumerate(shards):
            used = index if shard.ids.path in current else None
            covered = tuple(files_covered(shard, files)) if used is not None else ()
            work = ShardRewriter(self.storage, self.nonce, self.ids_N, used, self.dimension)
            read = (shard.ids, shard.labels, shard.entries, shard.index)
            num_bytes = 3 * sum(file.num_bytes for file in read if file is not None)
            yield Step(number, partial(work.anew, shard, covered), PROCESS_BYTES + num_bytes)

    def anew(self, shard: Shard, files: Sequence[RowsFile]) -> tuple[bool, Shard | None]:
        """Whether a shard holds erased entries, and the shard that takes its place.

        None if it holds none, if no row is left, or if the shard is of an older index, which is then given up.
        """
        if not is_in(shard_ids(self.storage, shard), self.ids_N).any():
            return False, None
        if self.index is None:
            return True, None
        folder = rewritten_shard_folder(shard.ids.path, self.nonce)
        return True, without_entries(self.storage, folder, self.index, shard, self.dimension, self.ids_N, files)

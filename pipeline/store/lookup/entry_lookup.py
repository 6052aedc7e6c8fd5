"""Finds the live entries of a version by id, uri, label or dataset, in the files that hold them. Opens no index.

A question about ids reads the row groups that may hold them: from an object store a footer, and the named columns of
one row group for each file, several files at once. A question about a label or a dataset reads a footer, and where it
may be one column, of the files whose segments can have it.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DamagedFile
from pipeline.store.log.label_counts import by_dataset, by_label, count_singles
from pipeline.store.log.state import State
from pipeline.store.storage.file_ranges import FileRanges
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.counts import added, counted, read_counts
from pipeline.store.tables.digest_files import DigestOf, digests_in, digests_of_uris, ids_with
from pipeline.store.tables.ids import SEGMENT_SHIFT, is_in
from pipeline.store.tables.labels import newest_labels, own_labels_of, read_label_map, read_label_rows
from pipeline.store.tables.parquet_columns import files_around, ids_where_of, read_columns_of, read_rows_of
from pipeline.store.tables.tombstones import Tombstones

_NONE = np.empty(0, np.int64)
_TYPES = {"id": pa.int64(), "width": pa.int32(), "height": pa.int32()}  # of stored columns; the others are strings


class EntryLookup:
    """The entries of a version, by name. Every method raises DamagedFile if a file that it reads is damaged."""

    def __init__(self, storage: Storage, state: State) -> None:
        self._storage = storage
        self._state = state
        self._files = FileRanges(state.entries_files())
        self._pending = {single.id: single for single in state.pending}
        self._tombstones = Tombstones(storage, state.tombstones)

    def unknown(self, ids: Iterable[int]) -> int | None:
        """The first of these ids that is not a live entry, or None."""
        wanted = [int(entry_id) for entry_id in ids]
        for entry_id in wanted:
            if not 0 <= entry_id < 1 << 63:
                return entry_id
        known_N = self.contains(np.array(wanted, np.int64))
        return None if known_N.all() else wanted[int(known_N.argmin())]

    def contains(self, ids_N: np.ndarray) -> np.ndarray:
        """Which of some ids (int64 [N]) are live entries, bool [N]."""
        known_N = np.isin(ids_N, [*self._pending])
        asked_N = ids_N[~known_N]
        held = self._held_by(asked_N)
        there = [_NONE, *(held_N for file, held_N in held if file.has_every_id)]
        with_holes = [(file, held_N, ["id"]) for file, held_N in held if not file.has_every_id]
        there += [table["id"].to_numpy() for table in read_rows_of(self._storage, with_holes)]
        known_N |= np.isin(ids_N, np.concatenate(there))
        if known_N.any():
            known_N[known_N] = ~self._tombstones.contains(ids_N[known_N])
        return known_N

    def fields(self, ids_N: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Stored columns of some entries, forgotten ones included, in the order of `ids_N` (int64 [N]).

        The column `id` comes first. Raises DamagedFile also for an id that no file holds.
        """
        table = pa.concat_tables(self._held_fields(ids_N, columns))
        at = pc.index_in(pa.array(ids_N, pa.int64()), value_set=table["id"].combine_chunks())
        if at.null_count:
            missing = ids_N[at.is_null().to_numpy(zero_copy_only=False)][0]
            raise DamagedFile(f"entry {missing} of the memory at {self._storage.uri} is in no file: run `verify`")
        return table.take(at)

    def _held_fields(self, ids_N: np.ndarray, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The column `id` and stored columns of those of some entries that the version has, file by file."""
        names = ["id", *columns]
        singles = [self._pending[entry_id] for entry_id in ids_N.tolist() if entry_id in self._pending]
        schema = pa.schema([(name, _TYPES.get(name, pa.string())) for name in names])
        yield pa.table({name: [getattr(single, name) for single in singles] for name in names}, schema=schema)
        in_files_N = ids_N[~np.isin(ids_N, [*self._pending])] if self._pending else ids_N
        asked = [(file, held_N, names) for file, held_N in self._held_by(in_files_N)]
        yield from (table.cast(schema) for table in read_rows_of(self._storage, asked))

    def labels(self, ids_N: np.ndarray) -> pa.Array:
        """The labels that some entries have now (null: none), in the order of `ids_N` (int64 [N])."""
        return self.datasets_and_labels(ids_N)["label"].combine_chunks()

    def datasets_and_labels(self, ids_N: np.ndarray) -> pa.Table:
        """The datasets of some entries and the labels that they have now, in the order of `ids_N` (int64 [N])."""
        stored = self.fields(ids_N, ["dataset", "label"])
        labels = self._relabelled(ids_N, stored["label"])
        return pa.table({"dataset": stored["dataset"], "label": labels})

    def own_labels(self, ids_N: np.ndarray, label_set: str) -> Mapping[int, str | None]:
        """The labels in a label set that some entries have of their own, without its map, by id."""
        own = own_labels_of(self._storage, self._state.labels, ids_N, label_set)
        return dict(zip(own.ids_N.tolist(), own.labels.to_pylist(), strict=True))

    def labels_in(self, label_set: str, ids_N: np.ndarray) -> list[str | None]:
        """The labels that some entries have in a label set, in the order of `ids_N` (int64 [N]); None: no label."""
        mapped, own = self._map_of(label_set), self.own_labels(ids_N, label_set)
        stored = self.labels(ids_N).to_pylist()
        return [own.get(i, mapped.get(label or "")) for i, label in zip(ids_N.tolist(), stored, strict=True)]

    def counts_of(self, ids_N: np.ndarray, sign: int = 1) -> pa.Table:
        """Rows of counts of some entries, by dataset and by the label they have now, multiplied by `sign`.

        Entries that the version does not have, because an erasure or a rollback came first, are not counted.
        """
        return self._counted(self._held_fields(ids_N, ["dataset", "label"]), sign)

    def matching(self, *, uri: str | None = None, label: str | None = None, dataset: str | None = None) -> np.ndarray:
        """Ids of the live entries with this uri, label or dataset (one of them), int64 [N] ascending."""
        if uri is not None:
            return np.sort(self.with_uris([uri])[1])
        if label is not None:
            return self._labelled(label)
        return self._of_dataset(str(dataset))

    def _labelled(self, label: str) -> np.ndarray:
        """Ids of the live entries that have a label now, int64 [N] ascending.

        Reads the rows of the overlay with the label, then the column of stored labels in the row groups that may hold
        it, of the files whose datasets have such entries by the counts. If labels ascend from file to file, as those of
        folders do, it asks for the footers of a few files of each segment: once it has found as many entries as the
        counts say, there are no others. Without counts all files are asked.
        """
        overlay = [(file, [label], ["id", "label"]) for file in self._state.labels if file.rows]
        given = [rows["id"].to_numpy() for rows in read_rows_of(self._storage, overlay, key="label")]
        given_N = np.unique(np.concatenate([_NONE, *given]))
        now = own_labels_of(self._storage, self._state.labels, given_N, None)
        given_N = now.ids_N[pc.fill_null(pc.equal(now.labels, label), False).to_numpy(zero_copy_only=False)]
        given_N = given_N[self.contains(given_N)]
        if self._state.known_counts is None:
            return np.union1d(self._unchanged(self._files.files, label), given_N)
        counts = self.counts()
        counts = counts.filter(pc.equal(counts["label"], label))
        expected = by_label(counts).get(label, 0) - len(given_N)
        near = self._files_with({*by_dataset(counts)})
        stored_N = self._unchanged(self._likely(near, label) if expected else [], label)
        if len(stored_N) != expected:
            stored_N = self._unchanged(near, label)
        return np.union1d(stored_N, given_N)

    def _unchanged(self, files: Sequence[RowsFile], label: str) -> np.ndarray:
        """Ids of the live entries in some files that were stored with a label and not given one since, ascending."""
        stored_N = self._stored("label", label, files)
        own_N = own_labels_of(self._storage, self._state.labels, stored_N, None).ids_N
        return stored_N[~is_in(stored_N, own_N)]

    def _likely(self, files: Sequence[RowsFile], label: str) -> list[RowsFile]:
        """Those of some files that hold a label if labels ascend in the files of each segment."""
        of_segments = itertools.groupby(files, lambda file: file.first_id >> SEGMENT_SHIFT)
        return [file for _, group in of_segments for file in files_around(self._storage, [*group], "label", label)]

    def _of_dataset(self, dataset: str) -> np.ndarray:
        """Ids of the live entries of a dataset, int64 [N] ascending.

        Files of which every entry has the dataset, as all entries of a segment but single adds do, are not read.
        """
        mixed = {file.path for file in self._files_of([s.number for s in self._state.segments if s.dataset != dataset])}
        near = self._files_with({dataset})
        whole = [file for file in near if file.has_every_id and file.path not in mixed]
        asked = [file for file in near if not (file.has_every_id and file.path not in mixed)]
        in_whole = (np.arange(file.first_id, file.last_id + 1) for file in whole)
        return self._stored("dataset", dataset, asked, in_whole)

    def _files_with(self, datasets: Collection[str]) -> list[RowsFile]:
        """The files of segments that may have entries of these datasets."""
        segments = self._state.segments
        return self._files_of([s.number for s in segments if not s.dataset or s.dataset in datasets])

    def _stored(
        self, column: str, value: str, files: Sequence[RowsFile], beside: Iterable[np.ndarray] = ()
    ) -> np.ndarray:
        """Ids of the live entries with a stored value in some files, in `beside`, or not yet in a file; ascending."""
        found = [_NONE, *beside, *ids_where_of(self._storage, files, column, value)]
        found.append(np.array([i for i, single in self._pending.items() if getattr(single, column) == value], np.int64))
        ids_N = np.unique(np.concatenate(found))
        live_N: np.ndarray = ids_N[~self._tombstones.contains(ids_N)]
        return live_N

    def with_uris(self, uris: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The live entries with any of these uris: positions in `uris` and ids, int64 [N] each, in no order.

        Costs a footer and a row group for each segment and uri, and as much for each entry found. Single adds, and
        segments of older releases, have no digests: the uris of their entries are read.
        """
        return self._with("uri", uris, digests_of_uris(uris))

    def with_sha256s(self, sha256s: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The live entries whose image files have these hashes: positions in `sha256s` and ids, as `with_uris`."""
        return self._with("sha256", sha256s, digests_in(pa.array(sha256s, pa.string())))

    def _with(self, of: DigestOf, names: Sequence[str], digests_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wanted = pa.array(names, pa.string())
        files_of = {s.number: s.uris if of == "uri" else s.sha256s for s in self._state.segments}
        ids_N = ids_with(self._storage, (file for files in files_of.values() for file in files), digests_N)
        ids_N = ids_N[self.contains(ids_N)]
        scanned = [number for number, files in files_of.items() if not files]
        files = self._files_of(scanned)
        tables = itertools.chain(
            [self.fields(ids_N, [of])],
            self._live_of(files, read_rows_of(self._storage, [(file, names, ["id", of]) for file in files], key=of)),
            self._live_pending(["id", of]),
        )
        positions, ids = [_NONE], [_NONE]
        for number, table in enumerate(tables):
            at = pc.index_in(table[of], value_set=wanted)
            rows_N = np.flatnonzero(at.is_valid().to_numpy())
            held_N = table["id"].to_numpy()[rows_N]
            new = np.isin(held_N >> SEGMENT_SHIFT, scanned) if number else slice(None)
            positions.append(at.take(pa.array(rows_N)).to_numpy().astype(np.int64)[new])
            ids.append(held_N[new])
        return np.concatenate(positions), np.concatenate(ids)

    def _files_of(self, segments: Sequence[int]) -> list[RowsFile]:
        """The files that may hold entries of these segments."""
        numbers = np.array(sorted(segments), np.int64)
        first_F, last_F = self._files.first_F >> SEGMENT_SHIFT, self._files.last_F >> SEGMENT_SHIFT
        held_F = np.searchsorted(numbers, first_F) < np.searchsorted(numbers, last_F, side="right")
        return [self._files.files[at] for at in np.flatnonzero(held_F).tolist()]

    def known_labels(self) -> list[str]:
        """The labels that live entries have, ascending."""
        return [*by_label(self.counts())]

    def known_datasets(self) -> list[str]:
        """The datasets that live entries have, ascending."""
        return [*by_dataset(self.counts())]

    def counts(self) -> pa.Table:
        """The numbers of live entries by dataset and label, as rows of counts.

        Reads the files of counts of the version: a row for each dataset and label, and for each change since they were
        folded. A version of an older release, or one that an erasure has redacted, has none: then the columns `id`,
        `label` and `dataset` of all entries are read.
        """
        files = self._state.known_counts
        if files is not None:
            return added([read_counts(self._storage, files), count_singles(self._state.pending)])
        return self._counted(self._scanned(["label", "dataset"]))

    def num_labels(self, label_set: str | None = None) -> int:
        """The number of labels that live entries have in a label set (None: as stored), which the version has.

        Besides the counts, reads the labels of all entries that have a label of their own in the set.
        """
        if label_set is None:
            return len(by_label(self.counts()))
        mapped = self._map_of(label_set)
        counts = Counter[str]()
        for label, number in by_label(self.counts()).items():
            counts[mapped.get(label, "")] += number
        own = newest_labels(read_label_rows(self._storage, self._state.labels), label_set)
        live_N = self.contains(own.ids_N)
        counts.subtract(mapped.get(label, "") for label in self.labels(own.ids_N[live_N]).to_pylist())
        counts.update(label for label in own.labels.filter(pa.array(live_N)).to_pylist() if label is not None)
        return sum(number > 0 for label, number in counts.items() if label)

    def _counted(self, tables: Iterable[pa.Table], sign: int = 1) -> pa.Table:
        """Rows of counts of entries with the columns `id`, `dataset` and `label`, by the labels that they have now."""
        return added(
            counted(table["dataset"], self._relabelled(table["id"].to_numpy(), table["label"]), sign)
            for table in tables
        )

    def _relabelled(self, ids_N: np.ndarray, stored: pa.ChunkedArray | pa.Array) -> pa.Array:
        """The labels that entries have now, from their labels as stored."""
        labels = stored.combine_chunks() if isinstance(stored, pa.ChunkedArray) else stored
        labels = labels.cast(pa.string())
        own = own_labels_of(self._storage, self._state.labels, ids_N, None)
        if not len(own.ids_N):
            return labels
        at = pc.index_in(pa.array(ids_N, pa.int64()), value_set=pa.array(own.ids_N))
        return pc.if_else(pc.is_valid(at), own.labels.take(at), labels)

    def _map_of(self, label_set: str) -> Mapping[str, str]:
        """The map of a label set; empty if it has none, or the version has no such set."""
        files = [known.map for known in self._state.label_sets if known.name == label_set]
        return read_label_map(self._storage, files[0]) if files and files[0] is not None else {}

    def _held_by(self, ids_N: np.ndarray) -> list[tuple[RowsFile, np.ndarray]]:
        """The files that may hold some of the ids, each with those ids, ascending."""
        sorted_N = np.unique(ids_N)
        return [(file, sorted_N[here]) for file, here in self._files.holding(sorted_N)]

    def _scanned(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The columns `id` and `columns` of all live entries, file by file."""
        names, files = ["id", *columns], self._files.files
        yield from self._live_of(files, read_columns_of(self._storage, files, names))
        yield from self._live_pending(names)

    def _live_of(self, files: Sequence[RowsFile], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for file, table in zip(files, tables, strict=True):
            yield self._live(table, self._tombstones.between(file.first_id, file.last_id))

    def _live_pending(self, names: Sequence[str]) -> Iterator[pa.Table]:
        if self._pending:
            singles = self._pending.values()
            table = pa.table({name: pa.array([getattr(single, name) for single in singles]) for name in names})
            yield self._live(table, self._tombstones.between(min(self._pending), max(self._pending)))

    @staticmethod
    def _live(table: pa.Table, forgotten_N: np.ndarray) -> pa.Table:
        if not len(forgotten_N):
            return table
        return table.filter(pa.array(~is_in(table["id"].to_numpy(), forgotten_N)))


def num_live_fresh(storage: Storage, state: State) -> int:
    """The number of live entries that no shard covers. Reads the tombstones among them. Raises DamagedFile."""
    if state.index is None:
        return state.num_live
    spans: list[tuple[int, int]] = []
    fresh, before = {file.path for file in state.fresh_files()}, False
    for file in state.entries_files():
        if file.path in fresh:
            spans[len(spans) - before :] = [(spans[-1][0] if before else file.first_id, file.last_id)]
        before = file.path in fresh
    if state.pending:
        spans.append((state.pending[0].id, state.pending[-1].id))
    tombstones = Tombstones(storage, state.tombstones)
    return state.num_fresh - sum(len(tombstones.between(*span)) for span in spans)

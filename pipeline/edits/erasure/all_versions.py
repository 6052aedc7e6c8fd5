"""The entries of all retained versions, including forgotten entries and entries of older versions.

What is asked about all entries is answered from single columns of one file at a time: neither RAM nor an Arrow column
holds the names of a whole memory.
"""

import base64
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.edits.erasure.values import Values, in_batches
from pipeline.store.checks.inventory import Inventory
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.file_refs import FileRef, RowsFile
from pipeline.store.tables.counts import added, counted
from pipeline.store.tables.ids import is_in, within
from pipeline.store.tables.kept_columns import FIXED, as_text
from pipeline.store.tables.labels import OwnLabels, newest_labels, read_label_rows
from pipeline.store.tables.parquet_columns import read_columns_of
from pipeline.store.tables.row_groups import chosen_row_groups
from pipeline.store.tables.schemas import embedding_matrix
from pipeline.store.values import MAX_INT64

Column = Literal["label", "dataset"]


@dataclass(frozen=True)
class Duplicate:
    """An entry that remains and shares the uri, hash or vector of a forgotten one; `same` says which of them."""

    id: int
    uri: str
    same: str


@dataclass(frozen=True)
class EntryFacts:
    """The fields of some entries, row by row: ids int64 [N] ascending, vectors float16 [N, D].

    `kept` has the values of these entries by kept column, as texts.
    """

    ids_N: np.ndarray
    uris: tuple[str, ...]
    hashes: tuple[str, ...]
    labels: tuple[str | None, ...]
    datasets: tuple[str, ...]
    vectors_ND: np.ndarray
    kept: Mapping[str, set[str]] = field(default_factory=dict)


def facts_of(log: VersionLog, inventory: Inventory, ids_N: np.ndarray) -> EntryFacts:
    """The fields of these entries (ids int64 [N] ascending), from the versions of the inventory. Raises DamagedFile.

    Reads the files whose range of ids has one of them, one row group at a time. RAM grows with the entries asked for.
    """
    found: dict[int, tuple[str, str, str | None, str, np.ndarray]] = {}
    kept: dict[str, set[str]] = {}
    files = [file for file in inventory.of_kind("entries") if may_hold(file, ids_N)]
    for table in (table for file in files for table in chosen_row_groups(log.storage, file, hashed=True)):
        here_N = is_in(table.column("id").to_numpy(), ids_N)
        if not here_N.any():
            continue
        chosen = table.filter(pa.array(here_N))
        for name in chosen.column_names[len(FIXED) :]:
            kept.setdefault(name, set()).update(as_text(chosen.column(name).drop_null()).to_pylist())
        columns = [chosen.column(name).to_pylist() for name in ("id", "uri", "sha256", "label", "dataset")]
        for entry, vector in zip(zip(*columns, strict=True), embedding_matrix(chosen.column("embedding")), strict=True):
            found[entry[0]] = (*entry[1:], vector.copy())
    for single in (inventory.singles[i] for i in ids_N.tolist() if i in inventory.singles):
        vector_D = np.frombuffer(base64.b64decode(single.embedding), "<f2")
        found[single.id] = (single.uri, single.sha256, single.label, single.dataset, vector_D)
    known = {entry_id: found[entry_id] for entry_id in ids_N.tolist() if entry_id in found}
    if not known:
        return EntryFacts(ids_N[:0], (), (), (), (), np.empty((0, 0), np.float16))
    uris, hashes, labels, datasets, vectors = zip(*known.values(), strict=True)
    return EntryFacts(np.array(list(known), np.int64), uris, hashes, labels, datasets, np.stack(vectors), kept)


def may_hold(file: FileRef, ids_N: np.ndarray) -> bool:
    """Whether a file may have rows with any of these ids (int64 [N] ascending), judged by its range of ids."""
    if not isinstance(file, RowsFile):
        return True
    at = int(np.searchsorted(ids_N, file.first_id))
    return at < len(ids_N) and bool(ids_N[at] <= file.last_id)


class Catalogue:
    """The uri, newest label and dataset of every entry of every version, forgotten entries included.

    Nothing of the entries is held: a method reads the columns that it needs from one file after the other, each entry
    once. Names that will be asked for are best given at the start: then all of them are found in one pass.
    RAM holds the single adds of all versions and the corrected labels.
    """

    def __init__(self, log: VersionLog, state: State, *, labels: Sequence[str] = (), datasets: Sequence[str] = ()):
        inventory = Inventory.of(log, last=state.version)
        self._storage = log.storage
        self._singles = sorted(inventory.singles.values(), key=lambda single: single.id)
        self._single_ids_N = np.array([single.id for single in self._singles], np.int64)
        self._files = sorted(inventory.of_kind("entries"), key=_first_id)
        self._own = newest_labels(read_label_rows(log.storage, state.labels), None)
        self._asked: dict[Column, set[str]] = {"label": {*labels}, "dataset": {*datasets}}
        self._known: dict[Column, tuple[Counter[str], dict[str, np.ndarray]]] = {}

    def unknown(self, ids: Iterable[int]) -> int | None:
        """The first of these ids that no version holds, or None. Reads only files that may hold one of them."""
        given = [int(entry_id) for entry_id in ids]
        for entry_id in given:
            if not 0 <= entry_id <= MAX_INT64:
                return entry_id
        wanted_N = np.unique(np.array(given, np.int64)) if given else np.empty(0, np.int64)
        known_N = is_in(wanted_N, self._single_ids_N)
        files = [file for file in self._files if may_hold(file, wanted_N)]
        for table in read_columns_of(self._storage, files, ["id"]):
            ids_N = np.sort(table.column("id").to_numpy())
            near = within(wanted_N, ids_N[0], ids_N[-1]) if len(ids_N) else slice(0, 0)
            known_N[near] |= is_in(wanted_N[near], ids_N)
        known = set(wanted_N[known_N].tolist())
        return next((entry_id for entry_id in given if entry_id not in known), None)

    def matching(self, *, uri: str | None = None, label: str | None = None, dataset: str | None = None) -> np.ndarray:
        """The ids of the entries with this uri, label or dataset (give exactly one), int64 [N]."""
        if uri is not None:
            return self.with_uris([uri])[1]
        column: Column = "dataset" if label is None else "label"
        name = dataset if label is None else label
        assert name is not None  # noqa: S101  # exactly one is given
        if name not in self._asked[column]:
            self._asked[column].add(name)
            self._known.pop(column, None)
        return self._names(column)[1].get(name, np.empty(0, np.int64))

    def with_uris(self, uris: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The entries with any of these uris, in one pass: positions in `uris` and ids, int64 [N] each."""
        at_in_order = {uri: at for at, uri in enumerate(uris)}
        places_V = np.array([at_in_order[uri] for uri in sorted(at_in_order)], np.int64)
        values = Values(at_in_order.keys())
        places, ids = [places_V[:0]], [np.empty(0, np.int64)]
        for table in in_batches(self._rows(["id", "uri"]), len(values)) if len(values) else ():
            at_N = pc.fill_null(values.places_of(table.column("uri")), -1).to_numpy()
            places.append(places_V[at_N[at_N >= 0]])
            ids.append(table.column("id").to_numpy()[at_N >= 0])
        return np.concatenate(places), np.concatenate(ids)

    def known_labels(self) -> list[str]:
        """The labels that entries have, ascending."""
        return sorted(self._names("label")[0])

    def known_datasets(self) -> list[str]:
        """The datasets that entries have, ascending."""
        return sorted(self._names("dataset")[0])

    def counts_of(self, ids_N: np.ndarray) -> pa.Table:
        """Rows of counts of these entries (`ids_N`: int64 [N]), by dataset and label.

        Reads only files that may hold one of them.
        """
        wanted_N = np.unique(ids_N)
        files = [file for file in self._files if may_hold(file, wanted_N)]
        tables = self._rows(["id", "label", "dataset"], files)
        chosen = (table.filter(pa.array(is_in(table.column("id").to_numpy(), wanted_N))) for table in tables)
        return added(counted(table.column("dataset"), table.column("label")) for table in chosen)

    def _names(self, column: Column) -> tuple[Counter[str], dict[str, np.ndarray]]:
        """The number of entries of each name in a column, and the ids of those with a name that was asked for."""
        if column not in self._known:
            counts: Counter[str] = Counter()
            ids: dict[str, list[np.ndarray]] = {name: [] for name in self._asked[column]}
            for table in self._rows(["id", column]):
                here = _counts(table.column(column).drop_null())
                counts.update(here)
                for name in here.keys() & ids.keys():
                    with_name = pc.fill_null(pc.equal(table.column(column), name), False)
                    ids[name].append(table.column("id").filter(with_name).to_numpy())
            self._known[column] = counts, {name: np.concatenate(found) for name, found in ids.items() if found}
        return self._known[column]

    def _rows(self, columns: Sequence[str], files: Sequence[FileRef] | None = None) -> Iterator[pa.Table]:
        """Columns (`id` first) of every entry once, labels as they are now; `files` are read in order of their ids.

        Compacted and folded rows occur in several files, whose ranges of ids overlap.
        """
        inline = {name: pa.array([getattr(s, name) for s in self._singles], _TYPES[name]) for name in columns}
        if self._singles:
            yield self._as_now(pa.table(inline))
        files = self._files if files is None else files
        overlapping: list[np.ndarray] = []
        for file, table in zip(files, read_columns_of(self._storage, files, columns), strict=True):
            ids_N = table.column("id").to_numpy()
            overlapping = [seen_N for seen_N in overlapping if len(seen_N) and seen_N[-1] >= _first_id(file)]
            again_N = is_in(ids_N, self._single_ids_N)
            for seen_N in overlapping:
                again_N |= is_in(ids_N, seen_N)
            overlapping.append(np.sort(ids_N))
            yield self._as_now((table.filter(pa.array(~again_N)) if again_N.any() else table).replace_schema_metadata())

    def _as_now(self, table: pa.Table) -> pa.Table:
        return with_newest_labels(table, self._own) if "label" in table.column_names else table


def with_newest_labels(table: pa.Table, own: OwnLabels) -> pa.Table:
    """Rows with the columns `id` and `label`, with the labels that were given to single entries in place of theirs."""
    ids_N = table.column("id").to_numpy()
    corrected_N = is_in(ids_N, own.ids_N)
    if not corrected_N.any():
        return table
    given = own.labels.take(pa.array(np.searchsorted(own.ids_N, ids_N[corrected_N])))
    labels = pc.replace_with_mask(table.column("label"), pa.array(corrected_N), given)
    at = table.schema.get_field_index("label")
    return table.set_column(at, table.schema.field(at), labels)


def _first_id(file: FileRef) -> int:
    return file.first_id if isinstance(file, RowsFile) else 0


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {pair["values"]: pair["counts"] for pair in pc.value_counts(column).to_pylist()}


_TYPES = {"id": pa.int64(), "uri": pa.string(), "label": pa.string(), "dataset": pa.string()}

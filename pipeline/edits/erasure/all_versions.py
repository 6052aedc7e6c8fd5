"""The entries of all retained versions, including forgotten entries and entries of older versions."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.store.checks.inventory import Inventory
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.file_refs import FileRef, RowsFile
from pipeline.store.tables.counts import counted
from pipeline.store.tables.kept_columns import FIXED, as_text
from pipeline.store.tables.labels import newest_labels, read_label_rows
from pipeline.store.tables.schemas import embedding_matrix, read_table


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
    """The fields of these entries (ids int64 [N] ascending), from the versions of the inventory. Raises DamagedFile."""
    wanted = pa.array(ids_N)
    found: dict[int, tuple[str, str, str | None, str, np.ndarray]] = {}
    kept: dict[str, set[str]] = {}
    for file in inventory.of_kind("entries"):
        if not may_hold(file, ids_N):
            continue
        table = read_table(log.storage, file)
        table = table.filter(pc.is_in(table.column("id"), wanted))
        for name in table.column_names[len(FIXED) :]:
            kept.setdefault(name, set()).update(as_text(table.column(name).drop_null()).to_pylist())
        columns = [table.column(name).to_pylist() for name in ("id", "uri", "sha256", "label", "dataset")]
        for entry, vector in zip(zip(*columns, strict=True), embedding_matrix(table.column("embedding")), strict=True):
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
    """The uri, newest label and dataset of every entry of every version, forgotten entries included."""

    def __init__(self, log: VersionLog, state: State) -> None:
        inventory = Inventory.of(log, last=state.version)
        columns = ["id", "uri", "label", "dataset"]
        singles = list(inventory.singles.values())
        inline = {name: pa.array([getattr(s, name) for s in singles], _TYPES[name]) for name in columns}
        files = inventory.of_kind("entries")
        tables = [read_table(log.storage, file, columns).replace_schema_metadata() for file in files]
        schema = pa.schema(list(_TYPES.items()))
        rows = pa.concat_tables([pa.table(inline), *(table.cast(schema) for table in tables)])
        # Compacted rows occur twice.
        self._ids_N, first = np.unique(rows.column("id").to_numpy(), return_index=True)
        rows = rows.take(pa.array(first))
        self._uris, self._datasets = rows.column("uri"), rows.column("dataset")
        names = np.array(rows.column("label").to_pylist(), object)
        own = newest_labels(read_label_rows(log.storage, state.labels), None)
        here = np.isin(own.ids_N, self._ids_N)
        names[np.searchsorted(self._ids_N, own.ids_N[here])] = own.labels.filter(pa.array(here)).to_pylist()
        self._names = pa.array(names.tolist(), pa.string())

    def unknown(self, ids: Iterable[int]) -> int | None:
        """The first of these ids that no version holds, or None."""
        known = set(self._ids_N.tolist())
        return next((int(entry_id) for entry_id in ids if int(entry_id) not in known), None)

    def matching(self, *, uri: str | None = None, label: str | None = None, dataset: str | None = None) -> np.ndarray:
        """The ids of the entries with this uri, label or dataset (give exactly one), int64 [N]."""
        asked = ((self._names, label), (self._uris, uri), (self._datasets, dataset))
        [(column, wanted)] = [(column, name) for column, name in asked if name is not None]
        found_N: np.ndarray = self._ids_N[np.asarray(pc.fill_null(pc.equal(column, wanted), False))]
        return found_N

    def with_uris(self, uris: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The entries with any of these uris, in one pass: positions in `uris` and ids, int64 [N] each."""
        at_N = pc.fill_null(pc.index_in(self._uris, value_set=pa.array(uris, pa.string())), -1).to_numpy()
        return at_N[at_N >= 0].astype(np.int64), self._ids_N[at_N >= 0]

    def known_labels(self) -> list[str]:
        """The labels that entries have, ascending."""
        return sorted(pc.unique(self._names.drop_null()).to_pylist())

    def known_datasets(self) -> list[str]:
        """The datasets that entries have, ascending."""
        return sorted(pc.unique(self._datasets).to_pylist())

    def counts_of(self, ids_N: np.ndarray) -> pa.Table:
        """Rows of counts of these entries (`ids_N`: int64 [N]), by dataset and label."""
        chosen = pa.array(np.isin(self._ids_N, ids_N))
        return counted(self._datasets.filter(chosen), self._names.filter(chosen))


_TYPES = {"id": pa.int64(), "uri": pa.string(), "label": pa.string(), "dataset": pa.string()}

"""Corrects the labels of entries, or makes a label set from a map. The next version has the change; no file is altered.

`label_set` None means the labels as stored. In a label set an entry's own label takes precedence over the map, which
translates its label as stored. The own label stays when the map is replaced.
"""

import operator
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import UnknownName, UsageError
from pipeline.images.labels.label_files import given_label, put, read_entry_labels, read_map
from pipeline.images.names.uris import uri_of_path
from pipeline.store.log.label_counts import by_label, changed_counts
from pipeline.store.log.records import LabelSet
from pipeline.store.log.state import Relabel, SetLabelSet, State, file_refs
from pipeline.store.log.version_log import VersionLog
from pipeline.store.lookup.entry_lookup import EntryLookup
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.counts import added, counted
from pipeline.store.tables.labels import (
    label_rows,
    newest_labels,
    newest_rows,
    read_label_map,
    read_label_rows,
    write_label_map,
    write_labels,
)
from pipeline.store.tables.parquet_columns import files_to_merge

WAYS = "give `ids` with `label`, `file`, or `label_set` with `map`"


@dataclass(frozen=True)
class Correction:
    """The correction to make: one label for some ids, the labels in a file, or a map. Raises UsageError."""

    ids: Sequence[int] = ()
    label: str | None = None
    file: str | Path | None = None
    label_set: str | None = None
    map: str | Path | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        given = [len(self.ids) > 0, self.file is not None, self.map is not None]
        if sum(given) > 1:
            raise UsageError(f"two of `ids`, `file` and `map` were given: {WAYS}")
        if self.label_set is not None and given_label(self.label_set) is None:
            raise UsageError("`label_set` is empty: give the set a name")
        if self.map is not None and self.label_set is None:
            raise UsageError("`map` was given without `label_set`: name the label set that it makes")
        if self.label is not None and not len(self.ids):
            other = "a file and a map say the labels" if any(given) else "name the entries with `ids`"
            raise UsageError(f"`label` was given without `ids`: {other}")
        if len(self.ids) and (self.label is None or given_label(self.label) is None):
            raise UsageError(f"`ids` was given with {'no' if self.label is None else 'an empty'} `label`: say which")
        if not any(given):
            raise UsageError(f"nothing was named to relabel: {WAYS}")
        for entry_id in self.ids:
            try:
                operator.index(entry_id)
            except TypeError as error:
                raise UsageError(f"id {entry_id!r} is not a whole number: `search` shows the ids") from error


@dataclass(frozen=True)
class MapCoverage:
    """How a map fits a memory.

    `covered` counts the labels of live entries that the map has; `lacking` are the labels of live entries that it
    lacks; `unused` are its labels that no live entry has.
    """

    covered: int
    lacking: tuple[str, ...]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class RelabelReport:
    """The result of a relabelling: counts of entries whose label changed, and of entries that had the wanted label.

    `labels` is the number of labels that live entries now have in the label set (`label_set` None: as stored).
    """

    relabelled: int
    unchanged: int
    version: int
    committed: bool
    label_set: str | None
    labels: int
    coverage: MapCoverage | None = None

    def to_json(self) -> dict:
        fields: dict[str, Any] = {
            "relabelled": self.relabelled,
            "unchanged": self.unchanged,
            "version": self.version,
            "committed": self.committed,
            "label_set": self.label_set,
            "labels": self.labels,
        }
        if self.coverage is not None:
            fields |= {
                "covered": self.coverage.covered,
                "lacking": list(self.coverage.lacking),
                "unused": list(self.coverage.unused),
            }
        return fields


def select(lookup: EntryLookup, correction: Correction, memory_uri: str) -> dict[int, str]:
    """The wanted label of each named live entry, by id. Raises UnknownName if a name matches none, or SourceError."""
    if correction.file is None:
        label = given_label(correction.label or "") or ""
        wanted = {operator.index(entry_id): label for entry_id in correction.ids}
        named = ""
    else:
        wanted, by_uri = read_entry_labels(correction.file)
        named = f" that {correction.file} names"
        if by_uri:
            return _by_uri(lookup, by_uri, correction.file, memory_uri)
    unknown = lookup.unknown(wanted)
    if unknown is not None:
        raise UnknownName(
            f"the memory at {memory_uri} has no entry with id {unknown}{named}: `search` and `classify --json` show ids"
        )
    return wanted


def relabel(
    log: VersionLog, state: State, wanted: Mapping[int, str], label_set: str | None, command: str
) -> tuple[State, int]:
    """Commit these labels; return the state and how many entries have another label than before.

    Nothing is committed if every entry has the wanted label already; in a label set it must be the entry's own label.
    Reads the labels of these entries alone, and last files of labels with no more rows than it writes.
    """
    ids_N = np.array(sorted(wanted), np.int64)
    labels_N = np.array([wanted[entry_id] for entry_id in ids_N.tolist()], object)
    relabelled = 0
    written: list[Relabel] = []

    def prepare(version: int, at: State) -> list[Relabel]:
        nonlocal relabelled
        log.storage.delete(file.path for action in written for file in file_refs(action))
        before = known if at == state else _labels_before(log.storage, at, ids_N, label_set)
        left_N, named, own_N, before_N = before.left_N, before.named, before.own_N, before.labels_N
        relabelled = int((before_N != labels_N[left_N]).sum())
        new_N = left_N.copy()
        new_N[left_N] = own_N != labels_N[left_N]
        merged = files_to_merge(at.labels, int(new_N.sum()))
        rows = [read_label_rows(log.storage, merged), label_rows(ids_N[new_N], labels_N[new_N].tolist(), label_set)]
        counts = None
        if label_set is None and at.known_counts is not None:
            old = named.filter(pa.array(new_N[left_N]))
            new = counted(old["dataset"], pa.array(labels_N[new_N].tolist(), pa.string()))
            changes = added([counted(old["dataset"], old["label"], -1), new])
            counts = changed_counts(log.storage, lease, version, at, changes)
        file = write_labels(log.storage, lease, version, newest_rows(pa.concat_tables(rows)))
        replaces = tuple(file.path for file in merged)
        written[:] = [
            Relabel(labels=file, relabelled=relabelled, label_set=label_set, replaces=replaces, counts=counts)
        ]
        return written

    known = _labels_before(log.storage, state, ids_N, label_set)
    if known.left_N.all() and (known.own_N == labels_N).all():
        return state, 0
    with Lease(log.storage, "relabel") as lease:
        return log.commit(state, command, prepare, lease), relabelled


def set_label_set(
    log: VersionLog, state: State, name: str, names: Mapping[str, str], command: str
) -> tuple[State, int]:
    """Commit the map of a label set; return the state and how many entries have another label in it than before.

    Nothing is committed if the set has the same map already. Reads the counts of labels, and the labels of the entries
    that have a label of their own in the set.
    """
    if _map_of(log, state, name) == names:
        return state, 0
    relabelled = 0
    written: list[SetLabelSet] = []

    def prepare(version: int, at: State) -> list[SetLabelSet]:
        nonlocal relabelled
        log.storage.delete(action.label_set.map.path for action in written if action.label_set.map)
        before = _map_of(log, at, name) or {}
        lookup = EntryLookup(log.storage, at)
        own_N = newest_labels(read_label_rows(log.storage, at.labels), name).ids_N
        stay = Counter(lookup.labels(own_N[lookup.contains(own_N)]).to_pylist())
        counts = by_label(lookup.counts())
        relabelled = sum(n - stay[label] for label, n in counts.items() if before.get(label) != names.get(label))
        file = write_label_map(log.storage, lease, version, names)
        written[:] = [SetLabelSet(label_set=LabelSet(name=name, map=file))]
        return written

    with Lease(log.storage, "relabel") as lease:
        return log.commit(state, command, prepare, lease), relabelled


def coverage_of(labels: Iterable[str], names: Mapping[str, str]) -> MapCoverage:
    """Compare a map with the labels of live entries."""
    known = set(labels)
    return MapCoverage(len(known & set(names)), tuple(sorted(known - set(names))), tuple(sorted(set(names) - known)))


def correct(log: VersionLog, state: State, correction: Correction, command: str) -> RelabelReport:
    """Carry out a correction. Raises UnknownName, SourceError or CommitConflict; nothing is changed then."""
    name = given_label(correction.label_set) if correction.label_set is not None else None
    lookup = EntryLookup(log.storage, state)
    coverage = None
    if correction.map is not None and name is not None:
        names = read_map(correction.map)
        coverage = coverage_of(lookup.known_labels(), names)
        after, relabelled = set_label_set(log, state, name, names, command)
        asked = 0
    else:
        wanted = select(lookup, correction, log.storage.uri)
        asked = len(wanted)
        after, relabelled = relabel(log, state, wanted, name, command)
    return RelabelReport(
        relabelled=relabelled,
        unchanged=max(asked - relabelled, 0),
        version=after.version,
        committed=after.version != state.version,
        label_set=name,
        labels=EntryLookup(log.storage, after).num_labels(name),
        coverage=coverage,
    )


def _by_uri(lookup: EntryLookup, labels: Mapping[str, str], file: str | Path, memory_uri: str) -> dict[int, str]:
    """The wanted label of each live entry with one of these uris, by id. A uri may also be a path as in a shell."""
    found = _ids_by_uri(lookup, list(labels))
    paths = {
        uri: uri_of_path(os.path.abspath(os.path.expanduser(uri.removeprefix("file://"))))
        for uri in labels
        if uri not in found
    }
    found_by_path = _ids_by_uri(lookup, list(dict.fromkeys(paths.values()))) if paths else {}
    wanted: dict[int, str] = {}
    for uri, label in labels.items():
        ids = found.get(uri) or found_by_path.get(paths.get(uri, ""), [])
        if not ids:
            raise UnknownName(f"the memory at {memory_uri} has no entry with uri '{uri}' that {file} names")
        for entry_id in ids:
            put(wanted, entry_id, label, f"uri '{uri}'", file)
    return wanted


def _ids_by_uri(lookup: EntryLookup, uris: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for position, entry_id in zip(*(array.tolist() for array in lookup.with_uris(uris)), strict=True):
        found.setdefault(uris[position], []).append(entry_id)
    return found


def _map_of(log: VersionLog, state: State, name: str) -> dict[str, str] | None:
    """The map of a label set; None if the set does not exist or has no map."""
    [file] = [known.map for known in state.label_sets if known.name == name] or [None]
    return read_label_map(log.storage, file) if file is not None else None


@dataclass(frozen=True)
class _Before:
    """What some entries have before a correction. `left_N` (bool [N]) says which of them are live.

    Of the live ones `named` has the datasets and labels as stored, `own_N` the own labels in the label set, without its
    map, and `labels_N` the labels in it (object, None: no label).
    """

    left_N: np.ndarray
    named: pa.Table
    own_N: np.ndarray
    labels_N: np.ndarray


def _labels_before(storage: Storage, state: State, ids_N: np.ndarray, label_set: str | None) -> _Before:
    """What entries have in a state. Reads the row groups that have them once."""
    lookup = EntryLookup(storage, state)
    left_N = lookup.contains(ids_N)  # another writer may have forgotten some entries
    named = lookup.datasets_and_labels(ids_N[left_N])
    if label_set is None:
        own_N = np.array(named["label"].to_pylist(), object)
        return _Before(left_N, named, own_N, own_N)
    own = lookup.own_labels(ids_N[left_N], label_set)
    own_N = np.array([own.get(entry_id) for entry_id in ids_N[left_N].tolist()], object)
    labels_N = np.array(lookup.labels_in(label_set, ids_N[left_N]), object)
    return _Before(left_N, named, own_N, labels_N)

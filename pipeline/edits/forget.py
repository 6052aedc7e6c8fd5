"""Forgets entries, selected by id, uri, label or dataset: they get tombstones in the next version."""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.errors import SourceError, UnknownName, UsageError
from pipeline.images.labels.label_files import read_names
from pipeline.images.names.uris import uri_of_path
from pipeline.store.log.state import Forget, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.tombstones import FOLD_EVERY, read_tombstones, write_tombstones

if TYPE_CHECKING:
    from pipeline.edits.erasure.all_versions import Duplicate
    from pipeline.edits.erasure.receipt import Receipt


@dataclass(frozen=True)
class Selection:
    """The entries to forget: all that match any of these names."""

    ids: Sequence[int] = ()
    uris: Sequence[str] = ()
    labels: Sequence[str] = ()
    datasets: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not any(len(names) for names in (self.ids, self.uris, self.labels, self.datasets)):
            raise UsageError("nothing was named to forget: give `ids`, `uris`, `labels`, `datasets` or `file`")

    def to_json(self) -> dict:
        """The selection as a JSON object."""
        return {"ids": [*self.ids], "uris": [*self.uris], "labels": [*self.labels], "datasets": [*self.datasets]}


@dataclass(frozen=True)
class ForgetReport:
    """The number of live entries that were forgotten, and the first version without them.

    `erased` counts the entries whose bytes were erased, including entries that were forgotten before; None without
    erasure. `duplicates` are other entries with the uri or the bytes of an erased entry; they stay. `index_dropped` is
    true if the trained part of the index held an erased vector: the index was dropped and must be built again.
    """

    forgotten: int
    version: int
    erased: int | None = None
    receipt: "Receipt | None" = None
    duplicates: "Sequence[Duplicate]" = ()
    index_dropped: bool = False

    def to_json(self) -> dict:
        """The report as a JSON object."""
        return {
            "forgotten": self.forgotten,
            "version": self.version,
            "erased": self.erased,
            "receipt": self.receipt.to_json() if self.receipt else None,
            "live_duplicates": [asdict(duplicate) for duplicate in self.duplicates],
            "index_dropped": self.index_dropped,
        }


@dataclass(frozen=True)
class ForgetPlan:
    """The effect that `forget` would have: it forgets `forgotten` live entries, and with `erase` erases all `entries`.

    `entries` counts the selected entries. `labels` and `datasets` count them by name; `unlabelled` have no label.
    """

    entries: int
    forgotten: int
    labels: Mapping[str, int]
    unlabelled: int
    datasets: Mapping[str, int]
    erase: bool
    version: int

    def to_json(self) -> dict:
        """The plan as a JSON object."""
        return {
            "would_forget": self.forgotten,
            "would_erase": self.entries if self.erase else None,
            "labels": dict(self.labels),
            "unlabelled": self.unlabelled,
            "datasets": dict(self.datasets),
            "version": self.version,
        }


class Nameable(Protocol):
    """Entries that can be selected by id, uri, label or dataset."""

    @property
    def labels(self) -> tuple[str, ...]: ...
    def unknown(self, ids: Iterable[int]) -> int | None: ...
    def matching(
        self, *, uri: str | None = None, label: str | None = None, dataset: str | None = None
    ) -> np.ndarray: ...
    def with_uris(self, uris: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...
    def label_counts(self) -> np.ndarray: ...
    def dataset_counts(self) -> dict[str, int]: ...


def select(live: Nameable, selection: Selection, memory_uri: str) -> np.ndarray:
    """The ids of the selected entries, ascending (int64 [N]). Raises UnknownName if a name matches none."""
    unknown = live.unknown(selection.ids)
    if unknown is not None:
        raise UnknownName(
            f"the memory at {memory_uri} has no entry with id {unknown}: `search` and `classify --json` show ids"
        )
    found = [np.array(sorted(set(selection.ids)), np.int64)]
    if selection.uris:
        found.append(_with_uris(live, selection.uris, memory_uri))
    counted = zip(live.labels, live.label_counts(), strict=True) if selection.labels else ()
    known = [label for label, count in counted if count]
    found += [_named(live.matching(label=name), "label", name, known, memory_uri) for name in selection.labels]
    datasets = list(live.dataset_counts()) if selection.datasets else []
    found += [_named(live.matching(dataset=name), "dataset", name, datasets, memory_uri) for name in selection.datasets]
    return np.unique(np.concatenate(found))


def forget(log: VersionLog, state: State, ids: np.ndarray, command: str) -> tuple[State, int]:
    """Commit tombstones for these ids (int64 [N]); return the state and how many of them were live before."""
    newly = 0

    def prepare(version: int, state: State) -> list[Forget]:
        nonlocal newly
        forgotten = read_tombstones(log.storage, state.tombstones)
        fresh = np.setdiff1d(ids, forgotten)
        folds = len(state.tombstones) >= FOLD_EVERY - 1
        tombstones = write_tombstones(log.storage, lease, version, np.union1d(fresh, forgotten) if folds else fresh)
        newly = len(fresh)
        return [Forget(tombstones=tombstones, forgotten=newly, folds=folds)]

    with Lease(log.storage, "forget") as lease:
        state = log.commit(state, command, prepare, lease)
    return state, newly


def read_selection(path: str | Path) -> Selection:
    """The ids and uris that a file lists: one per line, or a column `id` or `uri` of a .csv, .tsv or .parquet file.

    Raises SourceError.
    """
    names = read_names(path)
    if not names:
        raise SourceError(f"{path} lists nothing to forget: write an id or a uri a line")
    ids = [int(name) for name in names if name.isascii() and name.isdigit()]
    return Selection(ids=ids, uris=[name for name in names if not (name.isascii() and name.isdigit())])


def unknown_name(kind: str, name: str, known: Sequence[str], memory_uri: str) -> UnknownName:
    """The error for an unknown label or dataset, with the most similar known ones."""
    similar = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or list(known)[:3]
    hint = f"it has {', '.join(similar)}{', …' if len(known) > len(similar) else ''}" if known else "it has none"
    return UnknownName(f"the memory at {memory_uri} has no entry with {kind} '{name}': {hint}")


def _with_uris(live: Nameable, given: Sequence[str], memory_uri: str) -> np.ndarray:
    """The ids of the entries with these uris. Each may also be given as the path of a file."""
    uris = [*dict.fromkeys(given)]
    at_N, ids_N = live.with_uris(uris)
    missed = sorted(set(range(len(uris))) - set(at_N.tolist()))
    paths = [os.path.abspath(os.path.expanduser(uris[at].removeprefix("file://"))) for at in missed]
    unique = [*dict.fromkeys(map(uri_of_path, paths))]
    at_M, ids_M = live.with_uris(unique)
    known = {unique[at] for at in at_M.tolist()}
    for at, path in zip(missed, paths, strict=True):
        if uri_of_path(path) not in known:
            raise UnknownName(f"the memory at {memory_uri} has no entry with uri '{uris[at]}': `search` shows uris")
    return np.concatenate([ids_N, ids_M])


def _named(matched: np.ndarray, kind: str, name: str, known: Sequence[str], memory_uri: str) -> np.ndarray:
    if not len(matched):
        raise unknown_name(kind, name, known, memory_uri)
    return matched

"""What a version changes in stored rows: forgotten ids, and entries with labels of their own.

An overlay grows from the overlay of an earlier version. Only files that are new are read. What was forgotten or
relabelled in between is known by id, so that blocks without such an id stay as they are.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.store.log.state import State
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.ids import in_common, is_in, within
from pipeline.store.tables.labels import OwnLabels, newest_labels, read_label_rows
from pipeline.store.tables.schemas import LABELS
from pipeline.store.tables.tombstones import read_tombstones

_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class OwnLayers:
    """The newest labels of single entries in one label set. A later layer takes precedence.

    `num_rows` are the rows of the overlay that the layers were made from. Rows that come later make one more layer. It
    is merged with the layer below when it is half as large, so that there are few: 1e7 labels are sorted once (2 s),
    and not at each version.
    """

    layers: tuple[OwnLabels, ...] = ()
    num_rows: int = 0

    def grown(self, rows: pa.Table, label_set: str | None) -> "OwnLayers":
        """The layers of all these rows. The first `num_rows` of them are known."""
        if rows.num_rows == self.num_rows:
            return self
        return self.under(newest_labels(rows.slice(self.num_rows), label_set), rows.num_rows)

    def under(self, labels: OwnLabels, num_rows: int) -> "OwnLayers":
        """The layers with one more, which come from `num_rows` rows together."""
        layers = [*self.layers, labels]
        while len(layers) > 1 and 2 * len(layers[-1].ids_N) >= len(layers[-2].ids_N):
            layers[-2:] = [_merged(layers[-2:])]
        return OwnLayers(tuple(layer for layer in layers if len(layer.ids_N)), num_rows)

    def of(self, first: int, last: int) -> OwnLabels:
        """The labels of the entries with ids from `first` to `last`."""
        pieces = []
        for layer in self.layers:
            here = within(layer.ids_N, first, last)
            pieces.append(OwnLabels(layer.ids_N[here], layer.labels.slice(here.start, here.stop - here.start)))
        return _merged([piece for piece in pieces if len(piece.ids_N)])

    def flat(self) -> OwnLabels:
        """All labels."""
        return _merged(self.layers)


@dataclass(frozen=True)
class Overlay:
    """What a version changes in the stored rows.

    `forgotten` are the forgotten ids (int64 [N], ascending), `changed` those that the overlay before did not have, or
    had besides. `own_labels` are the rows of labels, oldest first.
    """

    tombstones: tuple[FileRef, ...] = ()
    labels: tuple[FileRef, ...] = ()
    forgotten: np.ndarray = field(default_factory=lambda: _NONE)
    changed: np.ndarray = field(default_factory=lambda: _NONE)
    own_labels: pa.Table = field(default_factory=LABELS.empty_table)
    _layers: dict[str | None, OwnLayers] = field(default_factory=dict)

    def grown(self, storage: Storage, state: State) -> "Overlay":
        """The overlay of another version, usually a later one. Reads the files that this overlay does not have.

        Raises DamagedFile.
        """
        forgotten, changed = self.forgotten, _NONE
        if state.tombstones != self.tombstones:
            read = read_tombstones(storage, [file for file in state.tombstones if file not in self.tombstones])
            changed = read[~is_in(read, forgotten)]
            forgotten = np.insert(forgotten, np.searchsorted(forgotten, changed), changed)
            if len(forgotten) != sum(file.rows for file in state.tombstones):  # no id is in two files: some came back
                forgotten = read_tombstones(storage, state.tombstones)
                changed = np.setxor1d(self.forgotten, forgotten, assume_unique=True)
        own_labels, layers = self.own_labels, dict(self._layers)
        if state.labels != self.labels:
            num_common, num_rows = _common(self.labels, state.labels)
            read = read_label_rows(storage, state.labels[num_common:])
            own_labels = pa.concat_tables([self.own_labels.slice(0, num_rows), read])
            if _repeats(read, self.own_labels.slice(num_rows)):
                known = {name: of.grown(self.own_labels, name) for name, of in layers.items()}
                layers = {n: of.under(newest_labels(read, n), own_labels.num_rows) for n, of in known.items()}
            else:
                layers = {}
        return Overlay(state.tombstones, state.labels, forgotten, changed, own_labels, layers)

    def own(self, label_set: str | None) -> OwnLayers:
        """The labels of single entries in a label set."""
        found = self._layers[label_set] = self._layers.get(label_set, OwnLayers()).grown(self.own_labels, label_set)
        return found

    def relabelled_since(self, before: "Overlay", label_set: str | None) -> np.ndarray:
        """The ids of the entries whose own label may differ from that of another overlay, int64 [N] ascending."""
        if self.labels == before.labels:
            return _NONE
        _, num_rows = _common(before.labels, self.labels)
        rows = self.own_labels.slice(num_rows)
        if _repeats(rows, before.own_labels.slice(num_rows)):
            return newest_labels(rows, label_set).ids_N
        return _different(before.own(label_set).flat(), self.own(label_set).flat())


def _common(before: Sequence[FileRef], now: Sequence[FileRef]) -> tuple[int, int]:
    """How many of the first files are the same, and how many rows they have."""
    same = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, now, strict=False)))
    return len(same), sum(file.rows for file, _ in same)


def _repeats(rows: pa.Table, dropped: pa.Table) -> bool:
    """Whether each id and label set of rows that were dropped is in other rows too, which take their place.

    So it is with a file that replaces the last files of labels. It is not so after a rollback, or an erasure.
    """
    sets = dropped.column("label_set").unique().to_pylist() if dropped.num_rows else []
    of_set = [tuple(newest_labels(table, name).ids_N for table in (dropped, rows)) for name in sets]
    return all(is_in(before_N, now_N).all() for before_N, now_N in of_set)


def _merged(layers: Sequence[OwnLabels]) -> OwnLabels:
    """The labels of several layers. The last layer with an id wins."""
    if not layers:
        return OwnLabels(_NONE, pa.nulls(0, pa.string()))
    if len(layers) == 1:
        return layers[0]
    backwards = np.concatenate([layer.ids_N for layer in layers])[::-1]
    ids_N, first = np.unique(backwards, return_index=True)
    labels = pa.concat_arrays([layer.labels for layer in layers])
    return OwnLabels(ids_N, labels.take(pa.array(len(backwards) - 1 - first)))


def _different(left: OwnLabels, right: OwnLabels) -> np.ndarray:
    """The ids that only one side has, and those with another label on each side."""
    on_left, on_right = in_common(left.ids_N, right.ids_N)
    one = np.array(left.labels.take(pa.array(on_left)).to_pylist(), object)
    other = np.array(right.labels.take(pa.array(on_right)).to_pylist(), object)
    differing = left.ids_N[on_left[one != other]]
    return np.union1d(np.setxor1d(left.ids_N, right.ids_N, assume_unique=True), differing)

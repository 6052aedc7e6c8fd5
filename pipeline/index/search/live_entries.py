"""Search over all live entries of one version: shards through their indexes, fresh entries exactly, results merged.

Shapes: Q queries, K neighbours, D dimensions. Similarities are inner products of unit vectors, computed in float64 from
the stored float16 and rounded to float32. Equal similarities are ordered by id.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.deadline import look
from pipeline.decisions.neighbor_table import values_by_id
from pipeline.decisions.rivals import Rivals
from pipeline.errors import UnknownName
from pipeline.index.search.blocks import Block, Finder, MakeFinder, Scope
from pipeline.index.search.exact import CACHED_ROWS, ExactFinder
from pipeline.index.search.filter_columns import kinds_of_columns, masks
from pipeline.index.search.filter_expression import parse
from pipeline.index.search.open_blocks import (
    ALL,
    LabelSetBlocks,
    OpenedBlocks,
    Share,
    in_label_set,
    open_blocks,
)
from pipeline.index.search.quantizer import Coarse
from pipeline.index.search.together import contenders, find_together, promising, scored
from pipeline.recent import Recent
from pipeline.store.log.state import State
from pipeline.store.storage.interface import Storage

QUERIES_AT_ONCE = 1_024
WHERES_BYTES = 128 << 20  # of cached results of expressions (masks, and the finders over them): whole, and by block
FEW_ROWS = 4_096  # gathered in 15 ms at 384 dimensions, then searched faster than an index that must go so far


@dataclass(frozen=True)
class Retrieved:
    """Neighbours in order: similarities float32, ids int64, codes int32, blocks and rows int64, all [Q, K].

    If a query has fewer than K neighbours, the remaining cells hold similarity -inf, id -1 and code -1. `rivals` come
    with the contenders of a share that has lists.
    """

    similarities_QK: np.ndarray
    ids_QK: np.ndarray
    codes_QK: np.ndarray
    blocks_QK: np.ndarray
    rows_QK: np.ndarray
    rivals: Rivals | None = None


@dataclass(frozen=True)
class Restrictions:
    """What one search leaves out or changes. Stored data does not change.

    `exclude` are ids that take no rank. `own_Q` is one id per query, left out for that query only (leave-one-out).
    `assume` gives ids another label code for this search.
    """

    scope: Scope = "live"
    exclude: frozenset[int] = frozenset()
    own_Q: np.ndarray | None = None
    assume: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Restricted:
    """A block, and those of its rows that satisfy an expression. Holding the block keeps its `id` from being reused."""

    block: Block
    rows: Block


class LiveEntries:
    """All live entries of one version of a memory, or those of them that satisfy `where`.

    Open with `LiveEntries.open`. `whole` has all live entries. `damaged` has the error of each shard that could not be
    opened. The entries of such a shard are missing here.
    """

    def __init__(
        self,
        dimension: int,
        labels: Sequence[str],
        blocks: Sequence[Block],
        num_shards: int,
        opened: OpenedBlocks | None = None,
        label_set: str | None = None,
        where: str | None = None,
        whole: "LiveEntries | None" = None,
    ) -> None:
        self.dimension = dimension
        self.labels = tuple(labels)
        self.label_set = label_set
        self.where = where
        self.whole = whole or self
        self.blocks = tuple(blocks)
        self.num_shards = num_shards
        self.damaged = opened.damaged if opened else ()
        self.shards_total = num_shards + len(self.damaged)
        self._opened = opened or OpenedBlocks()
        self._label_sets: dict[str, LiveEntries] = {}
        self._label_set_blocks: dict[str, LabelSetBlocks] = {}  # of this version, or of an earlier one
        self._satisfying = Recent[LiveEntries](WHERES_BYTES)
        self._restricted = Recent[_Restricted](WHERES_BYTES)
        self._label_counts: np.ndarray | None = None

    @classmethod
    def open(
        cls,
        storage: Storage,
        state: State,
        before: "LiveEntries | None" = None,
        share: Share = ALL,
        *,
        merged: bool = False,
    ) -> "LiveEntries":
        """Map the intact shards and read the fresh entries of a share. What `before` has already read is reused.

        If `merged`, the lists of shards are merged where that pays for a process that answers many questions.
        Raises DamagedFile if entries that are not in a shard cannot be read.
        """
        opened = open_blocks(storage, state, before._opened if before is not None else None, share, merged=merged)
        dimension = state.identity.dimension if state.identity else 0
        live = cls(dimension, list(opened.codes), opened.blocks, opened.num_shards, opened)
        if before is not None:
            live._keep_from(before)
        return live

    def _keep_from(self, before: "LiveEntries") -> None:
        """Take over what another version knows about blocks that this version has too, and nothing of other blocks."""
        self._label_set_blocks = {name: of.left_in(self._opened) for name, of in before._label_set_blocks.items()}
        views = [self.blocks, *(of.blocks for of in self._label_set_blocks.values())]
        there = {id(block) for blocks in views for block in blocks}
        for key, restricted, num_bytes in before._restricted.items():
            if id(restricted.block) in there:
                self._restricted.put(key, restricted, num_bytes)

    def in_label_set(self, storage: Storage, state: State, name: str) -> "LiveEntries":
        """The same entries under the labels of a label set of the version. Raises UnknownName or DamagedFile."""
        if name not in self._label_sets:
            maps = {label_set.name: label_set.map for label_set in state.label_sets}
            if name not in maps:
                hint = f"it has {', '.join(sorted(maps))}" if maps else "it has none: `relabel --label-set` makes one"
                raise UnknownName(f"the memory at {storage.uri} has no label set '{name}': {hint}")
            of = in_label_set(storage, self._opened, maps[name], name, self._label_set_blocks.get(name))
            found = LiveEntries(self.dimension, list(of.codes), of.blocks, self.num_shards, label_set=name)
            found.damaged, found.shards_total = self.damaged, self.shards_total
            found._restricted = self._restricted
            self._label_set_blocks[name] = of
            self._label_sets[name] = found
        return self._label_sets[name]

    def supposing(self, forgotten: np.ndarray, labels: Mapping[int, str] = MappingProxyType({})) -> "LiveEntries":
        """The entries as if some (ids int64 [N], ascending) were forgotten, and others had other labels.

        Its blocks are those that a version with these changes would have, so it answers as that version.
        """
        codes = dict(self.label_codes)
        given = np.array(sorted(labels), np.int64)
        given_codes = np.array([codes.setdefault(labels[i], len(codes)) for i in given.tolist()], np.int32)
        blocks = []
        for block in self.blocks:
            gone = block.rows_of(forgotten)
            live_N, codes_N = block.live_N, block.codes_N
            if len(gone):
                live_N = live_N.copy()
                live_N[gone] = False
            positions, rows = block.located(given)
            if len(rows):
                codes_N = codes_N.copy()
                codes_N[rows] = given_codes[positions]
            blocks.append(block.under(live_N, codes_N))
        return LiveEntries(
            self.dimension, list(codes), blocks, self.num_shards, self._opened, self.label_set, self.where
        )

    def satisfying(
        self, storage: Storage, state: State, where: str, assume: Mapping[int, str] = MappingProxyType({})
    ) -> "LiveEntries":
        """The entries that satisfy an expression (filter_expression.py). Other entries cannot be neighbours or count.

        `assume` gives some entries another label in the expression. Raises UsageError or DamagedFile. Passes over the
        rows of the blocks for which the expression was not asked before, in this version or an earlier one.
        """
        kinds = kinds_of_columns(state)
        condition = parse(where, kinds)
        assumed = tuple(sorted(assume.items())) if "label" in condition.columns else ()
        key = (where, *((name, str(kinds[name])) for name in sorted(condition.columns)), *assumed)

        def satisfy() -> LiveEntries:
            known = [self._restricted.get((id(block), *key)) for block in self.blocks]
            new = [block for block, restricted in zip(self.blocks, known, strict=True) if restricted is None]
            found = iter(masks(storage, state, new, self.label_names, condition, assume) if new else ())
            blocks = []
            for block, restricted in zip(self.blocks, known, strict=True):
                if restricted is not None:
                    blocks.append(restricted.rows)
                    continue
                rows = block.only(next(found), _exact_over_few(block))
                self._restricted.put((id(block), *key), _Restricted(block, rows), _bytes_of(rows, self.dimension))
                blocks.append(rows)
            return LiveEntries(
                self.dimension, self.labels, blocks, self.num_shards, self._opened, self.label_set, where, self
            )

        return self._satisfying.get_or_make(
            key, satisfy, lambda live: 1_024 + sum(_bytes_of(block, live.dimension) for block in live.blocks)
        )

    @cached_property
    def label_codes(self) -> Mapping[str, int]:
        """The codes of the labels, by their names."""
        return {label: code for code, label in enumerate(self.labels)}

    @cached_property
    def label_names(self) -> pa.Array:
        """The labels as an Arrow array, made once: blocks take the names of their rows from it."""
        return pa.array(self.labels, pa.string())

    @property
    def own_labels(self) -> pa.Table:
        """Labels that the version sets over the stored ones: rows of the overlay, oldest first."""
        return self._opened.overlay.own_labels

    def __len__(self) -> int:
        return self._num_live

    @cached_property
    def _num_live(self) -> int:
        return sum(block.num_live for block in self.blocks)

    def label_counts(self) -> np.ndarray:
        """Number of live entries of each label, int64 [C], in the order of `labels`. Callers must not write to it.

        Only the rows of blocks that were not counted before, in this version or an earlier one, are passed over.
        """
        if self._label_counts is None:
            counts = np.zeros(len(self.labels), np.int64)
            for block in self.blocks:
                codes, of_block = block.label_counts
                counts[codes] += of_block
            self._label_counts = counts
        return self._label_counts

    def dataset_counts(self) -> dict[str, int]:
        """Number of live entries of each dataset that has any. Counts as `label_counts` does."""
        counts: dict[str, int] = {}
        for block in self.blocks:
            for dataset, count in block.dataset_counts.items():
                counts[dataset] = counts.get(dataset, 0) + count
        return dict(sorted(counts.items()))

    def live_ids(self, *, labelled: bool = False) -> np.ndarray:
        """Ids of the live entries, or of those with a label, int64 [N] in block order."""
        masks = [block.live_N & (block.codes_N >= 0) if labelled else block.live_N for block in self.blocks]
        return np.concatenate([b.ids_N[m] for b, m in zip(self.blocks, masks, strict=True)] or [np.empty(0, np.int64)])

    def unknown(self, ids: Iterable[int]) -> int | None:
        """The first of these ids that is not a live entry, or None."""
        wanted = [int(entry_id) for entry_id in ids]
        for entry_id in wanted:
            if not 0 <= entry_id < 1 << 63:
                return entry_id
        known = self.contains(np.array(wanted, np.int64))
        return None if known.all() else wanted[int(known.argmin())]

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Which of some ids (int64 [N]) are live entries, bool [N]."""
        known = np.zeros(len(ids), bool)
        for block, positions, rows in self._located(ids):
            known[positions] |= block.live_N[rows]
        return known

    def matching(self, *, uri: str | None = None, label: str | None = None, dataset: str | None = None) -> np.ndarray:
        """Ids of the live entries with this uri, label or dataset (one of them), int64 [N]."""
        found = []
        code = self.label_codes.get(label, -2) if label is not None else -2
        for block in self.blocks:
            if label is not None:
                mask = block.codes_N == code
            else:
                column, wanted = (block.uris, uri) if uri is not None else (block.datasets, dataset)
                mask = pc.equal(column, wanted).to_numpy()
            found.append(block.ids_N[mask & block.live_N])
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def was_stored_as(self, entry_id: int, label: str | None, dataset: str) -> bool:
        """Whether an entry was stored with this label (None: no label) and dataset, whatever its label is now."""
        for block in self._opened.stored.values():
            for row in block.rows_of(np.array([entry_id], np.int64)):
                code = int(block.codes_N[row])
                return (self.labels[code] if code >= 0 else None) == label and block.datasets[row].as_py() == dataset
        return False

    def with_uris(self, uris: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The live entries with any of these uris, in one pass: positions in `uris` and ids, int64 [N] each."""
        wanted = pa.array(uris, pa.string())
        none = np.empty(0, np.int64)
        positions, ids = [none], [none]
        for block in self.blocks:
            at_N = pc.fill_null(pc.index_in(block.uris, value_set=wanted), -1).to_numpy()
            rows = np.flatnonzero((at_N >= 0) & block.live_N)
            positions.append(at_N[rows].astype(np.int64))
            ids.append(block.ids_N[rows])
        return np.concatenate(positions), np.concatenate(ids)

    def vectors_of(self, ids: np.ndarray) -> np.ndarray:
        """Stored vectors of live entries, float32 [N, D], in the order of `ids`."""
        vectors_ND = np.empty((len(ids), self.dimension), np.float32)
        for block, positions, rows in self._located(ids):
            if len(rows):
                vectors_ND[positions] = block.vectors_at(rows)
        return vectors_ND

    def described(self, ids: np.ndarray) -> list[tuple[str, str]]:
        """The uri and the dataset of each of some live entries, in the order of `ids`."""
        found = [("", "")] * len(ids)
        for block, positions, rows in self._located(ids):
            columns = (block.uris.take(pa.array(rows)).to_pylist(), block.datasets.take(pa.array(rows)).to_pylist())
            for position, about in zip(positions.tolist(), zip(*columns, strict=True), strict=True):
                found[position] = about
        return found

    def codes_of(self, ids: np.ndarray) -> np.ndarray:
        """Label codes of live entries, int32 [N], in the order of `ids`; -1 for no label."""
        codes_N = np.full(len(ids), -1, np.int32)
        for block, positions, rows in self._located(ids):
            codes_N[positions] = block.codes_N[rows]
        return codes_N

    def _located(self, ids: np.ndarray) -> Iterator[tuple[Block, np.ndarray, np.ndarray]]:
        """For each block: the positions in `ids` of the entries that it holds, and their rows in the block.

        The ids are sorted once, and each block looks only at those in its range.
        """
        order = None if (ids[1:] >= ids[:-1]).all() else np.argsort(ids, kind="stable")
        ascending = ids if order is None else ids[order]
        for block in self.blocks:
            positions, rows = block.located(ascending)
            yield block, positions if order is None else order[positions], rows

    def search(self, queries_QD: np.ndarray, k: int, restrictions: Restrictions = Restrictions()) -> Retrieved:
        """The k nearest live entries of each query (float32 [Q, D] of unit length) under the restrictions."""
        return _joined([self._search(*piece) for piece in _pieces(queries_QD, k, restrictions)])

    def contenders(self, queries_QD: np.ndarray, k: int, restrictions: Restrictions = Restrictions()) -> Retrieved:
        """The entries that can be among the k nearest of a whole memory, if this is a share of it.

        They come with their rivals, by which `merge_neighbors` finds the k nearest of all shares.
        """
        return _joined([self._search(*piece, shared=True) for piece in _pieces(queries_QD, k, restrictions)])

    def _search(self, queries_QD: np.ndarray, k: int, restrictions: Restrictions, *, shared: bool = False) -> Retrieved:
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        own_Q, exclude = restrictions.own_Q, np.array(sorted(restrictions.exclude), np.int64)
        finders = [_finder(block, restrictions) for block in self.blocks]
        asked = k + len(exclude) + (own_Q is not None)
        lengths = [len(block.ids_N) for block in self.blocks]
        hits, rivals = find_together(finders, lengths, queries_QD, asked, Coarse(queries_QD))
        if len(exclude):
            starts = zip(hits.starts_B.tolist(), self.blocks, strict=True)
            numbers = np.concatenate([start + block.rows_of(exclude) for start, block in starts])
            hits = hits.without(np.isin(hits.numbers_QK, numbers))
        if own_Q is not None:
            hits = hits.without(hits.numbers_QK == self._numbers(own_Q, hits.starts_B)[:, None])
        if not shared:
            hits = promising(hits, k)
        look()
        blocks_QK, rows_QK = hits.places()
        matrices = [block.vectors_ND for block in self.blocks]
        similarities_QK = scored(queries_QD, matrices, blocks_QK, rows_QK)
        if any(matrix is None for matrix in matrices):
            by_code = np.array([matrix is None for matrix in matrices])[blocks_QK] & (rows_QK >= 0)
            similarities_QK = np.where(by_code, hits.similarities_QK, similarities_QK)
        if shared and rivals is not None:
            can_QK = contenders(hits.by_code_QK, similarities_QK, k)
            best = np.argsort(~can_QK, axis=1, kind="stable")[:, : int(can_QK.sum(axis=1).max(initial=0))]
            similarities_QK = np.where(can_QK, similarities_QK, -np.inf).astype(np.float32)
            rows_QK = np.where(can_QK, rows_QK, -1)
        else:
            best = _best(similarities_QK, k)
        similarities_QK, blocks_QK, rows_QK, own_QK = (
            np.take_along_axis(array, best, axis=1) for array in (similarities_QK, blocks_QK, rows_QK, hits.by_code_QK)
        )
        ids_QK = np.full(rows_QK.shape, -1, np.int64)
        codes_QK = np.full(rows_QK.shape, -1, np.int32)
        for number in np.unique(blocks_QK):
            at = (blocks_QK == number) & (rows_QK >= 0)
            ids_QK[at] = self.blocks[number].ids_N[rows_QK[at]]
            codes_QK[at] = self.blocks[number].codes_N[rows_QK[at]]
        order = np.lexsort((ids_QK, -similarities_QK), axis=-1)[:, : None if shared and rivals else k]
        similarities_QK, ids_QK, codes_QK, blocks_QK, rows_QK, own_QK = (
            np.take_along_axis(a, order, axis=1)
            for a in (similarities_QK, ids_QK, codes_QK, blocks_QK, rows_QK, own_QK)
        )
        if restrictions.assume:
            codes_QK = values_by_id(ids_QK, restrictions.assume, codes_QK)
        if rivals is not None:
            rivals = replace(rivals, own_QK=own_QK)
        return Retrieved(
            similarities_QK, ids_QK, codes_QK.astype(np.int32), blocks_QK, rows_QK, rivals if shared else None
        )

    def _numbers(self, ids_Q: np.ndarray, starts_B: np.ndarray) -> np.ndarray:
        """The numbers of entries in a search of blocks that begin at `starts_B`, int64 [Q]; -2 for none."""
        numbers_Q = np.full(len(ids_Q), -2, np.int64)
        for (_, positions, rows), start in zip(self._located(ids_Q), starts_B.tolist(), strict=True):
            numbers_Q[positions] = start + rows
        return numbers_Q


def _best(similarities_QK: np.ndarray, k: int) -> np.ndarray:
    """Places of each query's k best similarities and of all that equal the k-th, with others to fill up [Q, K]."""
    width = similarities_QK.shape[1]
    if width <= k:
        return np.broadcast_to(np.arange(width), similarities_QK.shape)
    border_Q = np.partition(similarities_QK, width - k, axis=1)[:, width - k]
    most = int((similarities_QK >= border_Q[:, None]).sum(axis=1).max(initial=0))
    if most == width:
        return np.broadcast_to(np.arange(width), similarities_QK.shape)
    return np.argpartition(similarities_QK, width - most, axis=1)[:, width - most :]


def _finder(block: Block, restrictions: Restrictions) -> Finder:
    """The block's finder. It must also find entries without a label if `assume` gives them one."""
    if restrictions.assume and restrictions.scope == "labelled":
        assumed = block.rows_of(np.array(sorted(restrictions.assume), np.int64))
        if (block.codes_N[assumed] < 0).any():
            mask_N = block.codes_N >= 0
            mask_N[assumed] = True
            return block.finder_over(mask_N & block.live_N)
    return block.finder(restrictions.scope)


def _bytes_of(block: Block, dimension: int) -> int:
    """Estimated bytes of the rows that satisfy an expression: a mask, and finders, which may hold vectors."""
    vectors = block.num_live * dimension * 4 if block.num_live <= CACHED_ROWS else 0
    finder = block.num_live * 8 + len(block.live_N) // 8 + vectors
    return 512 + len(block.live_N) + 2 * finder  # over all, and over those with a label


def _exact_over_few(block: Block) -> MakeFinder:
    """Makes finders over rows of a block. A few rows are searched exactly: an index would search most of itself."""

    def make_finder(rows_N: np.ndarray) -> Finder:
        if block.vectors_ND is not None and len(rows_N) <= FEW_ROWS:
            return ExactFinder(block.vectors_ND, rows_N)
        return block.make_finder(rows_N=rows_N)

    return make_finder


def _pieces(
    queries_QD: np.ndarray, k: int, restrictions: Restrictions
) -> Iterator[tuple[np.ndarray, int, Restrictions]]:
    """The queries, as many at once as are searched together."""
    for start in range(0, max(len(queries_QD), 1), QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        own_Q = restrictions.own_Q[rows] if restrictions.own_Q is not None else None
        yield queries_QD[rows], k, replace(restrictions, own_Q=own_Q)


def _joined(pieces: Sequence[Retrieved]) -> Retrieved:
    """The neighbours of the queries of all pieces. A piece with fewer columns is filled up."""
    if len(pieces) == 1:
        return pieces[0]
    nothing = {"similarities_QK": -np.inf, "ids_QK": -1, "codes_QK": -1, "blocks_QK": 0, "rows_QK": -1}
    columns = {name: stacked([getattr(piece, name) for piece in pieces], no) for name, no in nothing.items()}
    found = [piece.rivals for piece in pieces if piece.rivals is not None]
    rivals = None
    if found:
        own_QK, all_QR = (stacked([getattr(each, name) for each in found], -np.inf) for name in ("own_QK", "all_QR"))
        rivals = replace(found[0], own_QK=own_QK, all_QR=all_QR)
    return Retrieved(**columns, rivals=rivals)


def stacked(arrays: Sequence[np.ndarray], nothing: float) -> np.ndarray:
    """Arrays [Q, K] below one another, filled up with `nothing` to the width of the widest."""
    width = max(array.shape[1] for array in arrays)
    missing = [((0, 0), (0, width - array.shape[1])) for array in arrays]
    return np.concatenate([np.pad(a, more, constant_values=nothing) for a, more in zip(arrays, missing, strict=True)])

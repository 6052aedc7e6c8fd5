"""Opens the live entries of one version as blocks, and reuses the blocks that an earlier version shares with it.

A stored file never changes under its name, so a block of stored rows is read once. Later changes of a version
(tombstones, other labels) form an overlay over these rows. It is applied again only to the blocks in which it changed,
and the other blocks stay the same objects, with what was found out about them. So a reader that follows the versions of
a growing memory does only what was added.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from pipeline.errors import DamagedFile
from pipeline.index.search.blocks import Block
from pipeline.index.search.exact import ExactFinder
from pipeline.index.search.merging import ShardLists, merge
from pipeline.index.search.overlay import Overlay, OwnLayers
from pipeline.index.search.shard_files import files_covered, open_shard, read_ahead
from pipeline.store.log.records import Index, Shard, Single
from pipeline.store.log.single_adds import table_of_singles
from pipeline.store.log.state import State
from pipeline.store.storage.file_refs import FileRef, RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.identity import Identity
from pipeline.store.tables.labels import read_label_map
from pipeline.store.tables.schemas import embedding_matrix, read_table

# Fresh files are combined into one block until they have this many rows. A full block stays as it is when files are
# added. The last block, which is not full, is built again with each added file.
GROUP_ROWS = 4_096

_COLUMNS = ("id", "uri", "label", "dataset", "embedding")
_Key = tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """The part of a memory that one of several processes opens: every `of`-th shard and block of fresh entries."""

    number: int
    of: int

    def holds(self, position: int) -> bool:
        return position % self.of == self.number


ALL = Share(0, 1)


@dataclass
class OpenedBlocks:
    """The blocks of one version.

    `codes` numbers the labels and only grows. `stored` has the blocks as stored, and `laid` the same blocks with the
    overlay. Their keys name what the blocks were read from. `lists` are those of shards that can be merged, by the path
    of their index. `num_shards` is the number of shards that could be opened, and `damaged` has the error of each other
    shard. `tables` are the files of the last fresh block, to which files may be added. `pending_table` has the rows of
    `pending`: single adds that no file holds yet.
    """

    codes: dict[str, int] = field(default_factory=dict)
    stored: dict[_Key, Block] = field(default_factory=dict)
    lists: dict[str, ShardLists] = field(default_factory=dict)
    tables: dict[str, pa.Table] = field(default_factory=dict)
    overlay: Overlay = field(default_factory=Overlay)
    laid: dict[_Key, Block] = field(default_factory=dict)
    num_shards: int = 0
    damaged: tuple[DamagedFile, ...] = ()
    pending: tuple[Single, ...] = ()
    pending_table: pa.Table | None = None

    @property
    def blocks(self) -> list[Block]:
        return list(self.laid.values())


def open_blocks(
    storage: Storage,
    state: State,
    before: OpenedBlocks | None = None,
    share: Share = ALL,
    *,
    merged: bool = False,
) -> OpenedBlocks:
    """The blocks of a version: its shards, then its fresh entries. A damaged shard is left out and listed in `damaged`.

    `before` must be of the same share. If `merged`, the lists of shards are merged (merging.py).
    Raises DamagedFile if another file is damaged.
    """
    before = before or OpenedBlocks()
    opened = OpenedBlocks(codes=dict(before.codes), overlay=before.overlay.grown(storage, state))
    dimension = state.identity.dimension if state.identity else 0
    if state.index is not None:
        _open_shards(storage, state.index, state.entries_files(), dimension, opened, before, share, merged)
    groups = _groups(state.fresh_files())
    for position, group in enumerate(groups):
        if not share.holds(position):
            continue
        key = tuple(file.path for file in group)
        if key in before.stored:
            opened.stored[key] = before.stored[key]
            opened.tables = {path: before.tables[path] for path in key if path in before.tables}
        else:
            opened.tables = {file.path: _read(storage, file, before.tables) for file in group}
            opened.stored[key] = _fresh_block(pa.concat_tables(opened.tables.values()), opened.codes)
    if state.pending and state.identity is not None and share.holds(len(groups)):
        key = tuple(f"single {single.id}" for single in state.pending)
        opened.pending, opened.pending_table = state.pending, _pending_table(state.pending, state.identity, before)
        known = before.stored.get(key)
        opened.stored[key] = known or _fresh_block(opened.pending_table, opened.codes)
    _lay_over(opened, before)
    return opened


def _open_shards(
    storage: Storage,
    index: Index,
    files: Sequence[RowsFile],
    dimension: int,
    opened: OpenedBlocks,
    before: OpenedBlocks,
    share: Share,
    merged: bool,
) -> None:
    """Open the shards of a share that `before` does not have. Damaged shards are left out."""
    shards: dict[_Key, tuple[Shard, list[RowsFile]]] = {}
    for shard in filter(lambda shard: share.holds(shard.number), index.shards):
        covered = files_covered(shard, files) if shard.vectors is None else []
        key = (shard.ids.path, index.parameters, index.rerank_for, *(file.path for file in covered))
        shards[key] = shard, covered
    hashed = read_ahead(storage, [shard for key, (shard, _) in shards.items() if key not in before.stored])
    lists_of: dict[_Key, ShardLists] = {}
    for key, (shard, covered) in shards.items():
        lists = before.lists.get(shard.index.path) if shard.index else None
        block = before.stored.get(key)
        if block is None:
            try:
                block, lists = open_shard(
                    storage, index, shard, dimension, opened.codes, covered, lists, hashed=hashed, merged=merged
                )
            except DamagedFile as error:
                opened.damaged += (error,)
                continue
        opened.stored[key] = block
        if lists is not None and shard.index is not None:
            lists_of[key] = opened.lists[shard.index.path] = lists
    damaged = merge([*lists_of.values()])
    for key, lists in lists_of.items():
        if lists in damaged:
            opened.damaged += (damaged[lists],)
            del opened.stored[key]
    opened.lists = {path: lists for path, lists in opened.lists.items() if lists not in damaged}
    opened.num_shards = len(opened.stored)


@dataclass
class LabelSetBlocks:
    """The blocks of a version with the labels of a label set. A later version reuses those whose labels are the same.

    `codes` numbers the labels of the set and only grows. `translation` (int32 [C + 1]) has the code of each stored
    label, -1 for none, and -1 at its end. `of` has each block of the version, and the same rows under the labels of the
    set.
    """

    map: FileRef | None
    overlay: Overlay
    codes: dict[str, int] = field(default_factory=dict)
    translation: np.ndarray = field(default_factory=lambda: np.full(1, -1, np.int32))
    of: dict[_Key, tuple[Block, Block]] = field(default_factory=dict)

    @property
    def blocks(self) -> list[Block]:
        return [block for _, block in self.of.values()]

    def left_in(self, opened: OpenedBlocks) -> "LabelSetBlocks":
        """Without the blocks that another version does not have, so that they are not held any longer."""
        left = {key: pair for key, pair in self.of.items() if key in opened.laid}
        return replace(self, of=left)


def in_label_set(
    storage: Storage, opened: OpenedBlocks, map_file: FileRef | None, name: str, before: LabelSetBlocks | None = None
) -> LabelSetBlocks:
    """The blocks with the labels of a label set.

    An entry's own label in the set takes precedence over its stored label as mapped. Only blocks are translated that
    differ from those of `before`, an earlier version with the same map. Raises DamagedFile.
    """
    if before is None or before.map != map_file:
        before = LabelSetBlocks(map_file, Overlay())
    codes = dict(before.codes)
    translation = _translation(storage, opened.codes, map_file, codes, before.translation)
    found = LabelSetBlocks(map_file, opened.overlay, codes, translation)
    own = opened.overlay.own(name)
    relabelled = opened.overlay.relabelled_since(before.overlay, name)
    for key, block in opened.laid.items():
        base, known = before.of.get(key, (None, None))
        if base is not None and known is not None and not len(block.rows_of(relabelled)):
            if base is block:
                found.of[key] = base, known
                continue
            if base.codes_N is block.codes_N:
                found.of[key] = block, block.with_codes(known.codes_N)
                continue
        codes_N = translation[block.codes_N]
        _give(codes_N, block, own, codes)
        found.of[key] = block, block.with_codes(codes_N)
    return found


def _translation(
    storage: Storage, stored: Mapping[str, int], map_file: FileRef | None, codes: dict[str, int], known: np.ndarray
) -> np.ndarray:
    """The codes in a label set of all stored labels. Those of the first labels are known: the map is read for others.

    Labels of the set that are new get the next `codes`.
    """
    if len(known) > len(stored):
        return known
    mapped = read_label_map(storage, map_file) if map_file is not None else {}
    translation = np.full(len(stored) + 1, -1, np.int32)
    translation[: len(known) - 1] = known[:-1]
    for label, code in itertools.islice(stored.items(), len(known) - 1, None):
        if label in mapped:
            translation[code] = codes.setdefault(mapped[label], len(codes))
    return translation


def _lay_over(opened: OpenedBlocks, before: OpenedBlocks) -> None:
    """Apply the overlay to the stored blocks. Blocks in which it changes nothing are reused from `before`."""
    own = opened.overlay.own(None)
    relabelled = opened.overlay.relabelled_since(before.overlay, None)
    for key, block in opened.stored.items():
        known = before.laid.get(key) if before.stored.get(key) is block else None
        live_N, codes_N = (known or block).live_N, (known or block).codes_N
        if known is None or len(block.rows_of(opened.overlay.changed)):
            live_N = _live(block, opened.overlay.forgotten)
        if known is None or len(block.rows_of(relabelled)):
            codes_N = _relabelled(block, own, opened.codes)
        opened.laid[key] = (known or block).under(live_N, codes_N)


def _live(block: Block, forgotten: np.ndarray) -> np.ndarray:
    """The mask of the rows that are not forgotten: that of the block if all are its live rows."""
    rows = block.rows_of(forgotten)
    if not len(rows):
        return block.live_N
    live_N = block.live_N.copy()
    live_N[rows] = False
    return live_N


def _relabelled(block: Block, own: OwnLayers, codes: dict[str, int]) -> np.ndarray:
    """The codes of the rows with the entries' own labels: those of the block if it has no such entry."""
    codes_N = block.codes_N.copy()
    return codes_N if _give(codes_N, block, own, codes) else block.codes_N


def _give(codes_N: np.ndarray, block: Block, own: OwnLayers, codes: dict[str, int]) -> int:
    """Write the codes of entries' own labels into `codes_N`; returns how many. New labels get the next codes."""
    if not len(block.ids_N):
        return 0
    near = own.of(int(block.ids_N[0]), int(block.ids_N[-1]))
    positions, rows = block.located(near.ids_N)
    names = near.labels.take(pa.array(positions)).to_pylist()
    codes_N[rows] = [codes.setdefault(name, len(codes)) if name is not None else -1 for name in names]
    return len(rows)


def _groups(files: Sequence[RowsFile]) -> list[list[RowsFile]]:
    groups: list[list[RowsFile]] = []
    rows = GROUP_ROWS
    for file in files:
        if rows + file.rows > GROUP_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(file)
        rows += file.rows
    return groups


def _read(storage: Storage, file: RowsFile, known: Mapping[str, pa.Table]) -> pa.Table:
    if file.path in known:
        return known[file.path]
    return read_table(storage, file, _COLUMNS).replace_schema_metadata()


def _pending_table(pending: tuple[Single, ...], identity: Identity, before: OpenedBlocks) -> pa.Table:
    """The rows of single adds that no file holds yet. Rows that `before` has are not decoded again."""
    known = before.pending if pending[: len(before.pending)] == before.pending else ()
    added = pending[len(known) :]
    tables = [before.pending_table] if known and before.pending_table is not None else []
    if added:
        tables.append(table_of_singles(added, identity).select(_COLUMNS).replace_schema_metadata())
    return pa.concat_tables(tables).combine_chunks()


def _fresh_block(table: pa.Table, codes: dict[str, int]) -> Block:
    ids_N = table.column("id").to_numpy()
    encoded = table.column("label").dictionary_encode().combine_chunks()
    names = [codes.setdefault(name, len(codes)) for name in encoded.dictionary.to_pylist()]
    translation = np.array([*names, -1], np.int32)
    vectors_ND = embedding_matrix(table.column("embedding"))
    return Block(
        ids_N=ids_N,
        codes_N=translation[encoded.indices.fill_null(-1).to_numpy()],
        vectors_ND=vectors_ND,
        live_N=np.ones(len(ids_N), bool),
        uris=table.column("uri"),
        datasets=table.column("dataset"),
        make_finder=lambda rows_N: ExactFinder(vectors_ND, rows_N),
    )

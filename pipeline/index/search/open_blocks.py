"""Opens the live entries of one version as blocks, and reuses the blocks that an earlier version shares with it.

A stored file never changes under its name, so a block of stored rows is read once. Later changes of a version
(tombstones, other labels) form an overlay over these rows. The overlay is applied again only if it changed. So a reader
that follows the versions of a growing memory reads only what was added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from pipeline.errors import DamagedFile
from pipeline.index.search.blocks import Block
from pipeline.index.search.exact import ExactFinder
from pipeline.index.search.shard_files import files_covered, open_shard, read_ahead
from pipeline.store.log.records import Single
from pipeline.store.log.single_adds import table_of_singles
from pipeline.store.log.state import State
from pipeline.store.storage.file_refs import FileRef, RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.identity import Identity
from pipeline.store.tables.labels import OwnLabels, newest_labels, read_label_map, read_label_rows
from pipeline.store.tables.schemas import LABELS, embedding_matrix, read_table
from pipeline.store.tables.tombstones import read_tombstones

# Fresh files are combined into one block until they have this many rows. A full block stays as it is when files are
# added. The last block, which is not full, is built again with each added file.
GROUP_ROWS = 4_096

_COLUMNS = ("id", "uri", "label", "dataset", "embedding")
_Key = tuple[str, ...]


@dataclass(frozen=True)
class Overlay:
    """What a version changes in the stored rows: forgotten ids (int64 [N], ascending), and rows with other labels."""

    tombstones: tuple[FileRef, ...]
    labels: tuple[FileRef, ...]
    forgotten: np.ndarray
    own_labels: pa.Table

    def same_as(self, other: "Overlay") -> bool:
        return (self.tombstones, self.labels) == (other.tombstones, other.labels)


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
    overlay. Their keys name what the blocks were read from. `num_shards` is the number of shards that could be opened,
    and `damaged` has the error of each other shard. `tables` are the files of the last fresh block, to which files may
    be added. `pending_table` has the rows of `pending`: single adds that no file holds yet.
    """

    codes: dict[str, int] = field(default_factory=dict)
    stored: dict[_Key, Block] = field(default_factory=dict)
    tables: dict[str, pa.Table] = field(default_factory=dict)
    overlay: Overlay = field(default_factory=lambda: Overlay((), (), np.empty(0, np.int64), LABELS.empty_table()))
    laid: dict[_Key, Block] = field(default_factory=dict)
    num_shards: int = 0
    damaged: tuple[DamagedFile, ...] = ()
    pending: tuple[Single, ...] = ()
    pending_table: pa.Table | None = None

    @property
    def blocks(self) -> list[Block]:
        return list(self.laid.values())


def open_blocks(storage: Storage, state: State, before: OpenedBlocks | None = None, share: Share = ALL) -> OpenedBlocks:
    """The blocks of a version: its shards, then its fresh entries. A damaged shard is left out and listed in `damaged`.

    `before` must be of the same share. Raises DamagedFile if another file is damaged.
    """
    before = before or OpenedBlocks()
    opened = OpenedBlocks(codes=dict(before.codes), overlay=_overlay(storage, state, before.overlay))
    dimension = state.identity.dimension if state.identity else 0
    if state.index is not None:
        files = state.entries_files()
        shares = []
        for shard in filter(lambda shard: share.holds(shard.number), state.index.shards):
            covered = files_covered(shard, files) if shard.vectors is None else []
            key: _Key = (shard.ids.path, state.index.parameters, *(file.path for file in covered))
            shares.append((key, shard, covered))
        hashed = read_ahead(storage, [shard for key, shard, _ in shares if key not in before.stored])
        for key, shard, covered in shares:
            try:
                opened.stored[key] = before.stored.get(key) or open_shard(
                    storage, state.index, shard, dimension, opened.codes, covered, hashed=hashed
                )
            except DamagedFile as error:
                opened.damaged += (error,)
            else:
                opened.num_shards += 1
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


def in_label_set(
    storage: Storage, opened: OpenedBlocks, map_file: FileRef | None, name: str
) -> tuple[list[Block], list[str]]:
    """The blocks with the labels of a label set, and those labels in the order of their codes.

    An entry's own label in the set takes precedence over its stored label as mapped. Raises DamagedFile.
    """
    mapped = read_label_map(storage, map_file) if map_file is not None else {}
    codes: dict[str, int] = {}
    translation = np.full(len(opened.codes) + 1, -1, np.int32)
    for label, code in opened.codes.items():
        if label in mapped:
            translation[code] = codes.setdefault(mapped[label], len(codes))
    own = newest_labels(opened.overlay.own_labels, name)
    blocks = []
    for block in opened.blocks:
        codes_N = translation[block.codes_N]
        _give(codes_N, block, own, codes)
        blocks.append(block.with_codes(codes_N))
    return blocks, list(codes)


def _overlay(storage: Storage, state: State, before: Overlay) -> Overlay:
    forgotten, own_labels = before.forgotten, before.own_labels
    if state.tombstones != before.tombstones:
        known = state.tombstones[: len(before.tombstones)] == before.tombstones
        added = state.tombstones[len(before.tombstones) :] if known else state.tombstones
        read = read_tombstones(storage, added)
        forgotten = np.union1d(before.forgotten, read) if known else read
    if state.labels != before.labels:
        known = state.labels[: len(before.labels)] == before.labels
        added = state.labels[len(before.labels) :] if known else state.labels
        own_labels = read_label_rows(storage, added)
        own_labels = pa.concat_tables([before.own_labels, own_labels]) if known else own_labels
    return Overlay(state.tombstones, state.labels, forgotten, own_labels)


def _lay_over(opened: OpenedBlocks, before: OpenedBlocks) -> None:
    """Apply the overlay to the stored blocks. Blocks that already have this overlay are reused from `before`."""
    unchanged = opened.overlay.same_as(before.overlay)
    own: OwnLabels | None = None
    for key, block in opened.stored.items():
        known = before.laid.get(key) if before.stored.get(key) is block else None
        if known is not None and unchanged:
            opened.laid[key] = known
            continue
        own = own or newest_labels(opened.overlay.own_labels, None)
        opened.laid[key] = _laid_over(block, opened.overlay.forgotten, own, opened.codes, known)


def _laid_over(
    block: Block, forgotten: np.ndarray, own: OwnLabels, codes: dict[str, int], known: Block | None
) -> Block:
    live_N = np.ones(len(block.ids_N), bool)
    live_N[block.rows_of(forgotten)] = False
    codes_N = block.codes_N
    if len(block.rows_of(own.ids_N)):
        codes_N = codes_N.copy()
        _give(codes_N, block, own, codes)
    laid = replace(block, codes_N=codes_N, live_N=live_N)
    if known is not None:
        laid.keep_finders(known)
    return laid


def _give(codes_N: np.ndarray, block: Block, own: OwnLabels, codes: dict[str, int]) -> None:
    """Write the codes of entries' own labels into `codes_N`. New labels get the next codes."""
    positions, rows = block.located(own.ids_N)
    names = own.labels.take(pa.array(positions)).to_pylist()
    codes_N[rows] = [codes.setdefault(name, len(codes)) if name is not None else -1 for name in names]


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
    encoded = table.column("label").combine_chunks().dictionary_encode()
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

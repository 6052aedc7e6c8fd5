"""A shard on disk: dense rows in the order of their ids. Side arrays and a FAISS index, all memory-mapped.

ids.npy        int64 [N]       row -> entry id
labels.npy     int32 [N]       row -> code into the vocabulary in entries.arrow's metadata, -1 for no label
vectors.f16    float16 [N, D]  raw, row-major; FAISS maps it to score candidates again; absent with `--refine none`
entries.arrow  Arrow IPC: uri, dataset and kept columns of each row
index.faiss    FAISS ids are row numbers; absent for the key Flat, which searches vectors.f16 directly

An inverted file is written without its centroids, which are those of the generation (trained.faiss). Releases up to
0.1 stored them again in each shard. Such a shard is opened as well, and its own centroids are dropped.
"""

import contextlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal
from weakref import WeakValueDictionary

import faiss
import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipeline.errors import DamagedFile
from pipeline.index.search.ann import GraphFinder, ListFinder
from pipeline.index.search.blocks import Block, Candidates, Finder, MakeFinder
from pipeline.index.search.exact import ExactFinder
from pipeline.index.search.merging import ShardLists, can_be_merged, sizes_of
from pipeline.index.search.parameters import values_of
from pipeline.index.search.quantizer import Coarse, Quantizer, has_centroids, without_centroids
from pipeline.index.search.remaining_rows import keep_rows
from pipeline.index.search.soundness import check_index, read_index
from pipeline.index.search.stack import Seat, Stack
from pipeline.resources import available_bytes
from pipeline.store.layout import ENTRIES_FILE, FAISS_FILE, IDS_FILE, LABELS_FILE, VECTORS_FILE
from pipeline.store.log.records import Index, Shard
from pipeline.store.storage.file_refs import FileRef, RowsFile, check_path, describe, reading, unaltered_path
from pipeline.store.storage.interface import Storage, released
from pipeline.store.tables.embedding_rows import read_embeddings
from pipeline.store.tables.ids import is_in
from pipeline.store.tables.kept_columns import FIXED, kept_after, union, with_columns
from pipeline.store.tables.schemas import embedding_matrix, read_table

SHARE_READ_AHEAD = 0.5  # of the available memory
READERS = 4  # files read and hashed at a time, at most
ROWS_COPIED = 65_536  # vectors converted or copied at a time

_LABELS = b"visual_memory.labels"
_TOLD = ("uri", "dataset")  # columns of every entry; kept columns follow

_quantizers: WeakValueDictionary[tuple[str, str, str | None], Quantizer] = WeakValueDictionary()
_reading_quantizers = threading.Lock()


class SideFiles(BaseModel):
    """The files of a shard, except its FAISS index."""

    model_config = ConfigDict(frozen=True)

    ids: FileRef
    labels: FileRef
    vectors: FileRef
    entries: FileRef

    @property
    def rows(self) -> int:
        return self.ids.rows


def write_side_files(storage: Storage, folder: str, files: Sequence[RowsFile], forgotten: np.ndarray) -> SideFiles:
    """Write the live rows of some entries files to the side files of a shard. Reads one entries file at a time."""
    ids, labels, told = [], [], []
    with storage.publishing(f"{folder}{VECTORS_FILE}") as local:
        with local.open("wb") as stream:
            for file in files:
                with released(storage, file.path):
                    table = read_table(storage, file)
                alive = ~is_in(table.column("id").to_numpy(), forgotten)
                table = table.filter(pa.array(alive))
                stream.write(np.ascontiguousarray(embedding_matrix(table.column("embedding"))).data)
                ids.append(table.column("id").to_numpy())
                labels += table.column("label").chunks
                told.append(table.drop_columns([name for name in FIXED if name not in _TOLD]))
        ids_N = np.concatenate(ids) if ids else np.empty(0, np.int64)
        vectors = describe(f"{folder}{VECTORS_FILE}", local, len(ids_N))
    encoded = pa.chunked_array(labels, pa.string()).dictionary_encode().combine_chunks()
    codes_N = encoded.indices.fill_null(-1).to_numpy().astype(np.int32)
    kept = union([kept_after(table.schema, len(_TOLD)) for table in told])
    schema = pa.schema(
        [*(pa.field(name, pa.string()) for name in _TOLD), *(column.field for column in kept)],
        metadata={_LABELS: json.dumps(encoded.dictionary.to_pylist())},
    )
    table = pa.concat_tables([schema.empty_table(), *(with_columns(each, schema) for each in told)])
    return SideFiles(
        ids=_write_array(storage, f"{folder}{IDS_FILE}", ids_N),
        labels=_write_array(storage, f"{folder}{LABELS_FILE}", codes_N),
        vectors=vectors,
        entries=_write_ipc(storage, f"{folder}{ENTRIES_FILE}", table),
    )


def mapped_vectors(storage: Storage, vectors: FileRef, dimension: int, *, hashed: bool = True) -> np.ndarray:
    """The vectors of a shard, float16 [N, D], memory-mapped. Raises DamagedFile."""
    local = (unaltered_path if hashed else check_path)(storage, vectors)
    with reading(storage.uri, vectors.path):
        if vectors.num_bytes != vectors.rows * dimension * np.dtype(np.float16).itemsize:
            raise ValueError(f"it does not hold {vectors.rows:,} vectors of {dimension} dimensions")
        if not vectors.rows:
            return np.empty((0, dimension), np.float16)
        return np.memmap(local, np.float16, mode="r", shape=(vectors.rows, dimension))


def write_vectors(storage: Storage, path: str, vectors_ND: np.ndarray, rows: np.ndarray) -> FileRef:
    """Publish some rows of a matrix of vectors, unchanged. Copies a bounded number of rows at a time."""
    with storage.publishing(path) as local:
        with local.open("wb") as stream:
            for start in range(0, len(rows), ROWS_COPIED):
                stream.write(np.ascontiguousarray(vectors_ND[rows[start : start + ROWS_COPIED]]).data)
        return describe(path, local, len(rows))


def write_faiss(storage: Storage, path: str, index: faiss.Index, *, with_centroids: bool = True) -> FileRef:
    """Publish a FAISS index. Its centroids are left out unless `with_centroids`."""
    with storage.publishing(path) as local:
        try:
            with contextlib.nullcontext() if with_centroids else without_centroids(index):
                faiss.write_index(index, str(local))
        except RuntimeError as error:  # the only error of FAISS; its message ends with the reason
            raise OSError(f"{path} could not be written: {str(error).rpartition(':')[2].strip()}") from error
        return describe(path, local, index.ntotal)


def read_faiss(storage: Storage, file: FileRef, *, mapped: bool = True, hashed: bool = True) -> faiss.Index:
    """Map a published FAISS index. Load it into memory if not `mapped`, or if its kind cannot be mapped.

    An index that was written without its centroids must be given some before it is searched (quantizer.py).
    Raises DamagedFile, also if a search would read outside the index.
    """
    local = (unaltered_path if hashed else check_path)(storage, file)
    with reading(storage.uri, file.path):
        index = read_index(local, mapped=mapped)
        check_index(index, file.rows)
        return index


def open_shard(
    storage: Storage,
    index: Index,
    shard: Shard,
    dimension: int,
    codes: dict[str, int],
    files: Sequence[RowsFile],
    known: ShardLists | None = None,
    *,
    hashed: bool = True,
    merged: bool = False,
) -> tuple[Block, ShardLists | None]:
    """A shard as a block, and its lists if these are to be `merged` with those of others and can be.

    The lists must have a seat before the block is searched (merging.py). They are not read if they are `known`. Labels
    that are new are added to the vocabulary `codes`. Raises DamagedFile.

    `files` are the entries files that the shard was built from. Vectors are read from them if the shard stores none.
    If `hashed`, every byte of the shard's files is hashed, once per process. Otherwise the vectors and the index are
    not hashed.
    """
    ids_N = _read_array(storage, shard.ids, np.int64)
    local_codes = _read_array(storage, shard.labels, np.int32)
    table, names = _read_entries(storage, shard.entries)
    with reading(storage.uri, shard.labels.path):
        if len(local_codes) and not -1 <= local_codes.min() <= local_codes.max() < len(names):
            raise ValueError("it has codes of labels that there are not")
    vectors_ND = mapped_vectors(storage, shard.vectors, dimension, hashed=hashed) if shard.vectors else None
    with reading(storage.uri, shard.ids.path):
        rows = {len(ids_N), len(local_codes), len(table), len(ids_N) if vectors_ND is None else len(vectors_ND)}
        if rows != {shard.rows}:
            raise ValueError("the files of its shard have not as many rows")
    lists: ShardLists | None = known
    if known is not None:
        make_finder = _in_stack(index, known, vectors_ND)
    else:
        make_finder, lists = _finder_maker(storage, index, shard, vectors_ND, dimension, hashed, merged)
    translation = np.array([codes.setdefault(name, len(codes)) for name in names] + [-1], np.int32)
    with reading(storage.uri, shard.ids.path):
        block = Block(
            ids_N=ids_N,
            codes_N=translation[local_codes],
            vectors_ND=vectors_ND,
            live_N=np.ones(len(ids_N), bool),
            uris=table.column("uri"),
            datasets=table.column("dataset"),
            make_finder=make_finder,
            kept={name: table.column(name) for name in table.column_names if name not in _TOLD},
            read_vectors=lambda ids_N: read_embeddings(storage, files, ids_N, dimension),
        )
    return block, lists


def read_ahead(storage: Storage, shards: Sequence[Shard]) -> bool:
    """Read and hash the files of shards once, into the system's page cache, if they fit. Returns whether they fit.

    The files are mapped and searched at random. From a cold disk, each question would wait for thousands of pages.
    Altered files are found before they are used. POSIX_FADV_WILLNEED reads no more than the device's own readahead.
    """
    files = [f for s in shards for f in (s.index, s.ids, s.labels, s.vectors, s.entries) if f is not None]
    if sum(file.num_bytes for file in files) > available_bytes() * SHARE_READ_AHEAD:
        return False

    def read(file: FileRef) -> None:
        with contextlib.suppress(DamagedFile):  # `open_shard` reports it
            unaltered_path(storage, file)

    if files:
        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
            for _ in pool.map(read, sorted(files, key=lambda file: -file.num_bytes)):
                pass
    return True


def files_covered(shard: Shard, files: Sequence[RowsFile]) -> list[RowsFile]:
    """The entries files that hold rows of a shard."""
    return [f for f in files if any(first <= f.last_id and f.first_id <= last for first, last in shard.covers)]


def read_quantizer(storage: Storage, trained: FileRef) -> Quantizer:
    """The quantizer of a generation. A process reads and hashes it once, and keeps it while it is used.

    Raises DamagedFile.
    """
    key = (storage.uri, trained.path, trained.sha256)
    with _reading_quantizers:
        quantizer = _quantizers.get(key)
        if quantizer is None:
            index = read_faiss(storage, trained)
            with reading(storage.uri, trained.path):
                quantizer = _quantizers[key] = Quantizer(index)
                if quantizer.centroids.ntotal != quantizer.num_lists:
                    raise ValueError("it has no centroids")
        return quantizer


def _finder_maker(
    storage: Storage,
    index: Index,
    shard: Shard,
    vectors_ND: np.ndarray | None,
    dimension: int,
    hashed: bool,
    merged: bool,
) -> tuple[MakeFinder, ShardLists | None]:
    if shard.index is None:
        with reading(storage.uri, shard.ids.path):
            if vectors_ND is None:
                raise ValueError("its shard has neither an index nor vectors")
        exact_ND = vectors_ND
        return lambda rows_N: ExactFinder(exact_ND, rows_N), None
    file, path = shard.index, shard.index.path

    def read() -> tuple[faiss.Index, Quantizer | None]:
        faiss_index = read_faiss(storage, file, hashed=hashed)
        quantizer = _given_quantizer(storage, index, faiss_index, path)
        with reading(storage.uri, path):
            if (faiss_index.ntotal, faiss_index.d) != (shard.rows, dimension):
                raise ValueError(f"it holds {faiss_index.ntotal:,} vectors of {faiss_index.d} dimensions")
        return faiss_index, quantizer

    faiss_index, quantizer = read()
    with reading(storage.uri, path):
        values = values_of(index, has_lists=faiss.try_extract_index_ivf(faiss_index) is not None)
    if faiss.try_extract_index_ivf(faiss_index) is None:
        return lambda rows_N: _WatchedGraph(storage.uri, path, faiss_index, values, rows_N, vectors_ND), None
    if merged and quantizer is not None and can_be_merged(faiss_index, quantizer):
        lists = ShardLists(lambda: read()[0], quantizer, shard.rows, sizes_of(faiss_index))
        return _in_stack(index, lists, vectors_ND), lists
    stack = Stack(faiss_index, quantizer, [shard.rows], lambda: reading(storage.uri, path))
    return lambda rows_N: ListFinder(Seat(stack), values, rows_N, vectors_ND), None


def _in_stack(index: Index, lists: ShardLists, vectors_ND: np.ndarray | None) -> MakeFinder:
    values = values_of(index, has_lists=True)

    def make_finder(rows_N: np.ndarray) -> Finder:
        assert lists.seat is not None  # noqa: S101  # given by `merge`
        return ListFinder(lists.seat, values, rows_N, vectors_ND)

    return make_finder


def _given_quantizer(storage: Storage, index: Index, faiss_index: faiss.Index, path: str) -> Quantizer | None:
    """The quantizer of the generation, given to an inverted file; None if the file keeps its own, or has no lists.

    It keeps its own if the quantizer of the generation is damaged or another one. Raises DamagedFile if it has none.
    """
    if faiss.try_extract_index_ivf(faiss_index) is None or index.trained is None:
        return None
    try:
        quantizer = read_quantizer(storage, index.trained)
    except DamagedFile:
        if has_centroids(faiss_index):
            return None
        raise
    with reading(storage.uri, path):
        return quantizer if quantizer.give_to(faiss_index) else None


class _WatchedGraph(GraphFinder):
    """A finder in a file. An error in a search is reported as damage of the file."""

    def __init__(
        self,
        uri: str,
        path: str,
        index: faiss.Index,
        values: dict[str, int],
        rows_N: np.ndarray,
        vectors_ND: np.ndarray | None,
    ) -> None:
        self._uri, self._path = uri, path
        with reading(uri, path):
            super().__init__(index, values, rows_N, vectors_ND)

    def find(self, queries_QD: np.ndarray, k: int, coarse: Coarse | None = None) -> Candidates:
        with reading(self._uri, self._path):
            return super().find(queries_QD, k, coarse)


def _write_array(storage: Storage, path: str, array: np.ndarray) -> FileRef:
    with storage.publishing(path) as local:
        with local.open("wb") as stream:
            np.save(stream, array)
        return describe(path, local, len(array))


def _write_ipc(storage: Storage, path: str, table: pa.Table) -> FileRef:
    with storage.publishing(path) as local:
        with pa.ipc.new_file(str(local), table.schema) as writer:
            writer.write_table(table)
        return describe(path, local, table.num_rows)


def _read_array(storage: Storage, file: FileRef, dtype: type[np.generic]) -> np.ndarray:
    local = unaltered_path(storage, file)
    with reading(storage.uri, file.path):
        mapped: Literal["r"] | None = "r" if file.rows else None  # an empty file cannot be mapped
        array: np.ndarray = np.load(local, mmap_mode=mapped, allow_pickle=False)
        if (array.dtype, array.shape) != (dtype, (file.rows,)):
            raise ValueError(f"it holds {array.dtype} {list(array.shape)} where {file.rows:,} numbers were written")
    return array


def _read_entries(storage: Storage, file: FileRef) -> tuple[pa.Table, list[str]]:
    """The uri, dataset and kept columns of the rows (mapped, every value validated), and the names of the labels."""
    local = unaltered_path(storage, file)
    with reading(storage.uri, file.path):
        table = pa.ipc.open_file(pa.memory_map(str(local))).read_all()
        table.validate(full=True)
        names = json.loads(table.schema.metadata[_LABELS])
        if any(table.schema.field(name).type != pa.string() or table[name].null_count for name in _TOLD):
            raise ValueError("it has rows without a uri or a dataset")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its labels are no names")  # a fault of the contents of the file
    return table, names


def without_entries(
    storage: Storage,
    folder: str,
    index: Index,
    shard: Shard,
    dimension: int,
    erased: np.ndarray,
    files: Sequence[RowsFile],
) -> Shard | None:
    """Rewrite a shard below `folder` without some entries (ids int64 [N]). Returns None if no row is left.

    The codes of the remaining rows are copied; kinds of index that do not allow it (HNSW) are filled again. `files` are
    entries files that hold the remaining entries. Their vectors are read only to fill an index again whose shard stores
    none. The trained quantizer does not change. Labels that only erased entries had are removed.

    Every file of the shard is read and written once; RAM holds its FAISS index. Raises DamagedFile.
    """
    ids_N = _read_array(storage, shard.ids, np.int64)
    kept = ~is_in(ids_N, np.unique(erased))
    kept_N = np.flatnonzero(kept)
    if not len(kept_N):
        return None
    table, names = _read_entries(storage, shard.entries)
    codes_N = _read_array(storage, shard.labels, np.int32)[kept_N]
    used = np.unique(codes_N[codes_N >= 0])
    table = table.replace_schema_metadata({_LABELS: json.dumps([names[code] for code in used])})
    vectors_ND = mapped_vectors(storage, shard.vectors, dimension) if shard.vectors else None
    changes: dict[str, object] = {
        "rows": len(kept_N),
        "ids": _write_array(storage, f"{folder}{IDS_FILE}", ids_N[kept_N]),
        "labels": _write_array(storage, f"{folder}{LABELS_FILE}", _renumbered(codes_N, used)),
        "entries": _write_ipc(storage, f"{folder}{ENTRIES_FILE}", table.filter(pa.array(kept))),
    }
    if vectors_ND is not None:
        changes["vectors"] = write_vectors(storage, f"{folder}{VECTORS_FILE}", vectors_ND, kept_N)
    if shard.index is not None and index.trained is not None:
        remaining = read_faiss(storage, shard.index, mapped=False)
        with reading(storage.uri, shard.index.path):
            if remaining.ntotal != len(ids_N):
                raise ValueError(f"it holds {remaining.ntotal:,} vectors where its shard has {len(ids_N):,}")
        if not keep_rows(remaining, kept_N):
            remaining = read_faiss(storage, index.trained, mapped=False)
            for start in range(0, len(kept_N), ROWS_COPIED):
                rows = kept_N[start : start + ROWS_COPIED]
                if vectors_ND is not None:
                    added_ND = vectors_ND[rows]
                else:
                    added_ND = read_embeddings(storage, files, ids_N[rows], dimension)
                remaining.add(np.ascontiguousarray(added_ND, np.float32))
        changes["index"] = write_faiss(storage, f"{folder}{FAISS_FILE}", remaining, with_centroids=False)
    return shard.model_copy(update=changes)


def shard_ids(storage: Storage, shard: Shard) -> np.ndarray:
    """The entry ids of a shard, int64 [N] ascending. Raises DamagedFile."""
    return _read_array(storage, shard.ids, np.int64)


def _renumbered(codes_N: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Label codes int32 [N] as positions in the codes in use (ascending); -1 stays -1."""
    positions: np.ndarray = np.where(codes_N >= 0, np.searchsorted(used, codes_N), -1).astype(np.int32)
    return positions

"""Opens a FAISS index from an untrusted file: no size or row number in the file is trusted.

FAISS checks most of what it reads. This module checks the rest before the first search: how much memory the file may
request, and whether lists and graph point only at existing rows. A row beyond the last would be read from memory
outside the index.
"""

import threading
from pathlib import Path

import faiss
import numpy as np

_reading = threading.Lock()  # the limits of FAISS hold for the whole process

# FAISS applies the same limit to the table of a product quantizer, although the table is not part of the file. The
# table takes at most 1,024 bytes for each number of a centroid, which takes 4 bytes in the file. FAISS makes no table
# of more than 2 GiB.
TABLE_FACTOR = 256
TABLE_BYTES = 2 << 30


def read_index(local: Path, *, mapped: bool) -> faiss.Index:
    """A FAISS index from a file, mapped if its kind allows it. Nothing in it may be longer than the file.

    If there is a product quantizer's table, what follows it may claim 2 GiB more. Raises RuntimeError, MemoryError or
    any other error of FAISS.
    """
    num_bytes = max(local.stat().st_size, 1)
    flags = faiss.IO_FLAG_MMAP_IFC if mapped else 0
    try:
        return _read_within(local, flags, num_bytes)
    except RuntimeError as error:
        if "precomputed_table" not in str(error):
            raise
    return _read_within(local, flags, min(TABLE_FACTOR * num_bytes, num_bytes + TABLE_BYTES) + 1)


def _read_within(local: Path, flags: int, most_bytes: int) -> faiss.Index:
    with _reading:
        vectors, loops = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
        faiss.set_deserialization_vector_byte_limit(most_bytes)
        faiss.set_deserialization_loop_limit(most_bytes)
        try:
            return faiss.read_index(str(local), flags)
        finally:
            faiss.set_deserialization_vector_byte_limit(vectors)
            faiss.set_deserialization_loop_limit(loops)


def check_index(index: faiss.Index, rows: int) -> None:
    """Check that a search in an index of so many rows stays within the index. Raises ValueError.

    An inverted file may have no centroids: it is then searched with those of its generation.
    Reads the row numbers (8 bytes a row) and the links of a graph (4 bytes each). A key may also name kinds of index
    that are not used here. Only their number of rows is checked, because their bytes are hashed.
    """
    if index.ntotal != rows:
        raise ValueError(f"it holds {index.ntotal:,} vectors where {rows:,} were written")
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        _check_chain(index)
        check_index(index.index, rows)
    elif isinstance(index, faiss.IndexIVF):
        _check_lists(index)
    elif isinstance(index, faiss.IndexHNSW):
        _check_graph(index)
    if isinstance(index, faiss.IndexFlatCodes) and index.codes.size() != rows * index.code_size:
        raise ValueError("it has not as many codes as rows")


def _check_chain(index: faiss.IndexPreTransform) -> None:
    width = index.d
    for position in range(index.chain.size()):
        step = faiss.downcast_VectorTransform(index.chain.at(position))
        if step.d_in != width:
            raise ValueError("its transformations do not follow upon each other")
        if isinstance(step, faiss.LinearTransform) and not _has_its_numbers(step):
            raise ValueError("a transformation has not as many numbers as it needs")
        width = step.d_out
    if index.index.d != width:
        raise ValueError("its transformations do not lead to what is searched")


def _has_its_numbers(step: faiss.LinearTransform) -> bool:
    added = step.b.size()
    return step.A.size() == step.d_in * step.d_out and (added == step.d_out or not (added or step.have_bias))


def _check_lists(index: faiss.IndexIVF) -> None:
    lists = faiss.downcast_InvertedLists(index.invlists)
    centroids = index.quantizer.ntotal
    if index.nlist != lists.nlist or centroids not in (0, index.nlist) or index.quantizer.d != index.d:
        raise ValueError(f"it has {lists.nlist:,} lists and {centroids:,} centroids")
    if isinstance(lists, faiss.BlockInvertedLists):  # for fast scan, which interleaves the codes of a block
        whole = isinstance(index, faiss.IndexIVFFastScan) and index.bbs == lists.n_per_block > 0
        fits = whole and lists.block_size == index.bbs * index.M2 // 2
    else:
        fits = index.code_size == lists.code_size
    if not fits:
        raise ValueError("its lists hold codes of another size than it makes")
    check_index(index.quantizer, centroids)
    seen_N = np.zeros(index.ntotal, bool)
    found = 0
    for number in range(index.nlist):
        size = lists.list_size(number)
        if not size:
            continue
        found += size
        if found > index.ntotal:
            break
        rows_N = faiss.rev_swig_ptr(lists.get_ids(number), size)
        if int(rows_N.min()) < 0 or int(rows_N.max()) >= index.ntotal:
            raise ValueError("a list names a row that there is not")
        seen_N[rows_N] = True
    if found != index.ntotal or not seen_N.all():
        raise ValueError("its lists do not hold each row once")


def _check_graph(index: faiss.IndexHNSW) -> None:
    graph, rows = index.hnsw, index.ntotal
    check_index(index.storage, rows)
    levels_N = faiss.vector_to_array(graph.levels)
    offsets_N = faiss.vector_to_array(graph.offsets).astype(np.int64)
    links = faiss.vector_to_array(graph.neighbors)
    per_level = faiss.vector_to_array(graph.cum_nneighbor_per_level)
    if len(levels_N) != rows or len(offsets_N) != rows + 1 or not -1 <= graph.entry_point < max(rows, 1):
        raise ValueError("its graph is not over its rows")
    if not rows:
        return
    if levels_N.min() < 1 or levels_N.max() >= len(per_level) or graph.max_level != levels_N[graph.entry_point] - 1:
        raise ValueError("its graph has other levels than it says")
    if offsets_N[0] or offsets_N[-1] != len(links) or (np.diff(offsets_N) != per_level[levels_N]).any():
        raise ValueError("its graph has other links than it says")
    if links.min() < -1 or links.max() >= rows:
        raise ValueError("its graph leads to a row that there is not")

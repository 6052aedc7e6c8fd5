"""Takes rows out of a FAISS index, or puts those of another one in, by copying codes rather than encoding rows again.

Encoding a row again assigns it to one of all centroids, which takes nearly all of the time of a build: with 65,536
lists, 474 s of one core for a shard of a million rows of 384 dimensions.
"""

import faiss
import numpy as np

# Kinds whose rows are nothing but a code in an inverted list. Others hold more about each row, such as the second codes
# of IVFPQR or the graph of HNSW.
_OF_LISTS = (
    faiss.IndexIVFFlat,
    faiss.IndexIVFScalarQuantizer,
    faiss.IndexIVFPQ,
    faiss.IndexIVFPQFastScan,
    faiss.IndexIVFRaBitQ,
    faiss.IndexIVFRaBitQFastScan,
)


def keep_rows(index: faiss.Index, kept_N: np.ndarray) -> bool:
    """Take all rows except `kept_N` (int64 [N] ascending) out of an index that is loaded into memory.

    The kept rows are numbered from 0, in order, and the order within each list stays: the index equals one that was
    filled with these rows alone. Returns False, and changes nothing, for kinds whose codes cannot be copied.
    """
    outer = faiss.downcast_index(index)
    inner = faiss.downcast_index(outer.index) if isinstance(outer, faiss.IndexPreTransform) else outer
    if type(inner) not in _OF_LISTS or inner.direct_map.type != faiss.DirectMap.NoMap:
        return False
    lists = faiss.downcast_InvertedLists(inner.invlists)
    if type(lists) not in (faiss.ArrayInvertedLists, faiss.BlockInvertedLists):
        return False
    numbers_N = np.full(inner.ntotal, -1, np.int64)
    numbers_N[kept_N] = np.arange(len(kept_N))
    for number in range(lists.nlist):
        if size := lists.list_size(number):
            ids = faiss.rev_swig_ptr(lists.get_ids(number), size)  # a view
            now = numbers_N[ids]
            if now.min() < 0:
                _keep_in_list(lists, number, now)
            else:
                ids[:] = now
    inner.ntotal = outer.ntotal = len(kept_N)
    return True


def _keep_in_list(lists: faiss.InvertedLists, number: int, now: np.ndarray) -> None:
    """Write a list anew with the rows whose number `now` (int64 [N]) is not negative. No old code stays in memory."""
    codes, ids = _codes_of(lists, number)[now >= 0], now[now >= 0]
    _stored(lists, number)[:] = 0
    lists.resize(number, 0)
    lists.resize(number, len(ids))  # blocks of fast scan are filled with zeros
    if len(ids):
        faiss.rev_swig_ptr(lists.get_ids(number), len(ids))[:] = ids
        _write_codes(lists, number, codes)


def append_rows(lists: faiss.InvertedLists, filled: np.ndarray, added: faiss.InvertedLists, start: int) -> None:
    """Write the rows of other lists of fast scan after the first `filled` (int64 [C]) rows of each list.

    The lists have room for them. The numbers of the added rows grow by `start`. `added` may be in use by searches.
    """
    lists, added = faiss.downcast_InvertedLists(lists), faiss.downcast_InvertedLists(added)
    for number in range(lists.nlist):
        size = added.list_size(number)
        if not size:
            continue
        begin = int(filled[number])
        ids = faiss.rev_swig_ptr(lists.get_ids(number), begin + size)  # a view
        np.add(faiss.rev_swig_ptr(added.get_ids(number), size), start, out=ids[begin:])
        codes, per_block = _codes_of(added, number), lists.n_per_block
        whole = begin // per_block  # blocks that are full
        if begin % per_block:
            before = _codes_in(lists, number, whole, whole + 1)[: begin % per_block]
            codes = np.concatenate([before, codes])
        _write_blocks(lists, number, whole, codes)


def _codes_of(lists: faiss.InvertedLists, number: int) -> np.ndarray:
    """A copy of the codes of a list, one after the other: uint8 [N, bytes of a code]."""
    size, stored = lists.list_size(number), _stored(lists, number)
    if isinstance(lists, faiss.ArrayInvertedLists):
        return stored.reshape(size, lists.code_size).copy()
    return _codes_in(lists, number, 0, -(-size // lists.n_per_block))[:size]


def _codes_in(lists: faiss.InvertedLists, number: int, first: int, end: int) -> np.ndarray:
    """The codes in some blocks of a list, in which fast scan interleaves those of the rows: uint8 [N, bytes]."""
    stored, packer = _stored(lists, number), lists.packer
    codes = np.zeros(((end - first) * packer.nvec, packer.code_size), np.uint8)
    for block in range(end - first):
        at = (first + block) * lists.block_size
        packer.unpack_all(faiss.swig_ptr(stored[at:]), faiss.swig_ptr(codes[block * packer.nvec :]))
    return codes


def _write_codes(lists: faiss.InvertedLists, number: int, codes: np.ndarray) -> None:
    """Write codes (uint8 [N, bytes of a code]) into a list of their number.

    FAISS 1.15's own `BlockInvertedLists.add_entries` reads codes at the wrong places: its code size is not set.
    """
    stored = _stored(lists, number)
    if isinstance(lists, faiss.ArrayInvertedLists):
        stored[:] = codes.reshape(-1)
        return
    _write_blocks(lists, number, 0, codes)


def _write_blocks(lists: faiss.InvertedLists, number: int, first: int, codes: np.ndarray) -> None:
    """Write codes (uint8 [N, bytes of a code]) into the blocks of a list from `first` on."""
    stored, packer = _stored(lists, number), lists.packer
    num_blocks = -(-len(codes) // packer.nvec)
    padded = np.zeros((num_blocks * packer.nvec, packer.code_size), np.uint8)
    padded[: len(codes)] = codes
    for block in range(num_blocks):
        at = (first + block) * lists.block_size
        packer.pack_all(faiss.swig_ptr(padded[block * packer.nvec :]), faiss.swig_ptr(stored[at:]))


def _stored(lists: faiss.InvertedLists, number: int) -> np.ndarray:
    """A view on the stored codes of a list that is not empty, uint8."""
    return faiss.rev_swig_ptr(lists.get_codes(number), _num_bytes(lists, number))  # type: ignore[no-any-return]


def _num_bytes(lists: faiss.InvertedLists, number: int) -> int:
    size = lists.list_size(number)
    if isinstance(lists, faiss.ArrayInvertedLists):
        return int(size * lists.code_size)
    return int(-(-size // lists.n_per_block) * lists.block_size)

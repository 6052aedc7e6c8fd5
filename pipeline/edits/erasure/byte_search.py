"""Searches bytes of any kind for whole vectors at any offset. Erasures and their proofs use this search.

Eight characteristic bytes of each vector are compared at every offset at once, through a table of hashes that hardly
any other bytes pass. Only at offsets that match is the rest of the vector compared.
"""

import mmap
import os
from pathlib import Path

import numpy as np

from pipeline.index.centroids import has_centroid_among
from pipeline.store.storage.file_refs import FileRef, check_path
from pipeline.store.storage.interface import Storage

WORD = 8
TABLE_BITS = 16
COMPARED_AT_ONCE = 4_096
BYTES_AT_ONCE = 8 << 20  # a multiple of WORD; a search takes three times as much RAM
FEW = 64  # up to so many offsets, comparing one by one is faster

_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: the upper bits of a product depend on all others
_SHIFT = np.uint64(64 - TABLE_BITS)

Searchable = bytes | mmap.mmap


class VectorSearch:
    """Searches for the bytes of vectors (float16 [N, D]), written as float16, float32 or float64."""

    def __init__(self, vectors_ND: np.ndarray) -> None:
        self._texts: list[bytes] = []  # the bytes of every vector in every dtype, one dtype after the other
        self._num_vectors = len(vectors_ND)
        self._is_short = vectors_ND.shape[1] * np.dtype(np.float16).itemsize < WORD
        tells, words = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
        for dtype in (np.float16, np.float32, np.float64) if vectors_ND.size else ():
            bytes_NB = np.ascontiguousarray(vectors_ND, dtype).view(np.uint8)
            self._texts += [row.tobytes() for row in bytes_NB]
            if not self._is_short:
                words_NW8 = bytes_NB[:, : bytes_NB.shape[1] // WORD * WORD].reshape(len(bytes_NB), -1, WORD)
                telling_N = np.count_nonzero(words_NW8, axis=2).argmax(axis=1)
                tells.append(telling_N * WORD)
                words.append(words_NW8[np.arange(len(bytes_NB)), telling_N].copy().view("<u8").ravel())
        self._tells = np.concatenate(tells).tolist()
        self._by_word: dict[int, list[int]] = {}
        for text, word in enumerate(np.concatenate(words).tolist()):
            self._by_word.setdefault(word, []).append(text)
        self._keys = np.array(sorted(self._by_word), np.uint64)
        self._table = np.zeros(1 << TABLE_BITS, bool)
        self._table[(self._keys * _SPREAD) >> _SHIFT] = True

    def rows_in(self, data: Searchable) -> list[int]:
        """The rows of the vectors whose bytes occur in `data`, ascending."""
        if self._is_short:
            return sorted({t % self._num_vectors for t, wanted in enumerate(self._texts) if data.find(wanted) >= 0})
        found: set[int] = set()
        for begin in range(0, len(data) - WORD + 1, BYTES_AT_ONCE) if self._texts else ():
            end = min(begin + BYTES_AT_ONCE + WORD - 1, len(data))
            for shift in range(begin, begin + min(WORD, end - begin - WORD + 1)):
                self._search(data, shift, (end - shift) // WORD, found)
        return sorted(found)

    def rows_in_file(self, local: Path) -> list[int]:
        """Like `rows_in` for a file on this machine, which is mapped rather than read into RAM."""
        with local.open("rb") as stream:
            if not os.fstat(stream.fileno()).st_size:
                return []
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return self.rows_in(data)

    def _search(self, data: Searchable, start: int, num_words: int, found: set[int]) -> None:
        """Add the rows of vectors whose telling word is one of `num_words` words from `start` on."""
        words = np.frombuffer(data, "<u8", count=num_words, offset=start)
        maybe = np.flatnonzero(self._table[(words * _SPREAD) >> _SHIFT])
        words = words[maybe]  # a copy: a view would keep a mapped file from being closed
        is_key = np.isin(words, self._keys)
        at, words = maybe[is_key], words[is_key]
        if not len(at):
            return
        order = np.argsort(words, kind="stable")
        here, begins = np.unique(words[order], return_index=True)
        for word, same in zip(here.tolist(), np.split(start + WORD * at[order], begins[1:]), strict=True):
            for text in self._by_word[word]:
                row = text % self._num_vectors
                if row not in found and _stands(data, self._texts[text], same - self._tells[text]):
                    found.add(row)


def _stands(data: Searchable, text: bytes, starts: np.ndarray) -> bool:
    """Whether `text` occurs in `data` at one of the offsets `starts`."""
    starts = starts[(starts >= 0) & (starts <= len(data) - len(text))]
    if len(starts) <= FEW:
        return any(data[start : start + len(text)] == text for start in starts.tolist())
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), len(text))
    wanted = np.frombuffer(text, np.uint8)
    return any(
        bool((windows[starts[begin : begin + COMPARED_AT_ONCE]] == wanted).all(axis=1).any())
        for begin in range(0, len(starts), COMPARED_AT_ONCE)
    )


def quantizer_holds(storage: Storage, trained: FileRef, vectors_ND: np.ndarray) -> bool:
    """Whether a trained index holds any of these vectors (float16 [N, D]): in its bytes, or as a centroid.

    Raises DamagedFile.
    """
    if not len(vectors_ND):
        return False
    if VectorSearch(vectors_ND).rows_in_file(check_path(storage, trained)):
        return True
    return has_centroid_among(storage, trained, vectors_ND)

"""A stack: one inverted file with the rows of one shard of a generation, or of several.

Row r of member m has the number `starts[m]` + r in the lists. Starts are multiples of 64, so that the bitmaps of the
members' rows lie one after the other in a bitmap of the stack.

Shapes: Q queries, K candidates, D dimensions, P lists.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import faiss
import numpy as np

from pipeline.deadline import look
from pipeline.index.search import parameters
from pipeline.index.search.quantizer import Lists, Quantizer, pieces_of
from pipeline.recent import Recent

ALIGNED_TO = 64  # rows
SELECTORS_BYTES = 32 << 20  # of cached bitmaps a stack: 1.25 MB each for ten million rows


class Mask:
    """Some rows of a member, as a bitmap. Two masks are the same only if they are one object."""

    def __init__(self, num_rows: int, rows_N: np.ndarray) -> None:
        allowed = np.zeros(num_rows, bool)
        allowed[rows_N] = True
        self.bits = np.packbits(allowed, bitorder="little")


Masks = Mapping[int, Mask | None]  # by member; None: all its rows; a member that is not named is not searched


class Stack:
    """An inverted file over the rows of its members. `index` owns it; `quantizer` is that of its generation.

    Each search is done within a context of `watching`, which may turn its errors into others.
    """

    def __init__(
        self,
        index: faiss.Index,
        quantizer: Quantizer | None,
        num_rows: Sequence[int],
        watching: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.index = index
        self._watching = watching
        self.inverted = faiss.downcast_index(faiss.try_extract_index_ivf(index))
        self.quantizer = Quantizer(index) if quantizer is None else quantizer
        self.starts = starts_of(num_rows)
        self.num_rows = tuple(num_rows)
        self._params = Recent[tuple[faiss.SearchParameters, object]](SELECTORS_BYTES)

    def search(
        self, lists: Lists, width: int, values: Mapping[str, int], masks: Masks
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best `width` rows of each query in its lists: float32 similarities and int64 numbers, -1 for none.

        Raises TooLate between pieces of the queries: a call of FAISS cannot be interrupted.
        """
        params = self._parameters(dict(values) | {"nprobe": lists.numbers_QP.shape[1]}, masks)
        found = []
        for piece in pieces_of(len(lists.queries_QD)):
            look()
            found.append(self._found(lists.of(piece), width, params))
        if len(found) == 1:
            return found[0]
        similarities_QK, numbers_QK = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return similarities_QK, numbers_QK

    def _found(self, lists: Lists, width: int, params: faiss.SearchParameters) -> tuple[np.ndarray, np.ndarray]:
        queries_QD, numbers_QP, centroids_QP = lists.queries_QD, lists.numbers_QP, lists.similarities_QP
        similarities_QK = np.empty((len(queries_QD), width), np.float32)
        found_QK = np.empty((len(queries_QD), width), np.int64)
        # `search_preassigned` of Python takes no parameters, and so neither a number of lists nor a selector.
        with self._watching():
            self.inverted.search_preassigned_c(
                len(queries_QD),
                faiss.swig_ptr(queries_QD),
                width,
                faiss.swig_ptr(numbers_QP),
                faiss.swig_ptr(centroids_QP),
                faiss.swig_ptr(similarities_QK),
                faiss.swig_ptr(found_QK),
                False,
                params,
            )
        return similarities_QK, found_QK

    def _parameters(self, values: dict[str, int], masks: Masks) -> faiss.SearchParameters:
        """Parameters for one call. They are made once, because FAISS only reads them."""
        whole = len(masks) == len(self.num_rows) and all(mask is None for mask in masks.values())
        asked = tuple((member, id(mask)) for member, mask in sorted(masks.items()) if not whole)
        key = (tuple(values.items()), asked)
        known = self._params.get(key)
        if known is None:
            bits = None if whole else self._bits(masks)  # the selector reads this buffer in place
            selector = None if bits is None else faiss.IDSelectorBitmap(bits)
            params = parameters.search_parameters(self.inverted, values, selector)
            known = params, (bits, selector, [*masks.values()])  # masks must live as long as their ids are in the key
            self._params.put(key, known, 1_024 + (0 if bits is None else len(bits)))
        return known[0]

    def _bits(self, masks: Masks) -> np.ndarray:
        bits = np.zeros(int(self.starts[-1]) // 8, np.uint8)
        for member, mask in masks.items():
            of_member = np.full(-(-self.num_rows[member] // 8), 255, np.uint8) if mask is None else mask.bits
            begin = int(self.starts[member]) // 8
            bits[begin : begin + len(of_member)] = of_member
        return bits


class Seat:
    """Where the rows of a shard are searched: a stack, and which of its members they are.

    When stacks are merged, the seats of their members move. A search that has read the old place uses the old stack,
    which has the same rows.
    """

    def __init__(self, stack: Stack, member: int = 0) -> None:
        self.place = (stack, member)  # one value, because other threads read it


def starts_of(num_rows: Sequence[int]) -> np.ndarray:
    """The first number of each member, and the end of the last one, int64 [M + 1]."""
    aligned = [-(-rows // ALIGNED_TO) * ALIGNED_TO for rows in num_rows]
    return np.concatenate([[0], np.cumsum(aligned, dtype=np.int64)]).astype(np.int64)

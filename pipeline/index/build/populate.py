"""Fills an empty trained index, a bounded number of vectors at a time."""

from typing import TYPE_CHECKING

import faiss
import numpy as np
from faiss.contrib.ivf_tools import add_preassigned

from pipeline.index.build.gpu import assigned
from pipeline.index.search.quantizer import transform

if TYPE_CHECKING:
    from pipeline.index.build.gpu import Device

ADD_ROWS = 65_536  # vectors converted to float32 at a time


def populate(index: faiss.Index, vectors_ND: np.ndarray, device: "Device | None" = None) -> faiss.Index:
    """Returns the trained `index` filled with vectors (float16 [N, D]), numbered from 0. Do not use `index` afterwards.

    With a device, the nearest centroids are found on the device. The content of the index is the same, except for
    vectors that lie between two centroids.
    """
    inverted = faiss.try_extract_index_ivf(index)
    if device is None or inverted is None:
        for start in range(0, len(vectors_ND), ADD_ROWS):
            index.add(np.ascontiguousarray(vectors_ND[start : start + ADD_ROWS], np.float32))
        return index
    filled = _of_plain_lists(faiss.downcast_index(inverted))
    centroids_CD = inverted.quantizer.reconstruct_n(0, inverted.nlist)
    for start in range(0, len(vectors_ND), ADD_ROWS):
        rows_ND = transform(index, np.ascontiguousarray(vectors_ND[start : start + ADD_ROWS], np.float32))
        add_preassigned(filled, rows_ND, assigned(rows_ND, centroids_CD, device))
    return _as_before(index, filled)


def _of_plain_lists(inverted: faiss.IndexIVF) -> faiss.IndexIVF:
    """The index itself. For fast scan, whose blocks of 32 rows take no preassigned rows, one with the same codes."""
    if not isinstance(inverted, faiss.IndexIVFPQFastScan):
        return inverted
    pq = inverted.pq
    plain = faiss.IndexIVFPQ(inverted.quantizer, inverted.d, inverted.nlist, pq.M, pq.nbits, inverted.metric_type)
    plain.pq, plain.by_residual, plain.is_trained = pq, inverted.by_residual, True
    return plain


def _as_before(index: faiss.Index, filled: faiss.IndexIVF) -> faiss.Index:
    """An index of the kind of `index` with the rows of `filled`."""
    outer = faiss.downcast_index(index)
    inner = faiss.downcast_index(faiss.try_extract_index_ivf(index))
    if isinstance(inner, faiss.IndexIVFPQFastScan):
        packed = faiss.IndexIVFPQFastScan(filled)
        packed.by_residual = inner.by_residual
        inner.own_fields, packed.own_fields = False, True  # the quantizer changes its owner
        if not isinstance(outer, faiss.IndexPreTransform):
            return packed
        outer.index = packed  # FAISS now deletes `packed`; Python deletes the index that it replaces
        packed.this.disown()
        inner.this.own(True)
    outer.ntotal = filled.ntotal
    return index

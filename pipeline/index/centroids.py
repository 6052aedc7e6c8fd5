"""Whether a vector is a centroid of a trained index. If a list has only one row, k-means makes it the centroid."""

import faiss
import numpy as np

from pipeline.index.search.quantizer import transform
from pipeline.index.search.shard_files import read_faiss
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage

SAME_DIRECTION = 1 - 2e-6  # cosine; rounding to float16 turns a vector by less. k-means scales centroids to unit length
COMPARED_AT_ONCE = 4_096


def has_centroid_among(storage: Storage, trained: FileRef, vectors_ND: np.ndarray) -> bool:
    """Whether one of the vectors (float16 [N, D]), scaled, is a centroid of a trained index. Raises DamagedFile."""
    index = read_faiss(storage, trained, mapped=False)
    lists = faiss.try_extract_index_ivf(index)
    if lists is None or not lists.nlist:
        return False
    vectors = transform(index, np.ascontiguousarray(vectors_ND, np.float32))
    centroids_CD = _of_unit_length(lists.quantizer.reconstruct_n(0, lists.nlist))
    return any(
        bool((_of_unit_length(vectors[begin : begin + COMPARED_AT_ONCE]) @ centroids_CD.T > SAME_DIRECTION).any())
        for begin in range(0, len(vectors), COMPARED_AT_ONCE)
    )


def _of_unit_length(vectors_ND: np.ndarray) -> np.ndarray:
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    units_ND: np.ndarray = vectors_ND / np.maximum(lengths_N1, np.finfo(np.float32).tiny)
    return units_ND

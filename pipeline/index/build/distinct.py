"""Which rows hold the same vector, byte for byte: copies count once where recall is measured and lists are trained.

A thousand copies of one image are found by every index, and say nothing of how well the others are.
"""

import numpy as np

ROWS_AT_ONCE = 16_384


def vector_keys(vectors_ND: np.ndarray) -> np.ndarray:
    """A number for each vector (float16 [N, D]), uint64 [N]: equal where the bytes are equal, and next to never else.

    Sums of the 16-bit elements times random 64-bit numbers: two vectors that differ share a key once in 2 ** 48 times.
    Reads every vector once, a bounded number at a time; 8 bytes a row are kept.
    """
    weights_D = np.random.default_rng(0).integers(0, 2**64, vectors_ND.shape[1], np.uint64) | np.uint64(1)
    keys_N = np.empty(len(vectors_ND), np.uint64)
    for start in range(0, len(vectors_ND), ROWS_AT_ONCE):
        bits_ND = np.ascontiguousarray(vectors_ND[start : start + ROWS_AT_ONCE], np.float16).view(np.uint16)
        keys_N[start : start + ROWS_AT_ONCE] = bits_ND.astype(np.uint64) @ weights_D
    return keys_N


def without_copies(vectors_ND: np.ndarray) -> np.ndarray:
    """The vectors, float16 [N, D], each once and in the order in which they first come."""
    _, first = np.unique(vector_keys(vectors_ND), return_index=True)
    return vectors_ND if len(first) == len(vectors_ND) else vectors_ND[np.sort(first)]

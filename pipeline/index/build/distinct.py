"""Which rows hold the same vector, byte for byte. Copies count once when recall is measured and lists are trained.

Every index finds a thousand copies of one image. This does not show how well it finds other images.
"""

import numpy as np

ROWS_AT_ONCE = 16_384


def vector_keys(vectors_ND: np.ndarray) -> np.ndarray:
    """A key for each vector (float16 [N, D]), uint64 [N]: equal for equal bytes, and almost never equal otherwise.

    A key is the sum of the 16-bit elements times random 64-bit numbers. Two different vectors share a key once in
    2 ** 48 times. Reads every vector once, a bounded number at a time. Needs 8 bytes of memory a row.
    """
    weights_D = np.random.default_rng(0).integers(0, 2**64, vectors_ND.shape[1], np.uint64) | np.uint64(1)
    keys_N = np.empty(len(vectors_ND), np.uint64)
    for start in range(0, len(vectors_ND), ROWS_AT_ONCE):
        bits_ND = np.ascontiguousarray(vectors_ND[start : start + ROWS_AT_ONCE], np.float16).view(np.uint16)
        keys_N[start : start + ROWS_AT_ONCE] = bits_ND.astype(np.uint64) @ weights_D
    return keys_N


def without_copies(vectors_ND: np.ndarray) -> np.ndarray:
    """The distinct vectors (float16 [N, D]), in the order of their first occurrence."""
    _, first = np.unique(vector_keys(vectors_ND), return_index=True)
    return vectors_ND if len(first) == len(vectors_ND) else vectors_ND[np.sort(first)]

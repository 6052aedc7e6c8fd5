"""Which FAISS key to build, as autofaiss proposes it from rows, dimension and memory."""

import re

from autofaiss.external.optimize import get_optimal_index_keys_v2

from pipeline.errors import IndexBuildError

TRAINING_ROWS_PER_CENTROID = 100  # what autofaiss trains on where memory allows


def propose_key(num_rows: int, dimension: int, max_memory_bytes: int) -> str:
    """The most promising key. Always memory-mappable ones: a graph can be neither mapped nor shared by processes."""
    keys = get_optimal_index_keys_v2(
        num_rows, dimension, f"{max(max_memory_bytes // 1024, 1)}KB", should_be_memory_mappable=True
    )
    if not keys:
        raise IndexBuildError(
            f"no index of {num_rows:,} rows in {dimension} dimensions fits into {max_memory_bytes:,} bytes: "
            "allow more with --max-memory"
        )
    return str(keys[0])


def num_centroids(key: str) -> int:
    """Centroids a key's coarse quantizer has, 0 for a key without one."""
    found = re.search(r"IVF(\d+)", key)
    return int(found[1]) if found else 0


def training_rows(key: str, num_rows: int, dimension: int, max_memory_bytes: int) -> int:
    """Rows to train on: enough for every centroid, within half the memory allowed as float32.

    Raises IndexBuildError when there are fewer rows than centroids.
    """
    least = max(num_centroids(key), 256 if "PQ" in key else 0)
    if num_rows < least:
        raise IndexBuildError(
            f"the key {key} needs at least {least:,} rows to train on and there are {num_rows:,}: "
            "give a smaller --key, or none to have one chosen"
        )
    wanted = max(num_centroids(key), 1_000) * TRAINING_ROWS_PER_CENTROID
    fits = max_memory_bytes // 2 // (4 * dimension)
    return min(num_rows, max(min(wanted, fits), least))

"""The FAISS keys to consider for a number of rows: those that autofaiss proposes, and others that it never does."""

import math
import re
from dataclasses import dataclass

import faiss

from pipeline.errors import IndexBuildError
from pipeline.index.search import parameters

TRAINING_ROWS_PER_CENTROID = 48  # on 300,000 rows, 64 and autofaiss's 100 raised recall@10 by no more than .001
ROW_NUMBER = 8  # bytes that FAISS stores for the number of each row in an inverted list
GRAPH_DEGREE = 32
INDEXED_FROM = 256  # rows; below this, exact search is always the fastest
PRODUCT_QUANTIZERS_FROM = 10_000  # rows; below this, a codebook is not worth its training
FLAT = "Flat"


@dataclass(frozen=True)
class Proposal:
    """A key, and who proposed it: "autofaiss", "visual-memory" or "user"."""

    key: str
    by: str


def proposals(num_rows: int, dimension: int, max_memory_bytes: int) -> list[Proposal]:
    """Keys worth measuring, each once. Of the keys of autofaiss, only memory-mappable ones are included."""
    if num_rows < INDEXED_FROM:
        return [Proposal(FLAT, "visual-memory")]
    lists = num_lists(num_rows)
    inverted = f"IVF{lists}"
    keys = [FLAT, f"{inverted},SQfp16", f"{inverted},SQ8"]
    if num_rows >= PRODUCT_QUANTIZERS_FROM:
        keys += [f"{inverted},PQ{m}x4fs" for m in _sub_quantizers(dimension)]
        keys += [f"RR{dimension},{inverted},RaBitQ"]
    keys += [f"HNSW{GRAPH_DEGREE}"]
    found = [Proposal(key, "autofaiss") for key in _of_autofaiss(num_rows, dimension, max_memory_bytes)]
    return found + [Proposal(key, "visual-memory") for key in keys if key not in {p.key for p in found}]


def num_lists(num_rows: int) -> int:
    """Number of inverted lists for so many rows: the power of two nearest to twice their square root, at least 1.

    autofaiss takes four times the root. With half as many, the lists are longer, which hardly slows fast-scan codes.
    Training and assignment, which are most of a build, cost half.
    """
    return 1 << max(round(math.log2(2 * max(num_rows, 1) ** 0.5)), 0)


def num_centroids(key: str) -> int:
    """Number of centroids in the coarse quantizer of a key, 0 for a key without one."""
    found = re.search(r"IVF(\d+)", key)
    return int(found[1]) if found else 0


def with_lists(key: str, lists: int) -> str:
    """The same key with another number of inverted lists."""
    return re.sub(r"IVF\d+", f"IVF{lists}", key)


def empty_index(key: str, dimension: int) -> faiss.Index:
    """An untrained index. Raises IndexBuildError for a key that FAISS does not know or that cannot mask rows."""
    try:
        index = faiss.index_factory(dimension, key, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise IndexBuildError(
            f"FAISS does not know the key {key} for {dimension} dimensions: "
            "give one of its index_factory strings, such as IVF256,Flat, or none to have one chosen"
        ) from error
    parameters.code_vectors_themselves(index)
    if not parameters.searchable(index):
        raise IndexBuildError(
            f"the key {key} is of a kind whose forgotten rows cannot be masked: "
            "give Flat, a key with IVF or HNSW (OPQ, PCA and RR may come before), or none to have one chosen"
        )
    return index


def expected_bytes(key: str, num_rows: int, dimension: int) -> int:
    """Bytes of an index in memory: codes, row numbers, centroids, codebooks. For the key Flat: the vectors."""
    if key == FLAT:
        return 2 * dimension * num_rows
    whole = empty_index(key, dimension)  # owns the objects that the names below point to
    inverted = faiss.try_extract_index_ivf(whole)
    outer = faiss.downcast_index(whole)
    if inverted is not None:
        lists = faiss.downcast_index(inverted)
        rows = num_rows
        if isinstance(lists, faiss.IndexIVFFastScan):
            rows += int(lists.nlist) * lists.bbs // 2  # the last block of a list is half empty
        coding = 4 * dimension * int(lists.d) if outer is not lists else 0  # a rotation
        coding += 4 * int(lists.d) * int(lists.pq.ksub) if hasattr(lists, "pq") else 0
        centroids = 4 * int(lists.d) * int(lists.nlist)
        # Centroids are held once; a rotation and codebooks by the quantizer and by each shard, of which one is counted.
        return int(lists.code_size) * rows + ROW_NUMBER * num_rows + centroids + 2 * coding
    graph = faiss.downcast_index(outer.index) if isinstance(outer, faiss.IndexPreTransform) else outer
    code_size = int(faiss.downcast_index(graph.storage).code_size)
    return (code_size + 4 * int(graph.hnsw.nb_neighbors(0)) + ROW_NUMBER) * num_rows


def centroid_bytes(key: str, dimension: int) -> int:
    """Bytes of the centroids of a key, which all shards of a process can share; 0 for a key without lists."""
    if not num_centroids(key):
        return 0
    whole = empty_index(key, dimension)  # owns the object that the name below points to
    inverted = faiss.extract_index_ivf(whole)
    return 4 * int(inverted.d) * int(inverted.nlist)


def training_rows(key: str, num_rows: int, dimension: int, max_memory_bytes: int) -> int:
    """Number of rows to train on: enough for every centroid, and in float32 within half the allowed memory.

    Raises IndexBuildError if there are fewer rows than `least_rows`.
    """
    if num_rows < least_rows(key):
        raise IndexBuildError(
            f"the key {key} needs at least {least_rows(key):,} rows to train on and there are {num_rows:,}: "
            "give a smaller `key`, or none to have one chosen"
        )
    wanted = max(num_centroids(key), 1_000) * TRAINING_ROWS_PER_CENTROID
    fits = max_memory_bytes // 2 // (4 * dimension)
    return min(num_rows, max(min(wanted, fits), least_rows(key)))


def least_rows(key: str) -> int:
    """The fewest rows that a key can be trained on: one per centroid, of lists and of codebooks."""
    codebook = re.search(r"PQ\d+(?:x(\d+))?", key)
    return max(num_centroids(key), 1 << int(codebook[1] or 8) if codebook else 0)


def _of_autofaiss(num_rows: int, dimension: int, max_memory_bytes: int) -> list[str]:
    """The first key of autofaiss that fits, or else its first key; empty if it has none.

    autofaiss counts only codes and row numbers. With few rows, the centroids and codebooks take more than these. So it
    is called again with less memory while its proposal takes more than allowed.
    """
    from autofaiss.external.optimize import get_optimal_index_keys_v2  # imports pandas, which takes half a second

    first: list[str] = []
    for part in (1.0, 0.75, 0.5, 0.35):
        size = f"{max(int(max_memory_bytes * part) // 1024, 1)}KB"
        keys = get_optimal_index_keys_v2(num_rows, dimension, size, should_be_memory_mappable=True)
        for key in map(str, keys[:1]):
            if least_rows(key) <= num_rows:
                if expected_bytes(key, num_rows, dimension) <= max_memory_bytes:
                    return [key]
                first = first or [key]
    return first


def _sub_quantizers(dimension: int) -> list[int]:
    """Numbers of 4-bit sub-quantizers for codes of about two bits and about one bit a dimension."""
    found = []
    for most in (dimension // 2, dimension // 4):
        fitting = [m for m in range(1, most + 1) if dimension % m == 0]
        if fitting and fitting[-1] * 2 >= most:
            found.append(fitting[-1])
    return list(dict.fromkeys(found))

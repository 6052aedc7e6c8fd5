"""Rows taken out of an index by copying codes leave what an index filled with the other rows would be."""

import functools
from collections.abc import Sequence

import faiss
import numpy as np
import pytest

from pipeline.index.search.remaining_rows import keep_rows

DIMENSION = 48
ROWS = 3_000
GENERATOR = np.random.default_rng(7)
VECTORS = GENERATOR.normal(size=(ROWS, DIMENSION)).astype(np.float32)
COPIED = [
    "IVF40,Flat",
    "IVF40,SQfp16",
    "IVF40,SQ8",
    "IVF40,PQ8x4fs",
    "IVF40,PQ3x4fs",
    "IVF40,PQ8x4fsr",
    "RR48,IVF40,PQ8x4fs",
    "RR16,IVF40_HNSW8,PQ8x4",
    "IVF40_HNSW8,PQ16x4fs",
    "IVF40,RaBitQ",
    "IVF40,RaBitQfs",
    "IVF40,RaBitQfs4",
]
GONE = {
    "one": [1_234],
    "some": GENERATOR.permutation(ROWS)[:300],
    "most": np.flatnonzero(np.arange(ROWS) % 7),
    "the first and the last": [0, ROWS - 1],
}


def filled(trained: faiss.Index, vectors_ND: np.ndarray) -> faiss.Index:
    index = faiss.clone_index(trained)
    index.add(vectors_ND)
    return index


@functools.cache
def trained(key: str) -> faiss.Index:
    index = faiss.index_factory(DIMENSION, key, faiss.METRIC_INNER_PRODUCT)
    index.train(VECTORS)
    return index


@pytest.mark.parametrize("gone", GONE.values(), ids=GONE.keys())
@pytest.mark.parametrize("key", COPIED)
def test_the_index_equals_one_of_the_other_rows(key: str, gone: Sequence[int]) -> None:
    kept_N = np.setdiff1d(np.arange(ROWS), gone)
    index = filled(trained(key), VECTORS)
    assert keep_rows(index, kept_N)
    # Every byte: quantizer, codes, padding and numbers. So each answer is equal too, and no code of a lost row is left.
    assert bytes(faiss.serialize_index(index)) == bytes(faiss.serialize_index(filled(trained(key), VECTORS[kept_N])))


def test_the_index_can_be_loaded_and_emptied() -> None:
    index = faiss.deserialize_index(faiss.serialize_index(filled(trained("IVF40,PQ8x4fs"), VECTORS)))
    assert keep_rows(index, np.arange(10, ROWS))
    assert index.search(VECTORS[10:11], 1)[1] == 0
    assert keep_rows(index, np.empty(0, np.int64))
    assert index.ntotal == 0
    assert (index.search(VECTORS[:2], 3)[1] == -1).all()


@pytest.mark.parametrize("key", ["HNSW8", "Flat", "IVF40,PQ2+2", "IVF40,PQ8x4fs,RFlat"])
def test_other_kinds_are_left_as_they_are(key: str) -> None:
    index = faiss.index_factory(DIMENSION, key, faiss.METRIC_L2)
    index.train(VECTORS)
    index.add(VECTORS)
    before = bytes(faiss.serialize_index(index))
    assert not keep_rows(index, np.arange(10))
    assert bytes(faiss.serialize_index(index)) == before

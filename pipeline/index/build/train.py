"""Trains one index on a sample. All shards of a generation share its quantizer."""

from typing import TYPE_CHECKING

import faiss
import numpy as np

from pipeline.index.build.distinct import without_copies
from pipeline.index.build.gpu import centroids_of
from pipeline.index.build.key_candidates import empty_index, least_rows
from pipeline.index.search.quantizer import transform

if TYPE_CHECKING:
    from pipeline.index.build.gpu import Device

ITERATIONS = 6  # of k-means; on 300,000 rows, 8 cost a third more and gained no recall@10, 4 lost .0015
CODEBOOK_ITERATIONS = 10  # of the k-means of a product quantizer; FAISS's 25 cost .1 s more and gained less than .0005
ROUGH_ITERATIONS = 4  # of the same, if only a sample is judged
DISTANCE_ROWS = 20_000  # of a sample; enough for three digits of the distance to the nearest centroid
SAMPLE_ROTATION_ROWS = 39 * 256  # as many as FAISS wants for the codebooks inside the rotation


def train_index(
    key: str, sample_ND: np.ndarray, *, roughly: bool = False, device: "Device | None" = None
) -> faiss.Index:
    """An empty index trained on vectors (float [N, D] of unit length), with k-means on `device` if one is given.

    `roughly` spends little on codebooks and on a learned rotation (OPQ), which would take longer than all other steps.
    This is enough to judge a key on a sample.
    """
    index = empty_index(key, sample_ND.shape[1])
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        # No warnings on stderr: the number of rows was checked, and recall is measured.
        inverted.cp.min_points_per_centroid = 1
        inverted.cp.spherical = True  # the vectors have unit length and are compared by inner product
        inverted.cp.niter = ITERATIONS
    if isinstance(coded := faiss.downcast_index(inverted), faiss.IndexIVFPQ | faiss.IndexIVFPQFastScan):
        coded.pq.cp.min_points_per_centroid = 1
        coded.pq.cp.niter = ROUGH_ITERATIONS if roughly else CODEBOOK_ITERATIONS
        if isinstance(coded, faiss.IndexIVFPQ):
            # It orders codes for a filter (`ht`) that no search here uses, and took 24 of 24 s of training PQ32x8.
            coded.do_polysemous_training = False
    quantizers = []
    for rotation in _learned_rotations(index):
        quantizers.append(faiss.ProductQuantizer(rotation.d_out, rotation.M, 8))  # FAISS has a bare pointer to it
        quantizers[-1].cp.min_points_per_centroid = 1
        rotation.pq = quantizers[-1]
        if roughly:
            rotation.niter, rotation.niter_pq, rotation.niter_pq_0 = 2, 2, ROUGH_ITERATIONS
            rotation.max_train_points = SAMPLE_ROTATION_ROWS
    floats_ND = np.ascontiguousarray(sample_ND, np.float32)
    if device is not None and inverted is not None:
        seen_ND = _steps_trained(index, floats_ND)
        inverted.quantizer.add(centroids_of(seen_ND, inverted.nlist, ITERATIONS, device))  # FAISS then trains none
    index.train(floats_ND)
    for rotation in _learned_rotations(index):
        rotation.pq = None
    return index


def train_on(key: str, sample_ND: np.ndarray) -> np.ndarray:
    """A training sample (float16 [N, D]) with each vector once: many copies would become many equal centroids.

    Copies stay in the sample if the key needs more rows than there are distinct vectors.
    """
    distinct_ND = without_copies(sample_ND)
    return distinct_ND if len(distinct_ND) >= least_rows(key) else sample_ND


def centroid_distance(index: faiss.Index, vectors_ND: np.ndarray) -> float | None:
    """Average distance (1 - cosine) of vectors to their nearest centroids; None without centroids or vectors.

    If the distance is larger for new vectors than for the training vectors, the quantizer fits the new ones worse.
    """
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is None or not len(vectors_ND):
        return None
    if len(vectors_ND) > DISTANCE_ROWS:
        rows = np.random.default_rng(0).choice(len(vectors_ND), DISTANCE_ROWS, replace=False)
        vectors_ND = vectors_ND[np.sort(rows)]
    seen_ND = transform(index, np.ascontiguousarray(vectors_ND, np.float32))
    _, nearest_N1 = inverted.quantizer.search(seen_ND, 1)
    centroids_ND = inverted.quantizer.reconstruct_batch(nearest_N1[:, 0])
    products_N = np.einsum("nd,nd->n", seen_ND, centroids_ND)
    lengths_N = np.linalg.norm(seen_ND, axis=1) * np.linalg.norm(centroids_ND, axis=1)
    return float(1 - (products_N / np.maximum(lengths_N, np.finfo(np.float32).tiny)).mean())


def _steps_trained(index: faiss.Index, vectors_ND: np.ndarray) -> np.ndarray:
    """Train the transformations before the lists of an index. Returns the transformed vectors (float32 [N, D])."""
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexPreTransform):
        for place in range(outer.chain.size()):
            step = faiss.downcast_VectorTransform(outer.chain.at(place))
            if not step.is_trained:
                step.train(vectors_ND)
            vectors_ND = step.apply(vectors_ND)
    return vectors_ND


def _learned_rotations(index: faiss.Index) -> list[faiss.OPQMatrix]:
    outer = faiss.downcast_index(index)
    if not isinstance(outer, faiss.IndexPreTransform):
        return []
    steps = (faiss.downcast_VectorTransform(outer.chain.at(step)) for step in range(outer.chain.size()))
    return [step for step in steps if isinstance(step, faiss.OPQMatrix)]

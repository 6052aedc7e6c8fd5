"""k-means and assignment in torch, on the CPU here: the same code that a GPU runs."""

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from pipeline.index.build.gpu import assigned, centroids_of
from pipeline.index.build.populate import populate
from pipeline.index.build.train import train_index
from tests.conftest import unit
from tests.index.test_choice import correlated

CPU = torch.device("cpu")


def objective(vectors_ND: np.ndarray, centroids_CD: np.ndarray) -> float:
    return float((vectors_ND @ centroids_CD.T).max(axis=1).mean())


def test_centroids_are_as_good_as_those_of_faiss() -> None:
    vectors_ND = correlated(8_000).astype(np.float32)
    ours_CD = centroids_of(vectors_ND, 64, 8, CPU)
    theirs = faiss.Kmeans(vectors_ND.shape[1], 64, niter=8, spherical=True, seed=1)
    theirs.train(vectors_ND)
    assert ours_CD.shape == (64, 64)
    assert np.allclose(np.linalg.norm(ours_CD, axis=1), 1, atol=1e-5)
    assert objective(vectors_ND, ours_CD) == pytest.approx(objective(vectors_ND, theirs.centroids), rel=0.01)
    assert (assigned(vectors_ND, ours_CD, CPU) == (vectors_ND @ ours_CD.T).argmax(axis=1)).mean() > 0.999


def test_a_centroid_with_no_rows_begins_anew() -> None:
    vectors_ND = np.repeat(np.eye(4, 16, dtype=np.float32), 50, axis=0)
    found_CD = centroids_of(vectors_ND, 8, 10, CPU)
    assert np.isfinite(found_CD).all()
    assert objective(vectors_ND, found_CD) == pytest.approx(1.0)


KEYS = ["IVF16,Flat", "IVF16,SQ8", "IVF16,SQfp16", "IVF16,PQ16x4fs", "IVF16,PQ8x8", "RR64,IVF16,RaBitQ"]


@pytest.mark.parametrize("key", [*KEYS, "RR64,IVF16,PQ16x4fs", "IVF16_HNSW8,PQ16x4fs"])
def test_what_is_assigned_beforehand_is_found_as_what_is_not(key: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    vectors_ND = correlated(5_000)
    queries_QD = unit(vectors_ND[:50].astype(np.float32))
    answers = []
    for device in (None, CPU):
        index = populate(train_index(key, vectors_ND), vectors_ND, device)
        assert index.ntotal == len(vectors_ND)
        faiss.write_index(index, str(tmp_path / "index.faiss"))
        read = faiss.read_index(str(tmp_path / "index.faiss"))
        faiss.try_extract_index_ivf(read).nprobe = 16
        answers.append(read.search(queries_QD, 10))
    same = (answers[0][1] == answers[1][1]).mean()
    assert same > 0.99
    assert np.allclose(np.sort(answers[0][0]), np.sort(answers[1][0]), atol=1e-3)


@pytest.mark.parametrize("key", ["IVF32,SQ8", "RR64,IVF32,PQ16x4fs"])
def test_an_index_trained_in_torch_is_no_worse(key: str) -> None:
    vectors_ND = correlated(6_000)
    recalls = []
    exact_QK = np.argsort(-(vectors_ND[:100].astype(np.float64) @ vectors_ND.T.astype(np.float64)), axis=1)[:, :10]
    for device in (None, CPU):
        index = populate(train_index(key, vectors_ND, device=device), vectors_ND)
        faiss.try_extract_index_ivf(index).nprobe = 4
        found_QK = index.search(vectors_ND[:100].astype(np.float32), 10)[1]
        recalls.append(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found_QK, exact_QK, strict=True)]))
    assert recalls[1] > recalls[0] - 0.05


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a device")
def test_a_machine_without_a_device_has_no_gpu_and_does_not_load_torch() -> None:
    code = "import sys; from pipeline.index.build.gpu import gpu; print(gpu(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None False\n"

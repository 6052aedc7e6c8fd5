"""k-means and assignment in torch, on a GPU. Training and populating an index spend most of their time on these.

torch is imported only where the machine has an NVIDIA device. Shapes: N rows, C centroids, D dimensions.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    Device = torch.device

ROWS_AT_ONCE = 65_536  # compared with all centroids at a time: 1 GB of products for 4,096 centroids


def gpu() -> "Device | None":
    """The GPU that this process may use, or None. On Ray there is one only if the task was granted it."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return None
    import torch

    return torch.device("cuda") if torch.cuda.is_available() else None


def centroids_of(
    vectors_ND: np.ndarray, num_centroids: int, iterations: int, device: "Device", seed: int = 0
) -> np.ndarray:
    """Spherical k-means: centroids float32 [C, D] of unit length, of vectors float [N, D] of unit length, N >= C.

    The first centroids are random rows. A centroid that is nearest to no row is replaced by another random row.
    (Dhillon and Modha, Concept decompositions for large sparse text data using clustering, 2001.)
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    held_ND = torch.as_tensor(np.ascontiguousarray(vectors_ND, np.float32), device=device)
    first_C = torch.randperm(len(held_ND), generator=generator)[:num_centroids]
    centroids_CD = held_ND[first_C.to(device)]
    for _ in range(iterations):
        nearest_N = _nearest(held_ND, centroids_CD)
        sums_CD = torch.zeros_like(centroids_CD).index_add_(0, nearest_N, held_ND)
        empty_C = torch.bincount(nearest_N, minlength=num_centroids) == 0
        others = torch.randint(len(held_ND), (int(empty_C.sum()),), generator=generator)
        sums_CD[empty_C] = held_ND[others.to(device)]
        centroids_CD = torch.nn.functional.normalize(sums_CD)
    found_CD: np.ndarray = centroids_CD.cpu().numpy()
    return found_CD


def assigned(vectors_ND: np.ndarray, centroids_CD: np.ndarray, device: "Device") -> np.ndarray:
    """The centroid with the largest inner product for each vector (float [N, D]), int64 [N]."""
    import torch

    held_ND = torch.as_tensor(np.ascontiguousarray(vectors_ND, np.float32), device=device)
    nearest_N: np.ndarray = _nearest(held_ND, torch.as_tensor(centroids_CD, device=device)).cpu().numpy()
    return nearest_N


def _nearest(vectors_ND: "torch.Tensor", centroids_CD: "torch.Tensor") -> "torch.Tensor":
    import torch

    blocks = torch.split(vectors_ND, ROWS_AT_ONCE)
    return torch.cat([(rows_BD @ centroids_CD.T).argmax(dim=1) for rows_BD in blocks])
